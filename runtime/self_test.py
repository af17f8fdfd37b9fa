"""A bundle's self-test: a few calls of each component, and what the float32 reference gave for them when it was built.

Builders fuse and reorder, and kernels have been wrong on single GPUs without a word. So a bundle carries the answers of
its own graphs in float32, run by ONNX Runtime on the CPU at build time, and any backend can be held against them.

Plans take only the sizes they were built for, those of whole videos, and are tested at these: other sizes would be
other kernels. The VAE decoder's reference makes them too, two latent frames and the smallest of its tiles. A denoiser's
would take an hour. But on latents that are the same everywhere all tokens stay alike through every layer, because
whatever weights attention gives to equal values, their mean is that value: one token alone has the same answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t2v_rt.engines.contract import Component, EngineState
from t2v_rt.engines.manifest import ComponentSpec, Manifest, ModelSpec
from t2v_rt.errors import BundleError
from t2v_rt.runtime import wan
from t2v_rt.runtime.noise import Generator

Arrays = dict[str, NDArray[Any]]
FOLDER = "self_test"  # of the bundle; a file for each component
TOKENS = 8  # of the prompt
ROWS, COLUMNS, FRAMES = 4, 6, 2  # of the latents
TIMESTEP = 500.0
WEIGHTS_MARGIN = 1.5  # times the error that quantized weights had on the CPU: a GPU rounds other things
KEPT_VALUES = 100_000  # of one output; of a larger one, evenly spaced ones are kept
# Largest error, relative to the largest value of the reference. The float32 bound leaves room for another processor's
# order of sums, the half one for a dozen roundings of operands in depth; a wrong kernel is off by tens of percent.
TOLERANCES: Mapping[str, float] = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 6e-2}


@dataclass(frozen=True)
class Call:
    """One call of an engine.

    Args:
        role: of the engine.
        feeds: its inputs.
        output: name of the output that is kept.
    """

    role: str
    feeds: Arrays
    output: str


@dataclass(frozen=True)
class Verdict:
    """How a component came out.

    Args:
        component: its name.
        error: largest difference from the reference over the reference's largest value, of all calls.
        tolerance: what is allowed.
    """

    component: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance


def run_calls(name: str, component: Component, model: ModelSpec, built: ComponentSpec) -> list[NDArray[Any]]:
    """Makes the calls of a component, or of a part of it, one after another and returns what each gave.

    Args:
        name: of the component.
        component: loaded; the bundle's own, or its reference.
        model: constants of the model.
        built: what the manifest says of the bundle's own, whose sizes are tested.
    """
    results: list[NDArray[Any]] = []
    states: dict[str, EngineState] = {}
    for call in _calls(name, component, model, built, results):
        engine, part = component[call.role], call.role.partition("_")[0]
        feeds = {spec.name: np.ascontiguousarray(call.feeds[spec.name], spec.numpy_dtype) for spec in engine.inputs}
        if engine.states and part not in states:
            rows, columns = next(iter(feeds.values())).shape[-2:]
            states[part] = component.new_state(height=rows, width=columns, part=part)
        results.append(engine.infer(feeds, states.get(part))[call.output])
    return results


def _calls(
    name: str, component: Component, model: ModelSpec, built: ComponentSpec, results: Sequence[NDArray[Any]]
) -> Iterator[Call]:
    """The calls of a component; later ones may take what earlier ones gave."""
    noise = Generator(0)
    if name == "text_encoder":
        buckets = wan.relative_buckets(TOKENS, model.relative_buckets, model.relative_max_distance)
        for role in component:  # all are fed alike: what one gives would carry its error into the next
            hidden = Generator(0).randn((1, TOKENS, model.text_dim))
            feeds: Arrays = {"hidden_states": hidden, "relative_buckets": buckets}
            yield Call(role, feeds, component[role].outputs[0].name)
    elif name == "transformer":
        yield Call("model", _denoiser_feeds(component, model, built, noise), "noise_pred")
    else:
        rows, columns = _sizes(built, "head_first", ("height", "width"), (ROWS, COLUMNS))
        fed = _sizes(built, "tail", ("height", "width"), (rows * _scale(built), columns * _scale(built)))
        for when in ("first", "next"):
            latents = noise.randn((1, model.latent_channels, rows, columns))
            yield Call(f"head_{when}", {"latents": latents}, "features")
            yield Call("tail", {"features": results[-1][:1, :, : fed[0], : fed[1]]}, "frames")


def _denoiser_feeds(component: Component, model: ModelSpec, built: ComponentSpec, noise: Generator) -> Arrays:
    """Noise; or, where the bundle has a plan, latents that are the same everywhere, of one token for the reference."""
    text = np.zeros((1, model.text_length, model.text_dim), np.float32)
    text[:, :TOKENS] = noise.randn((1, TOKENS, model.text_dim))
    if built.graphs["model"].plan is None:
        latents = noise.randn((1, model.latent_channels, FRAMES, ROWS, COLUMNS))
    else:
        values = noise.randn((1, model.latent_channels, *model.patch))
        plan = component["model"].spec.plan
        sizes = model.patch if plan is None else _sizes(built, "model", ("frames", "height", "width"), model.patch)
        latents = np.tile(values, [1, 1, *(size // of for size, of in zip(sizes, model.patch, strict=True))])
    feeds: Arrays = {"hidden_states": latents, "timestep": np.array([TIMESTEP]), "encoder_hidden_states": text}
    if any(spec.name == "encoder_attention_bias" for spec in component["model"].inputs):
        context = wan.text_context(text)
        feeds |= {"encoder_hidden_states": context.embeds, "encoder_attention_bias": context.bias}
    return feeds


def _sizes(built: ComponentSpec, role: str, names: Sequence[str], free: Sequence[int]) -> list[int]:
    """The sizes that a plan is tuned for in its last profile, that of the smallest tiles; `free` of a graph."""
    plan = built.graphs[role].plan
    return list(free) if plan is None else [plan.profiles[-1].sizes[name].opt for name in names]


def _scale(built: ComponentSpec) -> int:
    assert built.tiles is not None
    return built.tiles.scale


def record(name: str, answers: Sequence[NDArray[Any]], folder: Path) -> None:
    """Writes what the reference of a component gave into a bundle that is being built.

    Args:
        name: of the component.
        answers: of `run_calls`, with its float32 graphs, of all parts.
        folder: of the bundle.
    """
    place = folder / FOLDER
    place.mkdir(exist_ok=True)
    named = {f"{i}": _sampled(answer).astype(np.float32) for i, answer in enumerate(answers)}
    with (place / f"{name}.npz").open("wb") as stream:
        np.savez(stream, **named)  # type: ignore[arg-type]


def has_answers(name: str, folder: Path) -> bool:
    """Whether a bundle carries a self-test of a component."""
    return (folder / FOLDER / f"{name}.npz").is_file()


def check(name: str, parts: Iterable[Component], manifest: Manifest, folder: Path) -> Verdict:
    """Holds a component against its bundle's answers.

    Args:
        name: of the component.
        parts: its engines, part by part; each is done with when the next one is asked for.
        manifest: of the bundle.
        folder: of the bundle.

    Raises:
        BundleError: the bundle has no answers for it.
        EngineError: the engine failed.
    """
    if not has_answers(name, folder):
        raise BundleError(f"{folder} carries no self-test of {name}; build it where its float32 reference fits memory")
    built = manifest.components[name]
    results = (result for component in parts for result in run_calls(name, component, manifest.model, built))
    allowed = TOLERANCES[built.precision] + WEIGHTS_MARGIN * (built.weights_error or 0.0)
    return Verdict(name, largest_error(name, results, folder), allowed)


def largest_error(name: str, results: Iterable[NDArray[Any]], folder: Path) -> float:
    """The largest error of what `run_calls` gave for a component, relative to the largest answer of each call.

    Raises:
        BundleError: the answers cannot be read.
    """
    path, error = folder / FOLDER / f"{name}.npz", 0.0
    try:
        with np.load(path, allow_pickle=False) as stored:
            answers = [stored[f"{i}"] for i in range(len(stored.files))]
    except (OSError, ValueError, KeyError) as exc:
        raise BundleError(f"{path} cannot be read ({exc}); build the bundle again") from exc
    for found, expected in zip(results, answers, strict=True):
        error = max(error, _largest_error(found, expected))
    return error


def _largest_error(found: NDArray[Any], expected: NDArray[np.float32]) -> float:
    """Relative to the largest expected value; infinite where a value found is not finite."""
    if found.ndim == expected.ndim:  # the same, or the one token's answer where every token should have it
        expected = np.tile(expected, [size // of for size, of in zip(found.shape, expected.shape, strict=True)])
    else:
        found = _sampled(found)
    worst = float(np.abs(found.astype(np.float64) - expected).max()) / float(np.abs(expected).max() or 1.0)
    return worst if np.isfinite(worst) else float("inf")


def _sampled(array: NDArray[Any]) -> NDArray[Any]:
    """All values, or of many an even choice in one dimension."""
    return array if array.size <= KEPT_VALUES else array.reshape(-1)[:: -(-array.size // KEPT_VALUES)]
