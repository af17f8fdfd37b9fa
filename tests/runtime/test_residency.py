"""Which components stay loaded: as many as fit, decided for each, and never at the cost of whether a request fits."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from t2v_rt import TextToVideoPipeline
from t2v_rt.engines.backends import get_backend
from t2v_rt.engines.bundle.store import open_bundle
from t2v_rt.runtime.components import Components
from t2v_rt.runtime.memory.estimates import StageMemory
from t2v_rt.runtime.memory.plan import ALL, MemoryPlan, make_plan, together_bytes
from tests.conftest import Tiny

SMALL: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 1, "seed": 1}
LARGE: dict[str, Any] = {**SMALL, "height": 64, "width": 96, "num_frames": 9}
MB = 10**6
# Wan2.1 1.3B at 832x480 with 81 frames as plans for all GPUs take it (benchmarks/results/true_size.json), in MB
ENCODE = StageMemory("encode", 9262 * MB, 197 * MB, 0, 94 * MB)
ONE_ENGINE = StageMemory("encode", 1930 * MB, 197 * MB, 0, 19 * MB)
DENOISE = StageMemory("denoise", 2873 * MB, 1108 * MB, 0, 42 * MB)
DECODE = StageMemory("decode", 191 * MB, 613 * MB, 2957 * MB, 121 * MB)
WHOLE = MemoryPlan((ENCODE, DENOISE, DECODE), ONE_ENGINE, (((1, 1), False),), 0, None, reserve_bytes=600 * MB)
BOTH = frozenset({"transformer", "vae_decoder"})


def chosen(plan: MemoryPlan, budget: int) -> MemoryPlan:
    """The first of a plan's choices that keeps to a budget."""
    return next(item for item in plan.choices() if item.peak_bytes <= budget)


# -- the choice --


@pytest.mark.parametrize(
    ("budget", "kept", "peak"),
    [
        (24 * 10**9, ALL, 16_753),
        (8 * 2**30, BOTH, 7_397),
        (8 * 10**9, BOTH, 7_397),
        (6 * 10**9, frozenset[str](), 4_623),
    ],
)
def test_cards_keep_what_they_have_room_for(budget: int, kept: frozenset[str], peak: int) -> None:
    plan = chosen(WHOLE, budget)
    assert plan.kept == kept
    assert plan.peak_bytes == peak * MB
    assert plan.streamed == (kept != ALL)


def test_the_quickest_to_load_again_goes_first_after_the_text_encoder() -> None:
    assert [sorted(plan.kept) for plan in WHOLE.choices()] == [sorted(ALL), sorted(BOTH), ["transformer"], []]
    small = replace(WHOLE, stages=(replace(ENCODE, weights_bytes=MB), DENOISE, replace(DECODE, weights_bytes=10**10)))
    assert [sorted(plan.kept) for plan in small.choices()] == [sorted(ALL), sorted(BOTH), ["vae_decoder"], []]
    assert [sorted(plan.kept) for plan in WHOLE.releasing().choices()] == [[]]


def test_what_a_stage_works_in_serves_the_others_while_no_engine_is_loaded() -> None:
    kept = WHOLE.keeping(BOTH)
    idle = sum(stage.weights_bytes + stage.io_bytes for stage in (DENOISE, DECODE))
    assert kept.peak_bytes == 600 * MB + idle + DECODE.state_bytes + DECODE.context_bytes
    one = WHOLE.keeping({"vae_decoder"})
    assert one.peak_bytes == 600 * MB + DENOISE.total_bytes + DECODE.weights_bytes + DECODE.io_bytes
    small = replace(DECODE, state_bytes=0, context_bytes=0)
    wide = replace(WHOLE, stages=(ENCODE, DENOISE, small)).keeping(BOTH)
    own = ONE_ENGINE.weights_bytes + ONE_ENGINE.io_bytes + ONE_ENGINE.context_bytes
    assert wide.peak_bytes == 600 * MB + idle + max(DENOISE.context_bytes, own)


def test_what_is_kept_does_not_change_whether_a_request_fits(narrow: Tiny) -> None:
    manifest = open_bundle(narrow.bundle).manifest
    shape = manifest.model.latent_shape(1, 64, 96, 9)
    most = make_plan(manifest, shape).peak_bytes
    seen = set()
    for budget in np.linspace(1, most * 1.1, 200, dtype=int).tolist():
        plan = make_plan(manifest, shape, budget=budget)
        seen.add(plan.kept)
        assert plan.fits == (plan.least_bytes <= budget)
        assert plan.peak_bytes <= budget or plan.kept == frozenset()
        if plan.kept != ALL:  # what would keep more does not fit
            fuller = itertools.takewhile(
                lambda item, plan=plan: item.kept != plan.kept,  # type: ignore[misc]
                make_plan(manifest, shape, grid=plan.grid).choices(),
            )
            assert all(item.peak_bytes > budget for item in fuller)
    assert len(seen) == 4


