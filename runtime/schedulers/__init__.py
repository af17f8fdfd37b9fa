"""The samplers by class and by short name; a sampler's module is imported when it is first asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from t2v_rt.errors import RequestError
from t2v_rt.runtime.schedulers.base import Scheduler, SchedulerOutput

if TYPE_CHECKING:
    from t2v_rt.runtime.schedulers.cogvideox import CogVideoXDDIMScheduler, CogVideoXDPMScheduler
    from t2v_rt.runtime.schedulers.ddim import DDIMScheduler
    from t2v_rt.runtime.schedulers.ddpm import DDPMScheduler
    from t2v_rt.runtime.schedulers.deis_multistep import DEISMultistepScheduler
    from t2v_rt.runtime.schedulers.dpmsolver_multistep import DPMSolverMultistepScheduler
    from t2v_rt.runtime.schedulers.euler_ancestral import EulerAncestralDiscreteScheduler
    from t2v_rt.runtime.schedulers.euler_discrete import EulerDiscreteScheduler
    from t2v_rt.runtime.schedulers.flow_match_euler import FlowMatchEulerDiscreteScheduler
    from t2v_rt.runtime.schedulers.heun_discrete import HeunDiscreteScheduler
    from t2v_rt.runtime.schedulers.lcm import LCMScheduler
    from t2v_rt.runtime.schedulers.pndm import PNDMScheduler
    from t2v_rt.runtime.schedulers.unipc_multistep import UniPCMultistepScheduler

__all__ = [
    "CogVideoXDDIMScheduler",
    "CogVideoXDPMScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LCMScheduler",
    "PNDMScheduler",
    "Scheduler",
    "SchedulerOutput",
    "UniPCMultistepScheduler",
    "available_schedulers",
    "fitting_schedulers",
    "get_scheduler",
    "scheduler_class",
]

MODULES: Mapping[str, str] = {
    "CogVideoXDDIMScheduler": "cogvideox",
    "CogVideoXDPMScheduler": "cogvideox",
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "DEISMultistepScheduler": "deis_multistep",
    "DPMSolverMultistepScheduler": "dpmsolver_multistep",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "EulerDiscreteScheduler": "euler_discrete",
    "FlowMatchEulerDiscreteScheduler": "flow_match_euler",
    "HeunDiscreteScheduler": "heun_discrete",
    "LCMScheduler": "lcm",
    "PNDMScheduler": "pndm",
    "UniPCMultistepScheduler": "unipc_multistep",
}
Sampler = tuple[str, Mapping[str, Any]]  # class name, and the settings that a short name stands for
KARRAS: Mapping[str, Any] = {"use_karras_sigmas": True}
SAMPLERS: Mapping[str, Sampler] = {
    "cogvideox-ddim": ("CogVideoXDDIMScheduler", {}),
    "cogvideox-dpm": ("CogVideoXDPMScheduler", {}),
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "dpm++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpm++-karras": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", **KARRAS}),
    "dpm++-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++-sde-karras": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", **KARRAS}),
    "euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "unipc-karras": ("UniPCMultistepScheduler", KARRAS),
}
# methods that have another class for the one kind of model than for the other
FOR_FLOW: Mapping[str, Sampler] = {"lcm": ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True})}
FOR_NOISE: Mapping[str, Sampler] = {"euler": ("EulerDiscreteScheduler", {})}


def __getattr__(name: str) -> Any:
    if name in MODULES:
        return _load(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _load(name: str) -> type[Scheduler[Any]]:
    """A class by its name."""
    found: type[Scheduler[Any]] = getattr(importlib.import_module(f"{__name__}.{MODULES[name]}"), name)
    return found


def available_schedulers() -> tuple[str, ...]:
    """The short names, sorted."""
    return tuple(sorted(SAMPLERS))


def fitting_schedulers(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The short names of those that can sample the model that a saved config describes."""
    fitting = []
    for name in available_schedulers():
        cls, preset = _find(name, config)
        try:
            if _fits_flow(cls) or not is_flow(config):
                cls.from_config(translated(cls, config), **preset)
                fitting.append(name)
        except RequestError:
            continue
    return tuple(fitting)


def get_scheduler(name: str, config: Mapping[str, Any] | None = None, **overrides: Any) -> Scheduler[Any]:
    """Builds a scheduler by short name or class name, for the model that a saved config describes.

    Args:
        name: e.g. `unipc`, or a class name as in `scheduler_config.json`. `euler` and `lcm` are methods that a flow
            model and a noise-predicting one have different classes for; the config's kind decides.
        config: a saved config; keys foreign to the class are ignored, and the flow shift and the kind of the model are
            carried over to the names that the class has for them.
        overrides: settings that replace the config's and must be known to the class.

    Returns:
        A new scheduler.

    Raises:
        RequestError: unknown name (the known ones are listed), a bad setting, or a sampler that cannot fit the model.
    """
    config = config or {}
    cls, preset = _find(name, config)
    saved = translated(cls, config)
    if is_flow(config) and not _fits_flow(cls):
        raise RequestError(
            f"{cls.__name__} cannot sample a flow model (prediction_type 'flow_prediction'); expected one of "
            f"{', '.join(fitting_schedulers(config))}"
        )
    return cls.from_config(saved, **{**preset, **overrides})


def scheduler_class(name: str, config: Mapping[str, Any] | None = None) -> type[Scheduler[Any]]:
    """The class that `get_scheduler` takes for a name.

    Args:
        name: short name such as `unipc`, or class name.
        config: saved config of the model's scheduler; for a name that means another class for a flow model than for a
            noise-predicting one, it decides.

    Raises:
        RequestError: the name is unknown.
    """
    return _find(name, config or {})[0]


def _find(name: str, config: Mapping[str, Any]) -> tuple[type[Scheduler[Any]], Mapping[str, Any]]:
    """The class and the settings that a name stands for, on the model that a config describes."""
    if name in MODULES:
        return _load(name), {}
    if name not in SAMPLERS:
        raise RequestError(f"unknown scheduler {name!r}; expected one of {', '.join(available_schedulers())}")
    kinds = FOR_FLOW if is_flow(config) else FOR_NOISE if "prediction_type" in config else {}
    class_name, preset = kinds.get(name, SAMPLERS[name])
    return _load(class_name), preset


def is_flow(config: Mapping[str, Any]) -> bool:
    """Whether a saved config is that of a flow model."""
    of_flow_class = config.get("_class_name") == "FlowMatchEulerDiscreteScheduler"
    return config.get("prediction_type") == "flow_prediction" or ("prediction_type" not in config and of_flow_class)


def _fits_flow(cls: type[Scheduler[Any]]) -> bool:
    return shift_name(cls) is not None


def translated(cls: type[Scheduler[Any]], config: Mapping[str, Any]) -> dict[str, Any]:
    """A saved config in the words of another class: the flow shift is `flow_shift` or `shift`, and a class for both
    kinds of model is told that this one is a flow model."""
    result = dict(config)
    name = shift_name(cls)
    other = "shift" if name == "flow_shift" else "flow_shift"
    if name is not None and name not in result and other in result:
        result[name] = result[other]
    if name == "flow_shift" and is_flow(config):
        result = {**result, "prediction_type": "flow_prediction", "use_flow_sigmas": True}
    return result


def shift_name(cls: type[Scheduler[Any]]) -> str | None:
    """What the class calls its flow shift, or None where it has none."""
    names = cls.Config.__dataclass_fields__
    return next((name for name in ("flow_shift", "shift") if name in names), None)
