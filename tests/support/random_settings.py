"""Random settings of every sampler, of options that go together, for the comparison with diffusers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from t2v_rt.runtime.schedulers import scheduler_class

Rng = np.random.Generator
SHAPES = [(1, 4, 2, 4, 6), (2, 3, 5, 5), (1, 3), (1, 16, 3, 5, 7), (3, 4, 1, 2, 2)]
TRAINED = (1000, 1000, 1000, 250, 800, 100, 10, 3, 2, 1)  # timesteps of training
ODD = (29, 31, 58, 62, 97)  # of 100 or 800, trailing: floating point makes one step more, from timestep -1
WITHIN_TRAINED = ("CogVideoX", "DDIM", "DDPM", "LCM")  # beginnings of those that take no more steps than that


@dataclass(frozen=True)
class Trial:
    """One random case: settings of the class, of `set_timesteps` and of `step`, and the arrays' shape and seed."""

    name: str
    settings: dict[str, Any]
    schedule: dict[str, Any]
    step: dict[str, Any] = field(default_factory=dict)
    shape: tuple[int, ...] = SHAPES[0]
    seed: int = 0


def pick(rng: Rng, *values: Any) -> Any:
    return values[int(rng.integers(len(values)))]


def draw(name: str, rng: Rng) -> Trial:
    """A random trial of a class, of options that go together."""
    settings, schedule, step = _beta_settings(name, rng), {}, {}
    steps = schedule["num_inference_steps"] = _steps(name, settings["num_train_timesteps"], rng)
    match name:
        case "DDPMScheduler":
            _clipping(settings, rng)
            settings["variance_type"] = pick(
                rng, "fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range"
            )
            _custom_timesteps(settings, schedule, rng)
        case "DDIMScheduler":
            _clipping(settings, rng)
            settings["set_alpha_to_one"] = pick(rng, True, False)
            step = {"eta": pick(rng, 0.0, 0.3, 1.0), "use_clipped_model_output": pick(rng, True, False)}
        case "LCMScheduler":
            _clipping(settings, rng)
            _original_steps(settings, schedule, rng)
            _custom_timesteps(settings, schedule, rng)
        case "PNDMScheduler":
            settings["skip_prk_steps"] = pick(rng, True, False)
            settings["set_alpha_to_one"] = pick(rng, True, False)
            settings["prediction_type"] = pick(rng, "epsilon", "v_prediction")
            schedule["num_inference_steps"] = max(steps, 1 if settings["skip_prk_steps"] else 4)
        case "CogVideoXDDIMScheduler" | "CogVideoXDPMScheduler":
            settings["snr_shift_scale"] = pick(rng, 1.0, 3.0)
            settings["set_alpha_to_one"] = pick(rng, True, False)
        case "EulerDiscreteScheduler":
            _euler(settings, schedule, step, rng)
        case "EulerAncestralDiscreteScheduler":
            settings["prediction_type"] = pick(rng, "epsilon", "v_prediction")
        case "HeunDiscreteScheduler":
            _spacing(settings, rng)
            settings["clip_sample"] = pick(rng, True, False)
            if not any(settings.get(key) for key in SPACINGS):
                _custom_timesteps(settings, schedule, rng)
        case "FlowMatchEulerDiscreteScheduler":
            settings = _flow_match(schedule, rng)
        case _:
            _multistep(name, settings, schedule, rng)
    shape = SHAPES[int(rng.integers(len(SHAPES)))]
    if "learned" in settings.get("variance_type", "") or settings.get("thresholding"):
        shape = SHAPES[0]  # the reference wants channels and more for these
    return Trial(name, settings, schedule, step, shape, int(rng.integers(2**32)))


def _steps(name: str, train: int, rng: Rng) -> int:
    steps = int(rng.integers(1, 101)) if rng.random() < 0.8 else pick(rng, *ODD)
    return min(steps, train) if name.startswith(WITHIN_TRAINED) and rng.random() < 0.95 else steps


