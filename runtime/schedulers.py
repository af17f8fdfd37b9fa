"""The samplers by class and by short name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from t2v_rt.errors import RequestError
from t2v_rt.runtime.flow_match_euler import FlowMatchEulerDiscreteScheduler
from t2v_rt.runtime.scheduler_base import Scheduler, SchedulerOutput
from t2v_rt.runtime.unipc import UniPCMultistepScheduler

__all__ = [
    "FlowMatchEulerDiscreteScheduler",
    "Scheduler",
    "SchedulerOutput",
    "UniPCMultistepScheduler",
    "available_schedulers",
    "get_scheduler",
]

SCHEDULERS: Mapping[str, type[Scheduler[Any]]] = {
    "unipc": UniPCMultistepScheduler,
    "euler": FlowMatchEulerDiscreteScheduler,
}


def available_schedulers() -> tuple[str, ...]:
    """The short names, sorted."""
    return tuple(sorted(SCHEDULERS))


def get_scheduler(name: str, config: Mapping[str, Any] | None = None, **overrides: Any) -> Scheduler[Any]:
    """Builds a scheduler by short name or class name.

    Args:
        name: e.g. `unipc`, or a class name as in `scheduler_config.json`.
        config: a saved config; keys foreign to the class are ignored. `flow_shift` and `shift` stand for each other
            where the class has only one of them.
        overrides: settings that replace the config's and must be known to the class.

    Returns:
        A new scheduler.

    Raises:
        RequestError: unknown name (the known ones are listed), or a bad setting.
    """
    classes = {**SCHEDULERS, **{cls.__name__: cls for cls in SCHEDULERS.values()}}
    if name not in classes:
        raise RequestError(f"unknown scheduler {name!r}; expected one of {', '.join(available_schedulers())}")
    cls = classes[name]
    return cls.from_config(with_shift(cls, config or {}), **overrides)


def with_shift(cls: type[Scheduler[Any]], config: Mapping[str, Any]) -> dict[str, Any]:
    """A config whose flow shift has the name that `cls` gives it: `flow_shift` or `shift`."""
    result = dict(config)
    name = shift_name(cls)
    other = "shift" if name == "flow_shift" else "flow_shift"
    if name is not None and name not in result and other in result:
        result[name] = result[other]
    return result


def shift_name(cls: type[Scheduler[Any]]) -> str | None:
    """What the class calls its flow shift, or None where it has none."""
    names = cls.Config.__dataclass_fields__
    return next((name for name in ("flow_shift", "shift") if name in names), None)
