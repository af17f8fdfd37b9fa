"""The step cache: what it decides, what it reuses, and what that does to a video."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from t2v_rt import RequestError, TextToVideoPipeline
from t2v_rt.runtime.denoise.step_cache import FIRST_STEPS, StepCache
from t2v_rt.runtime.noise import Generator
from t2v_rt.runtime.schedulers import HeunDiscreteScheduler

Array = NDArray[np.float32]
SHAPE = (2, 3, 2, 4, 4)
TOLERANCE = 1e-6  # of values of size 1


def path(steps: int) -> list[Array]:
    """Inputs of a denoiser on its way from noise to data."""
    noise, data = Generator(0).randn(SHAPE), Generator(1).randn(SHAPE)
    shares = np.arange(steps, dtype=np.float32) / np.float32(steps)
    return [noise * (np.float32(1) - share) + data * share for share in shares]


def output(x: Array, step: int) -> Array:
    """A denoiser whose output moves evenly but for a jump at step 12."""
    result: Array = np.float32(0.3) * x + np.float32(1.0 if step < 12 else 2.0)
    return result


def drive(cache: StepCache, xs: list[Array], passes: int = 2) -> list[bool]:
    """Which steps were reused."""
    reused = []
    for i, x in enumerate(xs):
        found = cache.reuse(i, x, passes)
        if found is None:
            cache.keep(x, [output(x, i), -output(x, i)][:passes])
        else:
            assert len(found) == passes
        reused.append(found is not None)
    return reused


def by_the_paper(threshold: float, xs: list[Array], first: int) -> list[bool]:
    """The decisions as arXiv:2507.02860 states them, step by step."""
    reused: list[bool] = []
    k, error = math.nan, 0.0
    computed: list[int] = []
    for i, x in enumerate(xs):
        skip = False
        if first <= i < len(xs) - 1:
            change = float(np.abs(x - xs[i - 1]).mean())
            error += k * change / float(np.abs(output(xs[computed[-1]], computed[-1])).mean())
            skip = error < threshold
        if not skip:
            error = 0.0
            if computed:
                j = computed[-1]
                k = float(np.abs(output(x, i) - output(xs[j], j)).mean() / np.abs(x - xs[j]).mean())
            computed.append(i)
        reused.append(skip)
    return reused


@pytest.mark.parametrize("threshold", [0.01, 0.03, 0.1, 0.5, 100.0])
def test_the_decisions_are_those_of_the_paper(threshold: float) -> None:
    xs = path(20)
    cache = StepCache(threshold, len(xs))
    assert drive(cache, xs) == by_the_paper(threshold, xs, first=4)
    assert cache.skipped == 2 * sum(by_the_paper(threshold, xs, first=4))


def test_first_and_last_steps_are_always_computed() -> None:
    for steps in (1, 2, 3, 4, 5, 20, 50):
        reused = drive(StepCache(1e9, steps), path(steps))
        first = max(FIRST_STEPS, math.ceil(0.2 * steps))
        assert reused == [first <= i < steps - 1 for i in range(steps)]


def test_what_is_reused_is_the_input_and_the_last_difference() -> None:
    xs = path(20)
    cache = StepCache(1e9, 20)
    drive(cache, xs[:4])
    found = cache.reuse(4, xs[4], 2)
    assert found is not None
    for sign, prediction in zip((1, -1), found, strict=True):
        assert np.abs(prediction - (xs[4] + sign * output(xs[3], 3) - xs[3])).max() < TOLERANCE


def test_a_branch_that_was_never_computed_is_not_reused() -> None:
    xs = path(20)
    cache = StepCache(1e9, 20)
    drive(cache, xs[:4], passes=1)
    assert cache.reuse(4, xs[4], 1) is not None
    assert cache.reuse(5, xs[5], 2) is None


def test_inputs_that_stand_still_and_outputs_of_zero() -> None:
    xs = [np.ones(SHAPE, np.float32)] * 10
    assert not any(drive(StepCache(0.1, 10), xs))  # no change of the input, no rate: nothing can be foretold
    cache = StepCache(0.1, 20)
    for i, x in enumerate(path(20)):
        assert cache.reuse(i, x, 1) is None
        cache.keep(x, [np.zeros(SHAPE, np.float32)])


# -- in the pipeline ---------------------------------------------------------------------------------------------------


def latents(pipe: TextToVideoPipeline, **settings: Any) -> Any:
    return pipe("a red ball", "lazy dog", **{"seed": 5, "output_type": "latent", "num_inference_steps": 10, **settings})


def test_off_is_off(pipe: TextToVideoPipeline) -> None:
    plain = latents(pipe)
    for off in (None, 0, 0.0):
        out = latents(pipe, step_cache=off)
        assert out.frames.tobytes() == plain.frames.tobytes()
        assert out.settings == plain.settings
        assert out.skipped_calls == 0


def test_skipped_steps_are_told(pipe: TextToVideoPipeline) -> None:
    plain, out = latents(pipe), latents(pipe, step_cache=1e9)
    assert out.step_calls == (2, 2, 2, 0, 0, 0, 0, 0, 0, 2)
    assert out.skipped_calls == 12
    assert out.settings["step_cache"] == 1e9
    assert np.all(np.isfinite(out.frames))
    assert not np.array_equal(out.frames, plain.frames)
    assert latents(pipe, step_cache=1e9).frames.tobytes() == out.frames.tobytes()
    assert latents(pipe, step_cache=1e9, guidance_scale=1.0).skipped_calls == 6
    stream = pipe.stream("a red ball", seed=5, num_inference_steps=10, step_cache=1e9)
    stream.sample()
    assert stream.skipped_calls == 12


def test_the_threshold_bounds_the_error(pipe: TextToVideoPipeline) -> None:
    plain = latents(pipe, num_inference_steps=20).frames
    outs = [latents(pipe, num_inference_steps=20, step_cache=threshold) for threshold in (0.4, 0.7, 1.5)]
    skipped = [out.skipped_calls for out in outs]
    errors = [float(np.abs(out.frames - plain).mean()) for out in outs]
    assert 0 < skipped[0] < skipped[2]
    assert skipped == sorted(skipped)
    assert errors == sorted(errors)


def test_with_an_interval_and_with_zero_init(pipe: TextToVideoPipeline) -> None:
    out = latents(pipe, step_cache=1e9, guidance_interval=(0.5, 0.8))
    assert out.step_calls == (1, 1, 1, 0, 0, 2, 0, 0, 0, 1)  # the first guided step has nothing to reuse
    assert out.skipped_calls == 2 + 2 * 2 + 1
    assert latents(pipe, step_cache=1e9, cfg_zero_star=True, zero_init_steps=2).step_calls[:6] == (0, 0, 2, 2, 0, 0)


def test_another_prompt_in_the_callback_is_computed(pipe: TextToVideoPipeline) -> None:
    other = pipe.encode_prompt(["green cat"])

    def change(_: Any, step: int, t: float, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_embeds": other} if step == 4 else tensors

    out = latents(pipe, step_cache=1e9, callback_on_step_end=change)
    assert out.step_calls == (2, 2, 2, 0, 0, 2, 2, 0, 0, 2)


def test_a_sampler_with_two_predictions_a_step(pipe: TextToVideoPipeline) -> None:
    saved = pipe.scheduler
    pipe.scheduler = HeunDiscreteScheduler()
    try:
        plain = latents(pipe, num_inference_steps=6)
        out = latents(pipe, num_inference_steps=6, step_cache=1e9, guidance_interval=(0.0, 1.0))
    finally:
        pipe.scheduler = saved
    assert plain.step_calls == (2,) * 11
    assert out.step_calls == (2, 2, 2, 0, 0, 0, 0, 0, 0, 0, 2)


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), True, "0.1"])
def test_what_is_refused(pipe: TextToVideoPipeline, value: Any) -> None:
    with pytest.raises(RequestError, match=r"step_cache is .*; expected a finite number of 0 or more"):
        pipe("a ball", step_cache=value)