def _original_steps(settings: dict[str, Any], schedule: dict[str, Any], rng: Rng) -> None:
    original = pick(rng, 50, 100, 200)
    if rng.random() < 0.95:  # else there may be more of them than training timesteps
        original = min(original, settings["num_train_timesteps"])
    settings["original_inference_steps"] = original
    schedule["num_inference_steps"] = int(rng.integers(1, original + 1))


SPACINGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


def _beta_settings(name: str, rng: Rng) -> dict[str, Any]:
    cls = scheduler_class(name)
    kinds = ["linear", "scaled_linear", "squaredcos_cap_v2"]
    kinds += {"DDPMScheduler": ["laplace", "sigmoid"], "HeunDiscreteScheduler": ["exp"]}.get(name, [])
    train = pick(rng, *TRAINED)
    start, stop = pick(rng, (0.0001, 0.02), (0.00085, 0.012), (0.0005, 0.01))
    settings = {
        "num_train_timesteps": train,
        "beta_start": start,
        "beta_end": stop,
        "beta_schedule": pick(rng, *kinds),
        "timestep_spacing": pick(rng, "linspace", "leading", "trailing"),
        "steps_offset": pick(rng, 0, 1),
        "prediction_type": pick(rng, "epsilon", "sample", "v_prediction"),
    }
    if rng.random() < 0.1:
        settings["trained_betas"] = np.linspace(start, stop, train).tolist()
    if "rescale_betas_zero_snr" in cls.Config.__dataclass_fields__:
        # at zero signal, epsilon says nothing about the data: dividing by it is infinite in the reference, too
        divides = settings["prediction_type"] == "epsilon"
        settings["rescale_betas_zero_snr"] = bool(rng.random() < (0.05 if divides else 0.25))
    return settings


def _clipping(settings: dict[str, Any], rng: Rng) -> None:
    settings["clip_sample"] = pick(rng, True, False)
    settings["clip_sample_range"] = pick(rng, 1.0, 2.5)
    _thresholding(settings, rng)


