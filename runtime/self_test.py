"""A bundle's self-test: a few calls of each component, and what the float32 reference gave for them when it was built.

Builders fuse and reorder, and kernels have been wrong on single GPUs without a word. So a bundle carries the answers of
its own graphs in float32, run by ONNX Runtime on the CPU at build time, and any backend can be held against them.

Plans take only the sizes they were built for, those of whole videos, and are tested at these, each shape profile once:
other sizes would be other kernels. Which calls show a component at work and can be made in float32 on a CPU is for its
family to say.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t2v_rt.engines.bundle.manifest import ComponentSpec, Manifest
from t2v_rt.engines.bundle.model import ModelSpec
from t2v_rt.engines.contract import Component, EngineState
from t2v_rt.errors import BundleError, OutOfMemoryError
from t2v_rt.runtime.families import Call, family_of

logger = logging.getLogger(__name__)
FOLDER = "self_test"  # of the bundle; a file for each component
WEIGHTS_MARGIN = 1.5  # times the error that quantized weights had on the CPU: a GPU rounds other things
KEPT_VALUES = 100_000  # of one output; of a larger one, evenly spaced ones are kept
# Largest error, relative to the largest value of the reference. The float32 bound leaves room for another processor's
# order of sums. Right rounding of half operands costs up to 0.15 % at the true width and 0.6 % in tiny networks, sums
# in half precision cost 2 % and more (benchmarks/results/self_test.json), a wrong kernel tens of percent.
TOLERANCES: Mapping[str, float] = {"fp32": 1e-3, "fp16": 1e-2, "bf16": 6e-2}
Answers = Mapping[str, NDArray[Any]]  # label of a call -> what it gave


@dataclass(frozen=True)
class Verdict:
    """How a component came out.

    Args:
        component: its name.
        error: largest difference from the reference over the reference's largest value, of all calls.
        tolerance: what is allowed.
        untested: labels of calls that were left out, as the device had no memory for them.
    """

    component: str
    error: float
    tolerance: float
    untested: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Made:
    """A call that was made.

    Args:
        call: of the self-test.
        feeds: as the engine took them.
        outputs: all that it gave.
        before: copies of the state's tensors before the call; none unless they were asked for.
        after: and after it. The state itself is not held, as the next call's may need its memory.
    """

    call: Call
    feeds: Mapping[str, NDArray[Any]]
    outputs: Mapping[str, NDArray[Any]]
    before: Mapping[str, NDArray[Any]]
    after: Mapping[str, NDArray[Any]]

    @property
    def result(self) -> NDArray[Any]:
        """What the self-test keeps of its outputs."""
        return self.call.kept(self.outputs[self.call.output])


def make_calls(
    name: str,
    component: Component,
    model: ModelSpec,
    built: ComponentSpec,
    *,
    untested: list[str] | None = None,
    copies_states: bool = False,
) -> Iterator[Made]:
    """Makes the calls of a component, or of a part of it, one after another.

    One state is held at a time, for as long as calls share it.

    Args:
        name: of the component.
        component: loaded; the bundle's own, or its reference.
        model: constants of the model.
        built: what the manifest says of the bundle's own, whose sizes are tested.
        untested: takes the labels of calls that may be left out and for which the device has no memory; None where
            there must be memory for all.
        copies_states: whether states are copied before and after each call.

    Raises:
        OutOfMemoryError: no memory for a call that cannot be left out.
    """
    results: list[NDArray[Any]] = []
    state: EngineState | None = None
    held: tuple[str, str] | None = None  # what the state is of
    lost: tuple[str, str] | None = None  # what the last call without memory was of
    for call in family_of(model).self_test(name, component, model, built, results):
        engine = component[call.role]
        feeds = {spec.name: np.ascontiguousarray(call.feeds[spec.name], spec.numpy_dtype) for spec in engine.inputs}
        rows, columns = next(iter(feeds.values())).shape[-2:]
        place = call.role.partition("_")[0], call.variant.partition(".")[0]
        lacking = untested if call.spare else None
        if lacking is not None and place == lost:
            lacking.append(call.label)
            continue
        try:
            if place != held:
                state = held = None  # before the next one is made, or memory would have to hold both
                if engine.states:
                    state, held = component.new_state(height=rows, width=columns, role_prefix=place[0]), place
            before = state.to_host() if copies_states and state is not None else {}
            outputs = engine.infer(feeds, state)
            after = state.to_host() if copies_states and state is not None else {}
        except OutOfMemoryError as exc:
            if lacking is None:
                raise
            logger.info("the self-test leaves %s out: %s", call.label, str(exc))  # a record would keep the memory
            lacking.append(call.label)
            state, held, lost = None, None, place
            continue
        results.append(outputs[call.output])
        yield Made(call, feeds, outputs, before, after)


def record(name: str, answers: Answers, folder: Path) -> None:
    """Writes what the reference of a component gave into a bundle that is being built.

    Args:
        name: of the component.
        answers: of its calls by its float32 graphs, of all shards.
        folder: of the bundle.
    """
    place = folder / FOLDER
    place.mkdir(exist_ok=True)
    named = {label: _sampled(answer).astype(np.float32) for label, answer in answers.items()}
    with (place / f"{name}.npz").open("wb") as stream:
        np.savez(stream, **named)  # type: ignore[arg-type]


def has_answers(name: str, folder: Path) -> bool:
    """Whether a bundle carries a self-test of a component."""
    return (folder / FOLDER / f"{name}.npz").is_file()


def allowed_error(built: ComponentSpec) -> float:
    """The largest relative error that a component may have."""
    return TOLERANCES[built.precision] + WEIGHTS_MARGIN * (built.weights_error or 0.0)


def check(
    name: str,
    shards: Iterable[Component],
    manifest: Manifest,
    folder: Path,
    watch: Callable[[Made], None] | None = None,
) -> Verdict:
    """Holds a component, or some of its shards, against its bundle's answers.

    Args:
        name: of the component.
        shards: its engines, shard by shard; each is done with when the next one is asked for.
        manifest: of the bundle.
        folder: of the bundle.
        watch: is shown each call that was made, with copies of states; None for nobody.

    Raises:
        BundleError: the bundle has no answers for it.
        EngineError: the engine failed.
    """
    if not has_answers(name, folder):
        raise BundleError(f"{folder} carries no self-test of {name}; build it where its float32 reference fits memory")
    untested: list[str] = []
    built, found = manifest.components[name], dict[str, NDArray[Any]]()
    for shard in shards:
        watched = watch is not None
        for made in make_calls(name, shard, manifest.model, built, untested=untested, copies_states=watched):
            found[made.call.label] = made.result
            if watch is not None:
                watch(made)
    return Verdict(name, largest_error(name, found, folder), allowed_error(built), tuple(untested))


def largest_error(name: str, found: Answers, folder: Path) -> float:
    """The largest error of what a component's calls gave, relative to the largest answer of each call.

    Raises:
        BundleError: the answers cannot be read, or are not those of these calls.
    """
    path = folder / FOLDER / f"{name}.npz"
    try:
        with np.load(path, allow_pickle=False) as stored:
            return max(_largest_error(result, stored[label]) for label, result in found.items())
    except (OSError, ValueError, KeyError) as exc:
        raise BundleError(f"{path} cannot be read ({exc}); build the bundle again") from exc


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
