"""The samplers against diffusers, step by step, and what they refuse."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from t2v_rt.errors import RequestError
from t2v_rt.runtime.noise import Generator
from t2v_rt.runtime.schedulers import (
    FlowMatchEulerDiscreteScheduler,
    Scheduler,
    UniPCMultistepScheduler,
    available_schedulers,
    get_scheduler,
)

STEP_TOLERANCE = 1e-6  # relative to the largest value, at the settings Wan is used with
# At high shift and many steps UniPC's lambdas nearly coincide; their float32 differences, the reference's too, then
# carry few digits, and order 3 solves a system of them.
HARD_TOLERANCE = 2e-5
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SHAPE = (1, 4, 2, 4, 6)


def largest_step_error(ours: Scheduler[Any], theirs: Any, steps: int, seed: int) -> float:
    """Steps both along the reference's own path; largest relative error of any step."""
    rng = np.random.default_rng(seed)
    ours.set_timesteps(steps)
    theirs.set_timesteps(steps)
    theirs.set_begin_index(0)
    assert ours.timesteps.dtype == theirs.timesteps.numpy().dtype
    assert np.array_equal(ours.timesteps, theirs.timesteps.numpy())
    assert np.array_equal(ours.sigmas, theirs.sigmas.numpy())
    sample, worst = rng.standard_normal(SHAPE).astype(np.float32), 0.0
    for i in range(steps):
        prediction = rng.standard_normal(SHAPE).astype(np.float32)
        before = sample.copy(), prediction.copy()
        found = ours.step(prediction, ours.timesteps[i], sample).prev_sample
        assert np.array_equal(sample, before[0])
        assert np.array_equal(prediction, before[1])
        expected = theirs.step(
            torch.from_numpy(prediction), theirs.timesteps[i], torch.from_numpy(sample.copy()), return_dict=False
        )[0].numpy()
        worst = max(worst, float(np.abs(found - expected).max() / np.abs(expected).max()))
        sample = expected.copy()
    return worst


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("steps", [1, 2, 10, 50])
@pytest.mark.parametrize("solver_type", ["bh1", "bh2"])
def test_unipc_as_wan_uses_it(shift: float, steps: int, solver_type: str) -> None:
    settings = {**FLOW, "flow_shift": shift, "solver_type": solver_type}
    ours, theirs = UniPCMultistepScheduler(**settings), diffusers.UniPCMultistepScheduler(**settings)
    assert largest_step_error(ours, theirs, steps, steps) < STEP_TOLERANCE


def test_unipc_over_random_settings() -> None:
    rng = np.random.default_rng(0)
    for trial in range(60):
        settings = {
            **FLOW,
            "flow_shift": float(rng.choice([1.0, 3.0, 8.0, 12.0])),
            "solver_order": int(rng.integers(1, 4)),
            "solver_type": str(rng.choice(["bh1", "bh2"])),
            "disable_corrector": [0, 1] if rng.integers(2) else [],
        }
        ours, theirs = UniPCMultistepScheduler(**settings), diffusers.UniPCMultistepScheduler(**settings)
        error = largest_step_error(ours, theirs, int(rng.integers(1, 101)), trial)
        assert error < HARD_TOLERANCE, settings


@pytest.mark.parametrize("steps", [1, 3, 25, 100])
@pytest.mark.parametrize("shift", [1.0, 3.0, 12.0])
def test_flow_match_euler(shift: float, steps: int) -> None:
    ours = FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    assert largest_step_error(ours, theirs, steps, steps) < STEP_TOLERANCE


@pytest.mark.parametrize("settings", [{"sigmas": [1.0, 0.6, 0.2]}, {"timesteps": [1000.0, 750.0, 250.0]}])
def test_custom_schedules_of_flow_match_euler(settings: dict[str, list[float]]) -> None:
    ours = FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours.set_timesteps(**settings)  # type: ignore[arg-type]
    theirs.set_timesteps(**settings)
    assert np.allclose(ours.sigmas, theirs.sigmas.numpy(), atol=1e-7)
    assert np.allclose(ours.timesteps, theirs.timesteps.numpy(), rtol=1e-7)


def test_float16_in_gives_float16_out() -> None:
    scheduler = get_scheduler("unipc", FLOW)
    scheduler.set_timesteps(3)
    half = Generator(0).randn(SHAPE, np.float16)
    assert scheduler.step(half, scheduler.timesteps[0], half).prev_sample.dtype == np.float16


def test_configs_are_mappings_that_any_class_reads() -> None:
    unipc = UniPCMultistepScheduler(flow_shift=3.0)
    assert dict(unipc.config)["flow_shift"] == unipc.config.flow_shift == 3.0
    assert UniPCMultistepScheduler.from_config(unipc.config, flow_shift=5.0).config.flow_shift == 5.0
    assert isinstance(FlowMatchEulerDiscreteScheduler.from_config(unipc.config), FlowMatchEulerDiscreteScheduler)
    saved = {**FLOW, "_class_name": "UniPCMultistepScheduler", "_diffusers_version": "0", "beta_start": 0.1}
    assert UniPCMultistepScheduler.from_config(saved).config.use_flow_sigmas


def test_a_shift_keeps_its_value_under_either_name() -> None:
    assert get_scheduler("euler", {"flow_shift": 7.0}).config.shift == 7.0
    assert get_scheduler("UniPCMultistepScheduler", {**FLOW, "shift": 7.0}).config.flow_shift == 7.0


def test_known_names() -> None:
    assert {"unipc", "euler"} <= set(available_schedulers())
    with pytest.raises(RequestError, match=r"unknown scheduler 'foo'.*euler, unipc"):
        get_scheduler("foo")


@pytest.mark.parametrize("steps", [0, -1, 1.5, None, True])
def test_bad_step_counts(steps: Any) -> None:
    with pytest.raises(RequestError, match="num_inference_steps"):
        get_scheduler("unipc").set_timesteps(steps)


def test_bad_settings() -> None:
    for settings in ({"nonsense": 1}, {"flow_shift": "3"}, {"flow_shift": float("nan")}, {"solver_type": "bh3"}):
        with pytest.raises(RequestError):
            UniPCMultistepScheduler(**settings)
    with pytest.raises(RequestError, match="prediction_type"):
        UniPCMultistepScheduler(prediction_type="epsilon")
    with pytest.raises(RequestError, match="no setting 'nonsense'"):
        UniPCMultistepScheduler.from_config({}, nonsense=1)


def test_stepping_too_far_is_refused() -> None:
    scheduler = get_scheduler("euler")
    with pytest.raises(RequestError, match="set_timesteps has not been called"):
        scheduler.step(np.zeros(3, np.float32), 0.0, np.zeros(3, np.float32))
    scheduler.set_timesteps(1)
    scheduler.step(np.zeros(3, np.float32), scheduler.timesteps[0], np.zeros(3, np.float32))
    with pytest.raises(RequestError, match="all steps are made"):
        scheduler.step(np.zeros(3, np.float32), scheduler.timesteps[0], np.zeros(3, np.float32))