def _thresholding(settings: dict[str, Any], rng: Rng) -> None:
    if rng.random() < 0.25:
        settings |= {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": pick(rng, 1.0, 3.0)}


def _custom_timesteps(settings: dict[str, Any], schedule: dict[str, Any], rng: Rng) -> None:
    if rng.random() < 0.2:
        count = int(rng.integers(1, 30))
        chosen = rng.choice(settings["num_train_timesteps"], min(count, settings["num_train_timesteps"]), replace=False)
        schedule.clear()
        schedule["timesteps"] = sorted((int(t) for t in chosen), reverse=True)


def _spacing(settings: dict[str, Any], rng: Rng) -> None:
    chosen = pick(rng, None, *SPACINGS)
    if chosen:
        settings[chosen] = True


def _euler(settings: dict[str, Any], schedule: dict[str, Any], step: dict[str, Any], rng: Rng) -> None:
    _spacing(settings, rng)
    settings["interpolation_type"] = pick(rng, "linear", "linear", "log_linear")
    settings["final_sigmas_type"] = pick(rng, "zero", "sigma_min")
    settings["timestep_type"] = pick(rng, "discrete", "discrete", "continuous")
    if rng.random() < 0.2:
        settings |= {"sigma_min": 0.03, "sigma_max": 12.0}
    continuous = settings["timestep_type"] == "continuous" and settings["prediction_type"] == "v_prediction"
    if rng.random() < 0.15:
        schedule.clear()
        schedule["sigmas"] = [*np.sort(rng.uniform(0.05, 14, int(rng.integers(1, 30))))[::-1].tolist(), 0.0]
    elif settings["interpolation_type"] == "linear" and not (continuous or any(settings.get(key) for key in SPACINGS)):
        _custom_timesteps(settings, schedule, rng)
    if rng.random() < 0.3:
        step |= {"s_churn": 5.0, "s_tmin": 0.1, "s_tmax": 10.0, "s_noise": 1.003}


def _flow_match(schedule: dict[str, Any], rng: Rng) -> dict[str, Any]:
    train = pick(rng, *TRAINED)
    settings: dict[str, Any] = {"num_train_timesteps": train, "shift": pick(rng, 1.0, 3.0, 5.0, 12.0)}
    settings["stochastic_sampling"] = pick(rng, False, True)
    settings["time_shift_type"] = pick(rng, "exponential", "linear")
    settings["invert_sigmas"] = bool(rng.random() < 0.1)
    if rng.random() < 0.2:
        settings["use_dynamic_shifting"] = True
        schedule["mu"] = float(rng.uniform(0.3, 1.5))
    if rng.random() < 0.2 and schedule["num_inference_steps"] > 1:
        settings["shift_terminal"] = 0.1
    _spacing(settings, rng)
    if rng.random() < 0.3 and "shift_terminal" not in settings:
        count = int(rng.integers(1, 20))
        del schedule["num_inference_steps"]
        values = np.sort(rng.uniform(0.01, 1.0, count))[::-1]
        schedule |= pick(rng, {"sigmas": values.tolist()}, {"timesteps": (values * train).tolist()})
    return settings


def _multistep(name: str, settings: dict[str, Any], schedule: dict[str, Any], rng: Rng) -> None:
    settings["solver_order"] = int(rng.integers(1, 4))
    settings["lower_order_final"] = pick(rng, True, True, False)
    _thresholding(settings, rng)
    flow = bool(rng.random() < 0.4)
    if flow:
        settings |= {
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "flow_shift": pick(rng, 1.0, 3.0, 5.0, 12.0),
            "rescale_betas_zero_snr": False,
        }
        if rng.random() < 0.2:
            settings["use_dynamic_shifting"] = True
            schedule["mu"] = float(rng.uniform(0.3, 1.5))
    else:
        _spacing(settings, rng)
    if name == "DEISMultistepScheduler":
        settings.pop("rescale_betas_zero_snr", None)
        return
    settings["final_sigmas_type"] = pick(rng, "zero", "sigma_min")
    if name == "UniPCMultistepScheduler":
        settings["solver_type"] = pick(rng, "bh1", "bh2")
        settings["disable_corrector"] = pick(rng, [], [0, 1])
        settings["predict_x0"] = flow or pick(rng, True, False)
        settings["lower_order_final"] |= settings["final_sigmas_type"] == "zero" or bool(settings.get(SPACINGS[0]))
        settings["lower_order_final"] |= any(settings.get(key) for key in SPACINGS)  # these repeat the last sigma
        settings["lower_order_final"] |= flow
        if flow and rng.random() < 0.2 and schedule["num_inference_steps"] > 1:
            settings["shift_terminal"] = 0.1
        if flow and rng.random() < 0.2 and "shift_terminal" not in settings:
            schedule["sigmas"] = np.sort(rng.uniform(0.01, 1.0, int(rng.integers(1, 30))))[::-1].tolist()
            del schedule["num_inference_steps"]
        return
    settings["algorithm_type"] = pick(rng, "dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver")
    if flow:
        settings["algorithm_type"] = pick(rng, "dpmsolver++", "sde-dpmsolver++")
    if not settings["algorithm_type"].endswith("++"):
        settings["final_sigmas_type"] = "sigma_min"
    if settings["algorithm_type"] == "sde-dpmsolver":
        settings["solver_order"] = min(settings["solver_order"], 2)
    settings["solver_type"] = pick(rng, "midpoint", "heun")
    settings["euler_at_final"] = pick(rng, True, False)
    if not flow and not any(settings.get(key) for key in SPACINGS):
        settings["use_lu_lambdas"] = bool(rng.random() < 0.2)
        settings["lambda_min_clipped"] = pick(rng, -float("inf"), -5.1)
        if not settings["use_lu_lambdas"]:
            _custom_timesteps(settings, schedule, rng)
