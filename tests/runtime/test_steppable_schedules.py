"""What `set_timesteps` takes can be stepped to its end, as in diffusers; what cannot is refused there."""

from __future__ import annotations

from itertools import product
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from t2v_rt.errors import RequestError
from t2v_rt.runtime.noise import Generator
from t2v_rt.runtime.schedulers import (
    MODULES,
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
    scheduler_class,
)
from t2v_rt.runtime.schedulers.noise_schedules import linspace
from tests.support import differential
from tests.support.random_settings import ODD, Trial

SHAPE = (1, 3, 2)
diffusers.utils.logging.set_verbosity_error()
TRAINED = (1, 2, 3, 10, 100, 800)
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}


def taken(name: str, settings: dict[str, Any], steps: int) -> bool:
    """Whether a schedule is taken; steps through it where it is."""
    scheduler = scheduler_class(name)(**settings)
    try:
        scheduler.set_timesteps(steps)
    except RequestError:
        return False
    rng, generator = np.random.default_rng(0), Generator(0)
    x = rng.standard_normal(SHAPE).astype(np.float32)
    for t in scheduler.timesteps:
        scheduler.step(rng.standard_normal(SHAPE).astype(np.float32), t, x, generator=generator)
    return True


@pytest.mark.parametrize("name", sorted(MODULES))
def test_what_is_taken_can_be_stepped(name: str) -> None:
    fields = scheduler_class(name).Config.__dataclass_fields__
    spacings = ("linspace", "leading", "trailing") if "timestep_spacing" in fields else (None,)
    count = 0
    for train, spacing in product(TRAINED, spacings):
        settings: dict[str, Any] = {"num_train_timesteps": train}
        if spacing:
            settings |= {"timestep_spacing": spacing, "steps_offset": train % 3 % 2}
        if name == "LCMScheduler":
            settings["original_inference_steps"] = min(50, train)
        few = {1, 2, train // 2, train - 1, train} - {0}
        for steps in sorted(few if train < 100 else {1, 7, *ODD} | ({train} if train == 100 else set())):
            count += taken(name, settings, steps)
    assert count >= 2 * len(TRAINED)


@pytest.mark.parametrize("train", [1, 2, 3, 10])
@pytest.mark.parametrize("name", sorted(MODULES))
def test_few_training_timesteps_beside_diffusers(name: str, train: int) -> None:
    for steps in range(1, train + 2):
        trial = Trial(name, {"num_train_timesteps": train}, {"num_inference_steps": steps}, shape=SHAPE)
        assert not differential.run(trial).failed, trial


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"FlowMatchEulerDiscreteScheduler", "LCMScheduler"}))
def test_a_step_from_timestep_minus_one_is_made_as_diffusers_makes_it(name: str) -> None:
    settings = {"num_train_timesteps": 800, "timestep_spacing": "trailing"}
    scheduler = scheduler_class(name)(**settings)
    scheduler.set_timesteps(29)
    assert scheduler.timesteps[-1] == -1
    outcome = differential.run(Trial(name, settings, {"num_inference_steps": 29}))
    assert outcome.steps == len(scheduler.timesteps)
    assert not outcome.failed


@pytest.mark.parametrize("name", ["DEISMultistepScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_an_offset_past_the_training_range_is_taken_where_sigmas_are_interpolated(name: str) -> None:
    settings = {"num_train_timesteps": 10, "timestep_spacing": "leading", "steps_offset": 2}
    trial = Trial(name, settings, {"num_inference_steps": 4})
    outcome = differential.run(trial)
    assert outcome.steps == 4
    assert not outcome.failed


@pytest.mark.parametrize("solver", [DEISMultistepScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_sigmas_that_coincide_are_refused_before_the_first_step(solver: Any) -> None:
    scheduler = solver(num_train_timesteps=100, timestep_spacing="leading")
    with pytest.raises(RequestError, match=r"cannot make step 2 of 100, from timestep 0: .*; take another number of"):
        scheduler.set_timesteps(100)
    scheduler.set_timesteps(99)


def test_dividing_by_no_signal_is_refused_before_the_first_step() -> None:
    scheduler = DDIMScheduler(**ZERO_SNR, clip_sample=False)
    with pytest.raises(RequestError, match="cannot make step 1 of 10, from timestep 999"):
        scheduler.set_timesteps(10)
    DDIMScheduler(**ZERO_SNR, clip_sample=False, prediction_type="v_prediction").set_timesteps(10)


def test_rehearsing_leaves_no_trace() -> None:
    scheduler = UniPCMultistepScheduler()
    scheduler.set_timesteps(5)
    assert scheduler.step_index == 0
    x = np.ones(SHAPE, np.float32)
    first = scheduler.step(x, scheduler.timesteps[0], x).prev_sample
    scheduler.set_timesteps(5)
    assert np.array_equal(scheduler.step(x, scheduler.timesteps[0], x).prev_sample, first)


@pytest.mark.parametrize("eta", [0.0, 0.3])
@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_thresholding_without_signal_beside_diffusers(eta: float, prediction_type: str) -> None:
    settings = {
        **ZERO_SNR,
        "num_train_timesteps": 800,
        "beta_schedule": "squaredcos_cap_v2",
        "thresholding": True,
        "prediction_type": prediction_type,
    }
    trial = Trial("DDIMScheduler", settings, {"num_inference_steps": 8}, {"eta": eta})
    assert differential.run(trial).step <= differential.TOLERANCE


def test_noise_that_fills_a_step_is_not_rounded_past_it() -> None:
    scheduler = DDIMScheduler(**ZERO_SNR, num_train_timesteps=800, prediction_type="sample")
    scheduler.set_timesteps(8)
    x = np.ones(SHAPE, np.float32)
    result = scheduler.step(x, scheduler.timesteps[0], x, eta=1.0, generator=Generator(0)).prev_sample
    assert np.all(np.isfinite(result))  # diffusers takes the root of -1e-8 here


def test_lcm_is_made_with_few_training_timesteps_and_refuses_its_original_steps_later() -> None:
    scheduler = LCMScheduler(num_train_timesteps=2)
    for schedule in ({"num_inference_steps": 1}, {"timesteps": [1, 0]}):
        with pytest.raises(RequestError, match=r"original_inference_steps is 50; .*: set it to 2 or less"):
            scheduler.set_timesteps(**schedule)
    LCMScheduler(num_train_timesteps=2, original_inference_steps=2).set_timesteps(2)


def test_one_evenly_spaced_value_is_the_first() -> None:
    assert linspace(1.0, 2.0, 1).tolist() == torch.linspace(1.0, 2.0, 1).tolist() == [1.0]


def test_the_comparison_fails_where_one_refuses_what_the_other_steps() -> None:
    schedule = {"num_inference_steps": 3, "mu": 1.0}  # diffusers passes over mu without use_dynamic_shifting
    outcome = differential.run(Trial("FlowMatchEulerDiscreteScheduler", {}, schedule))
    assert outcome.refused
    assert outcome.failed
