"""The samplers against diffusers, step by step, and what they refuse."""

from __future__ import annotations

import inspect
import subprocess
import sys
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
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
    available_schedulers,
    get_scheduler,
    scheduler_class,
)
from t2v_rt.runtime.schedulers.blockwise import BLOCK, blockwise
from t2v_rt.runtime.schedulers.noise_schedules import beta_quantile
from tests.support import differential
from tests.support.random_settings import Trial

STEP_TOLERANCE = 1e-6  # relative to the largest value, at the settings Wan is used with
TRIALS = 25  # of each class; the whole table is `python -m tests.support.differential`
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SHAPE = (1, 4, 2, 4, 6)


def arrays(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal(shape).astype(np.float32), rng.standard_normal(shape).astype(np.float32)


# -- numbers --


@pytest.mark.parametrize("name", sorted(MODULES))
def test_random_settings_beside_diffusers(name: str) -> None:
    diffusers.utils.logging.set_verbosity_error()
    refused = 0
    for trial, outcome in differential.trials(name, TRIALS):
        assert not outcome.failed, (outcome, trial)
        refused += outcome.refused
    assert refused <= TRIALS / 2


def test_the_differential_test_can_fail() -> None:
    trial = next(differential.trials("DDIMScheduler", 1))[0]
    assert trial.name == "DDIMScheduler"
    ours = DDIMScheduler(**{**trial.settings, "beta_end": 0.03})
    ours.set_timesteps(**trial.schedule)
    theirs = differential.Reference(trial)
    m, x = arrays()
    found = ours.step(m, ours.timesteps[0], x).prev_sample
    assert np.abs(found - theirs.step(0, m, x)).max() > 100 * differential.TOLERANCE


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("steps", [1, 2, 10, 50])
@pytest.mark.parametrize("solver_type", ["bh1", "bh2"])
def test_unipc_as_wan_uses_it(shift: float, steps: int, solver_type: str) -> None:
    last = {"bh1": "sigma_min", "bh2": "zero"}[solver_type]  # the reference's bh1 gives NaN at a last sigma of 0
    settings = {**FLOW, "flow_shift": shift, "solver_type": solver_type, "final_sigmas_type": last}
    trial = Trial("UniPCMultistepScheduler", settings, {"num_inference_steps": steps})
    outcome = differential.run(trial)
    assert outcome.timesteps == outcome.sigmas == 0
    assert outcome.step < STEP_TOLERANCE


@pytest.mark.parametrize("name", sorted(MODULES))
def test_same_settings_and_defaults_as_diffusers(name: str) -> None:
    theirs = inspect.signature(getattr(diffusers, name).__init__).parameters
    defaults = {key: item.default for key, item in theirs.items() if key != "self"}
    ours = {key: list(value) if value == () else value for key, value in scheduler_class(name)().config.items()}
    assert ours == defaults


def test_bh1_ends_at_a_last_sigma_of_zero() -> None:
    scheduler = UniPCMultistepScheduler(**FLOW, solver_type="bh1")
    scheduler.set_timesteps(2)
    m, x = arrays()
    x = scheduler.step(m, scheduler.timesteps[0], x).prev_sample
    assert np.all(np.isfinite(scheduler.step(m, scheduler.timesteps[1], x).prev_sample))


@pytest.mark.filterwarnings("ignore:.*__array:DeprecationWarning")
@pytest.mark.parametrize("name", sorted(MODULES))
def test_add_noise(name: str) -> None:
    ours, theirs = scheduler_class(name)(), getattr(diffusers, name)()
    ours.set_timesteps(20)
    theirs.set_timesteps(20)
    x, noise = arrays(shape=(2, 3, 4))
    at = ours.timesteps[[3, 12]]
    function = theirs.add_noise if hasattr(theirs, "add_noise") else None
    if function is None:
        expected = theirs.scale_noise(torch.from_numpy(x), torch.from_numpy(at), torch.from_numpy(noise))
        assert np.allclose(ours.scale_noise(x, at, noise), expected.numpy(), atol=1e-6)  # type: ignore[attr-defined]
    else:
        expected = function(torch.from_numpy(x), torch.from_numpy(noise), torch.from_numpy(at))
    assert np.allclose(ours.add_noise(x, noise, at), expected.numpy(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_steps_change_no_input_and_keep_float16(name: str) -> None:
    scheduler = scheduler_class(name)(**({"skip_prk_steps": True} if name == "PNDMScheduler" else {}))
    scheduler.set_timesteps(5)
    generator = Generator(0)
    m, x = (array.astype(np.float16) for array in arrays())
    for t in scheduler.timesteps[:3]:
        before = m.copy(), x.copy()
        result = scheduler.step(m, t, x, generator=generator).prev_sample
        assert result.dtype == np.float16
        assert np.array_equal(m, before[0])
        assert np.array_equal(x, before[1])
        x = result


def test_one_generator_for_each_video() -> None:
    settings = {"stochastic_sampling": True}
    ours = FlowMatchEulerDiscreteScheduler(**settings)
    ours.set_timesteps(3)
    m, x = arrays(shape=(2, 4, 2, 4, 6))
    both = ours.copy().step(m, ours.timesteps[0], x, generator=[Generator(5), Generator(6)]).prev_sample
    second = ours.copy().step(m[1:], ours.timesteps[0], x[1:], generator=Generator(6)).prev_sample
    assert np.array_equal(both[1:], second)


@pytest.mark.filterwarnings("ignore:.*__array:DeprecationWarning")
def test_a_step_may_begin_in_the_middle() -> None:
    trial = Trial("DPMSolverMultistepScheduler", {}, {"num_inference_steps": 10})
    ours, theirs = DPMSolverMultistepScheduler(), differential.Reference(trial)
    ours.set_timesteps(10)
    theirs.scheduler.set_begin_index(4)
    m, x = arrays()
    for i in range(4, 10):
        found = ours.step(m, ours.timesteps[i], x).prev_sample
        assert np.allclose(found, theirs.step(i, m, x), rtol=1e-5, atol=1e-6)


def test_beta_quantiles() -> None:
    stats = pytest.importorskip("scipy.stats")
    p = np.linspace(0, 1, 201)
    found = np.array([beta_quantile(value, 0.6) for value in p.tolist()])
    assert np.abs(found - stats.beta.ppf(p, 0.6, 0.6)).max() < 1e-14


def test_blocks_cover_everything_and_refuse_float64() -> None:
    x = np.arange(2 * BLOCK + 7, dtype=np.float32).reshape(1, -1)
    assert np.array_equal(blockwise(lambda a, b: a + b, x, x[:, ::-1]), x + x[:, ::-1])
    with pytest.raises(TypeError):
        blockwise(lambda a: a * np.float64(2), x)


# -- settings --


def test_configs_are_mappings_that_any_class_reads() -> None:
    unipc = UniPCMultistepScheduler(flow_shift=3.0)
    assert dict(unipc.config)["flow_shift"] == unipc.config.flow_shift == 3.0
    assert UniPCMultistepScheduler.from_config(unipc.config, flow_shift=5.0).config.flow_shift == 5.0
    assert isinstance(FlowMatchEulerDiscreteScheduler.from_config(unipc.config), FlowMatchEulerDiscreteScheduler)
    saved = {**FLOW, "_class_name": "UniPCMultistepScheduler", "_diffusers_version": "0", "snr_shift_scale": 0.1}
    assert UniPCMultistepScheduler.from_config(saved).config.use_flow_sigmas


def test_words_of_sibling_classes_are_translated_when_saved_and_refused_when_given() -> None:
    unipc = UniPCMultistepScheduler().config
    assert DPMSolverMultistepScheduler.from_config(unipc).config.solver_type == "midpoint"
    assert DEISMultistepScheduler.from_config(DPMSolverMultistepScheduler().config).config.algorithm_type == "deis"
    with pytest.raises(RequestError, match="solver_type is 'bh2'"):
        DPMSolverMultistepScheduler.from_config(unipc, solver_type="bh2")


def test_a_config_is_read_from_lists_and_arrays_and_keeps_no_reference() -> None:
    betas = np.linspace(0.01, 0.02, 10)
    config = DDPMScheduler(num_train_timesteps=10, trained_betas=betas).config
    betas[:] = 0
    assert config.trained_betas == tuple(np.linspace(0.01, 0.02, 10))
    assert UniPCMultistepScheduler(disable_corrector=[0]).config.disable_corrector == (0,)


def test_settings_are_plain_json_values() -> None:
    settings = DPMSolverMultistepScheduler().settings()
    assert settings["_class_name"] == "DPMSolverMultistepScheduler"
    assert settings["lambda_min_clipped"] == "-inf"


def test_a_shift_keeps_its_value_under_either_name() -> None:
    assert get_scheduler("euler", {"flow_shift": 7.0}).config.shift == 7.0
    assert get_scheduler("UniPCMultistepScheduler", {**FLOW, "shift": 7.0}).config.flow_shift == 7.0
    saved = FlowMatchEulerDiscreteScheduler(shift=7.0).settings()
    carried = get_scheduler("dpm++", saved).config
    assert (carried.flow_shift, carried.prediction_type, carried.use_flow_sigmas) == (7.0, "flow_prediction", True)


def test_short_names() -> None:
    assert {"unipc", "euler", "euler-a", "ddim", "ddpm", "dpm++", "dpm++-karras", "heun", "lcm"} <= set(
        available_schedulers()
    )
    for name in available_schedulers():
        get_scheduler(name).set_timesteps(10)
    assert get_scheduler("dpm++-karras").config.use_karras_sigmas
    assert isinstance(get_scheduler("euler", {"prediction_type": "epsilon"}), EulerDiscreteScheduler)
    assert isinstance(get_scheduler("euler", FLOW), FlowMatchEulerDiscreteScheduler)
    assert isinstance(get_scheduler("lcm"), LCMScheduler)
    assert get_scheduler("lcm", FLOW).config.stochastic_sampling
    with pytest.raises(RequestError, match=r"unknown scheduler 'foo'.*euler, euler-a, heun"):
        get_scheduler("foo")


@pytest.mark.parametrize("name", ["ddim", "ddpm", "euler-a", "heun", "pndm", "cogvideox-ddim", "cogvideox-dpm"])
def test_samplers_that_cannot_fit_a_flow_model_say_so(name: str) -> None:
    with pytest.raises(RequestError, match=r"cannot sample a flow model.*deis, dpm\+\+.*unipc"):
        get_scheduler(name, {**FLOW, "flow_shift": 3.0})


# -- bad values --


@pytest.mark.parametrize("steps", [0, -1, 1.5, None, True, 10**6, "3"])
@pytest.mark.parametrize("name", ["unipc", "ddim", "euler"])
def test_bad_step_counts(name: str, steps: Any) -> None:
    with pytest.raises(RequestError, match="num_inference_steps"):
        get_scheduler(name).set_timesteps(steps)


BAD_SETTINGS = [
    (UniPCMultistepScheduler, {"nonsense": 1}, "no setting 'nonsense'"),
    (UniPCMultistepScheduler, {"flow_shift": "3"}, "flow_shift is '3'; expected a finite float"),
    (UniPCMultistepScheduler, {"flow_shift": float("nan")}, "flow_shift is nan"),
    (UniPCMultistepScheduler, {"solver_type": "bh3"}, "solver_type is 'bh3'; expected one of 'bh1', 'bh2'"),
    (UniPCMultistepScheduler, {"solver_order": 4}, "solver_order is 4"),
    (UniPCMultistepScheduler, {"prediction_type": "flow_prediction", "predict_x0": False}, "predict_x0 False"),
    (UniPCMultistepScheduler, {"use_karras_sigmas": True, "use_beta_sigmas": True}, "exclude each other"),
    (UniPCMultistepScheduler, {"shift_terminal": 0.1}, "shift_terminal"),
    (DDIMScheduler, {"prediction_type": "flow"}, "prediction_type is 'flow'; expected one of 'epsilon', 'sample'"),
    (DDIMScheduler, {"beta_start": 2.0}, "beta_start is 2.0"),
    (DDIMScheduler, {"beta_schedule": "cosine"}, "beta_schedule is 'cosine'"),
    (DDIMScheduler, {"trained_betas": [0.1]}, "trained_betas has 1 values"),
    (DDIMScheduler, {"trained_betas": ["a"]}, "an item of trained_betas is 'a'"),
    (DDIMScheduler, {"clip_sample": 1}, "clip_sample is 1; expected bool"),
    (DDPMScheduler, {"variance_type": "fixed_large_log"}, "variance_type is 'fixed_large_log'"),
    (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver"}, "final_sigmas_type is 'zero'"),
    (DPMSolverMultistepScheduler, {**FLOW, "use_karras_sigmas": True}, "use_flow_sigmas and use_karras_sigmas"),
    (
        DPMSolverMultistepScheduler,
        {"algorithm_type": "sde-dpmsolver", "final_sigmas_type": "sigma_min", "solver_order": 3},
        "solver_order is 3",
    ),
    (FlowMatchEulerDiscreteScheduler, {"shift": 0.0}, "shift 0.0"),
]


@pytest.mark.parametrize(("cls", "settings", "message"), BAD_SETTINGS)
def test_bad_settings(cls: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        cls(**settings)
    with pytest.raises(RequestError, match=message):
        cls.from_config({}, **settings)


BAD_SCHEDULES = [
    ("ddpm", {"timesteps": [1, 5, 9]}, r"timesteps are \[1, 5, 9\]; expected a list of numbers that falls"),
    ("ddpm", {"timesteps": [1000, 5]}, "at most 999"),
    ("ddpm", {"timesteps": []}, r"timesteps are \[\]"),
    ("ddpm", {"timesteps": "abc"}, "timesteps are abc"),
    ("ddpm", {"timesteps": [9, 5], "num_inference_steps": 3}, "2 timesteps and num_inference_steps 3"),
    ("ddpm", {"sigmas": [1.0, 0.5]}, "takes no sigmas"),
    ("ddim", {"timesteps": [9, 5]}, "takes no timesteps"),
    ("ddim", {"num_inference_steps": 1001}, "trained on 1000 timesteps only"),
    ("euler", {"timesteps": [9.0, 5.0], "sigmas": [1.0, 0.5]}, "sigmas and timesteps were both given"),
    ("euler", {"sigmas": ["a"]}, "sigmas are"),
    ("euler", {"sigmas": [2.0, 1.0]}, "at most 1 "),
    ("euler", {"sigmas": [0.5, float("nan")]}, "sigmas are"),
    ("euler", {"num_inference_steps": 3, "mu": 1.0}, "mu goes with use_dynamic_shifting"),
    ("euler", {"num_inference_steps": 3, "mu": float("nan")}, "mu is nan"),
    ("unipc", {"sigmas": [1.0, 0.5]}, "sigmas are taken with use_flow_sigmas"),
    ("dpm++-karras", {"timesteps": [9, 5]}, "timesteps do not go with use_karras_sigmas"),
    ("lcm", {"num_inference_steps": 51}, "distilled on original_inference_steps, 50"),
    ("pndm", {"num_inference_steps": 3}, "takes 4 or more"),
]


@pytest.mark.parametrize(("name", "schedule", "message"), BAD_SCHEDULES)
def test_bad_schedules(name: str, schedule: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        get_scheduler(name).set_timesteps(**schedule)


def test_schedules_past_the_training_range_are_refused() -> None:
    with pytest.raises(RequestError, match="trained on 0 to 999"):
        DDIMScheduler(steps_offset=5).set_timesteps(1000)


def test_a_last_step_that_divides_by_zero_is_refused() -> None:
    scheduler = UniPCMultistepScheduler(**FLOW, lower_order_final=False)
    with pytest.raises(RequestError, match="lower_order_final is False"):
        scheduler.set_timesteps(5)


M, X = arrays()
NAN = np.where(np.arange(6) == 2, np.float32(np.nan), M)
BAD_STEPS = [
    ("ddim", (M, X), {"eta": 1.5}, "eta is 1.5; expected a number from 0 to 1"),
    ("ddim", (M, X), {"eta": float("nan")}, "eta is nan"),
    ("ddim", (M, X), {"eta": "1"}, "eta is '1'"),
    ("ddim", (M, X), {"eta": 0.5}, "give a seed or a generator"),
    ("unipc", (M, X), {"eta": 0.5}, "has no eta"),
    ("ddpm", (M, X), {}, "give a seed or a generator"),
    ("ddpm", (M, X), {"variance_noise": M, "generator": Generator(0)}, "give one of them"),
    ("euler-a", (M, X), {"generator": [Generator(0), Generator(1)]}, "2 generators were given for 1 videos"),
    ("ddim", (M, NAN), {}, "sample of the step holds values that are not finite"),
    ("ddim", (NAN, X), {}, "model_output of the step holds values that are not finite"),
    ("ddim", (M[:, :2], X), {}, r"model_output has shape \[1, 2, 2, 4, 6\]"),
    ("ddim", (M.astype(np.int64), X), {}, "model_output is int64"),
    ("ddim", (M, [1.0]), {}, "sample is list; expected a float32 or float16 NumPy array"),
]


@pytest.mark.parametrize(("name", "given", "options", "message"), BAD_STEPS)
def test_bad_steps(name: str, given: Any, options: dict[str, Any], message: str) -> None:
    scheduler = get_scheduler(name)
    scheduler.set_timesteps(5)
    with pytest.raises(RequestError, match=message):
        scheduler.step(given[0], scheduler.timesteps[0], given[1], **options)


def test_churn_is_checked() -> None:
    scheduler = EulerDiscreteScheduler()
    scheduler.set_timesteps(5)
    with pytest.raises(RequestError, match="s_churn is -1"):
        scheduler.step(M, scheduler.timesteps[0], X, s_churn=-1)


def test_predicted_variances_need_their_channels() -> None:
    scheduler = DDPMScheduler(variance_type="learned")
    scheduler.set_timesteps(5)
    with pytest.raises(RequestError, match="expected 8: the prediction, then its variance"):
        scheduler.step(M, scheduler.timesteps[0], X, generator=Generator(0))


def test_stepping_at_the_wrong_time_is_refused() -> None:
    scheduler = get_scheduler("euler")
    with pytest.raises(RequestError, match="set_timesteps has not been called"):
        scheduler.step(M, 0.0, X)
    scheduler.set_timesteps(2)
    with pytest.raises(RequestError, match="timestep 3 was given; expected one of the scheduler's timesteps"):
        scheduler.step(M, 3.0, X)
    scheduler.step(M, scheduler.timesteps[0], X)
    with pytest.raises(RequestError, match="timestep 1000 was given"):
        scheduler.step(M, scheduler.timesteps[0], X)
    scheduler.step(M, scheduler.timesteps[1], X)
    with pytest.raises(RequestError, match="all 2 steps are made already"):
        scheduler.step(M, scheduler.timesteps[1], X)


def test_pndm_keeps_its_start_apart_from_its_steps() -> None:
    scheduler = PNDMScheduler()
    scheduler.set_timesteps(10)
    assert len(scheduler.timesteps) == 12 + 7
    assert scheduler.num_inference_steps == 10


def test_noise_to_an_unknown_timestep_is_refused() -> None:
    scheduler = DDIMScheduler()
    with pytest.raises(RequestError, match="timestep 1000 was given; expected an integer from 0 to 999"):
        scheduler.add_noise(X, M, np.array([1000]))
    euler = EulerDiscreteScheduler()
    euler.set_timesteps(3)
    with pytest.raises(RequestError, match="not in the schedule"):
        euler.add_noise(X, M, np.array([3.5]))


def test_samplers_are_imported_when_they_are_asked_for() -> None:
    code = (
        "import sys, t2v_rt.runtime.schedulers as s; loaded = [m for m in s.MODULES.values() "
        "if f'{s.__name__}.{m}' in sys.modules]; assert not loaded, loaded; s.DDIMScheduler; "
        "assert f'{s.__name__}.ddim' in sys.modules; assert f'{s.__name__}.ddpm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
