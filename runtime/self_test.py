"""A bundle's self-test: a few calls of each component, and what the float32 reference gave for them when it was built.

Builders fuse and reorder, and kernels have been wrong on single GPUs without a word. So a bundle carries the answers of
its own graphs in float32, run by ONNX Runtime on the CPU at build time, and any backend can be held against them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t2v_rt.engines.contract import Component, EngineState
from t2v_rt.engines.manifest import Manifest, ModelSpec
from t2v_rt.errors import BundleError
from t2v_rt.runtime import wan
from t2v_rt.runtime.noise import Generator

Arrays = dict[str, NDArray[Any]]
FOLDER = "self_test"  # of the bundle; a file for each component
TOKENS = 8  # of the prompt
ROWS, COLUMNS, FRAMES = 4, 6, 2  # of the latents
TIMESTEP = 500.0
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


def run_calls(name: str, component: Component, model: ModelSpec) -> list[NDArray[Any]]:
    """Makes the calls of a component, or of a part of it, one after another and returns what each gave.

    Args:
        name: of the component.
        component: loaded.
        model: constants of the model.
    """
    results: list[NDArray[Any]] = []
    states: dict[str, EngineState] = {}
    for call in _calls(name, model, results, component):
        engine, part = component[call.role], call.role.partition("_")[0]
        feeds = {spec.name: call.feeds[spec.name].astype(spec.numpy_dtype) for spec in engine.inputs}
        if engine.states and part not in states:
            rows, columns = next(iter(feeds.values())).shape[-2:]
            states[part] = component.new_state(height=rows, width=columns, part=part)
        results.append(engine.infer(feeds, states.get(part))[call.output])
    return results


def _calls(name: str, model: ModelSpec, results: Sequence[NDArray[Any]], component: Component) -> Iterator[Call]:
    """The calls of a component; later ones may take what earlier ones gave."""
    noise = Generator(0)
    feeds: Arrays
    if name == "text_encoder":
        buckets = wan.relative_buckets(TOKENS, model.relative_buckets, model.relative_max_distance)
        for role in component:  # all are fed alike: what one gives would carry its error into the next
            hidden = Generator(0).randn((1, TOKENS, model.text_dim))
            feeds = {"hidden_states": hidden, "relative_buckets": buckets}
            yield Call(role, feeds, component[role].outputs[0].name)
    elif name == "transformer":
        feeds = {
            "hidden_states": noise.randn((1, model.latent_channels, FRAMES, ROWS, COLUMNS)),
            "timestep": np.array([TIMESTEP]),
            "encoder_hidden_states": noise.randn((1, TOKENS, model.text_dim)),
            "encoder_attention_bias": np.zeros((1, TOKENS)),
        }
        yield Call("model", feeds, "noise_pred")
    else:
        for when in ("first", "next"):
            yield Call(f"head_{when}", {"latents": noise.randn((1, model.latent_channels, ROWS, COLUMNS))}, "features")
            yield Call("tail", {"features": results[-1][:1]}, "frames")


def record(name: str, answers: Sequence[NDArray[Any]], folder: Path) -> None:
    """Writes what the reference of a component gave into a bundle that is being built.

    Args:
        name: of the component.
        answers: of `run_calls`, with its float32 graphs, of all parts.
        folder: of the bundle.
    """
    place = folder / FOLDER
    place.mkdir(exist_ok=True)
    named = {f"{i}": answer.astype(np.float32) for i, answer in enumerate(answers)}
    with (place / f"{name}.npz").open("wb") as stream:
        np.savez(stream, **named)  # type: ignore[arg-type]


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
    path = folder / FOLDER / f"{name}.npz"
    if not path.is_file():
        raise BundleError(f"{folder} carries no self-test of {name}; build it where its float32 reference fits memory")
    try:
        with np.load(path, allow_pickle=False) as stored:
            answers = [stored[f"{i}"] for i in range(len(stored.files))]
    except (OSError, ValueError, KeyError) as exc:
        raise BundleError(f"{path} cannot be read ({exc}); build the bundle again") from exc
    error = 0.0
    results = [result for component in parts for result in run_calls(name, component, manifest.model)]
    for found, expected in zip(results, answers, strict=True):
        difference = np.abs(found.astype(np.float64) - expected)
        worst = float(difference.max()) / float(np.abs(expected).max() or 1.0)
        error = max(error, worst if np.isfinite(worst) else float("inf"))
    return Verdict(name, error, TOLERANCES[manifest.components[name].precision])