def test_tiles_are_not_made_for_what_stays_loaded(narrow: Tiny) -> None:
    manifest = open_bundle(narrow.bundle).manifest
    shape = manifest.model.latent_shape(1, 64, 96, 9)
    undivided = make_plan(manifest, shape, grid=(1, 1))
    assert make_plan(manifest, shape, budget=undivided.least_bytes).grid == (1, 1)


# -- what runs hold together --


def test_what_runs_take_together_is_the_most_of_all_ways_that_they_meet() -> None:
    chance = random.Random(0)
    subsets = [frozenset(names) for count in range(4) for names in itertools.combinations(sorted(ALL), count)]
    for _ in range(300):
        sizes = [chance.randrange(1, 100) for _ in range(4)]
        stages = tuple(
            StageMemory(name, size, 0, 0, 0) for name, size in zip(("encode", "denoise", "decode"), sizes, strict=False)
        )
        one = StageMemory("encode", min(sizes[0], sizes[3]), 0, 0, 0)
        whole = MemoryPlan(stages, one, (((1, 1), False),), 0, None)
        plans = [whole.keeping(chance.choice(subsets)) for _ in range(chance.randrange(2, 5))]
        kept = frozenset[str]().union(*(plan.kept for plan in plans))
        most = 0
        for meeting in itertools.product(range(3), repeat=len(plans)):  # the stage that each is in
            own, shared = 0, {*kept}
            for plan, index in zip(plans, meeting, strict=True):
                stage = plan.stages[index]
                if stage.name == "encode" and plan.streamed:
                    own += stage.weights_bytes  # each its own engine
                else:
                    shared.add(stage.component)
            weights = {stage.component: stage.weights_bytes for stage in stages}
            most = max(most, own + sum(weights[name] for name in shared))
        assert together_bytes(plans) == most


def test_a_run_of_one_stage_counts_what_may_be_loaded_beside_it() -> None:
    alone = WHOLE.releasing().of_stage("decode")
    assert alone.peak_bytes == 600 * MB + DECODE.total_bytes
    beside = WHOLE.keeping(BOTH).of_stage("decode")
    assert beside.peak_bytes == 600 * MB + DECODE.total_bytes + DENOISE.weights_bytes + DENOISE.io_bytes


# -- in a pipeline --


@pytest.mark.parametrize("kept", [ALL, BOTH, frozenset({"vae_decoder"})], ids=["all", "both", "one"])
def test_a_call_leaves_loaded_what_its_plan_keeps(narrow: Tiny, kept: frozenset[str]) -> None:
    free = TextToVideoPipeline.from_pretrained(narrow.bundle, prompt_cache=False)
    expected = free("a ball", **LARGE).frames
    budget = free.plan(free.stream("a ball", **LARGE).request).keeping(kept).peak_bytes
    pipe = TextToVideoPipeline.from_pretrained(narrow.bundle, prompt_cache=False, vram_budget=budget)
    for prompt in ("a ball", "a cat", "a ball"):
        found = pipe(prompt, **LARGE).frames
        assert set(pipe.stages.components.loaded) == kept
    assert np.array_equal(found, expected)


def test_what_a_larger_video_left_goes_where_the_next_has_no_room_for_it(narrow: Tiny) -> None:
    bundle = open_bundle(narrow.bundle)
    components = Components(bundle, get_backend("onnxruntime"))
    shapes = [bundle.manifest.model.latent_shape(1, *size) for size in ((64, 96, 9), (32, 32, 5))]
    large, small = (make_plan(bundle.manifest, shape) for shape in shapes)
    with components.following(large), components.stage("vae_decoder", large):
        pass
    held = components.held_bytes
    *_, decode = large.stages
    assert held == decode.weights_bytes + decode.io_bytes + decode.context_bytes
    budget = small.beside({"vae_decoder": held - decode.weights_bytes}).peak_bytes
    for left, loaded in ((0, {"vae_decoder"}), (1, set[str]())):
        with components.following(replace(small, budget_bytes=budget - left)):
            assert {*components.loaded} == loaded
    assert components.held_bytes == 0
