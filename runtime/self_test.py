"""A bundle's self-test: a few calls of each component, and what the float32 reference gave for them when it was built.

Builders fuse and reorder, and kernels have been wrong on single GPUs without a word. So a bundle carries the answers of
its own graphs in float32, run by ONNX Runtime on the CPU at build time, and any backend can be held against them.

Plans take only the sizes they were built for, those of whole videos, and are tested at these: other sizes would be
other kernels. Which calls show a component at work and can be made in float32 on a CPU is for its family to say.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t2v_rt.engines.bundle.manifest import ComponentSpec, Manifest
from t2v_rt.engines.bundle.model import ModelSpec
from t2v_rt.engines.contract import Component, EngineState
from t2v_rt.errors import BundleError
from t2v_rt.runtime.families import family_of

FOLDER = "self_test"  # of the bundle; a file for each component
WEIGHTS_MARGIN = 1.5  # times the error that quantized weights had on the CPU: a GPU rounds other things
KEPT_VALUES = 100_000  # of one output; of a larger one, evenly spaced ones are kept
# Largest error, relative to the largest value of the reference. The float32 bound leaves room for another processor's
# order of sums, the half one for a dozen roundings of operands in depth; a wrong kernel is off by tens of percent.
TOLERANCES: Mapping[str, float] = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 6e-2}


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
    for call in family_of(model).self_test(name, component, model, built, results):
        engine, role_prefix = component[call.role], call.role.partition("_")[0]
        feeds = {spec.name: np.ascontiguousarray(call.feeds[spec.name], spec.numpy_dtype) for spec in engine.inputs}
        if engine.states and role_prefix not in states:
            rows, columns = next(iter(feeds.values())).shape[-2:]
            states[role_prefix] = component.new_state(height=rows, width=columns, role_prefix=role_prefix)
        results.append(engine.infer(feeds, states.get(role_prefix))[call.output])
    return results


def record(name: str, answers: Sequence[NDArray[Any]], folder: Path) -> None:
    """Writes what the reference of a component gave into a bundle that is being built.

    Args:
        name: of the component.
        answers: of `run_calls`, with its float32 graphs, of all shards.
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


def check(name: str, shards: Iterable[Component], manifest: Manifest, folder: Path) -> Verdict:
    """Holds a component against its bundle's answers.

    Args:
        name: of the component.
        shards: its engines, shard by shard; each is done with when the next one is asked for.
        manifest: of the bundle.
        folder: of the bundle.

    Raises:
        BundleError: the bundle has no answers for it.
        EngineError: the engine failed.
    """
    if not has_answers(name, folder):
        raise BundleError(f"{folder} carries no self-test of {name}; build it where its float32 reference fits memory")
    built = manifest.components[name]
    results = (result for component in shards for result in run_calls(name, component, manifest.model, built))
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
