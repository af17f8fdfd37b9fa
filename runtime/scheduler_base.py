"""What all schedulers share: their config, their step counter, and schedule maths as pure functions."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from types import UnionType
from typing import Any, ClassVar, Generic, Self, TypeVar, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from t2v_rt.errors import RequestError
from t2v_rt.runtime.noise import Generator

Array = NDArray[Any]
MAX_STEPS = 100_000


@dataclass(frozen=True)
class SchedulerOutput:
    """Result of one step.

    Args:
        prev_sample: the sample at the next, less noisy timestep; shape and dtype of the step's sample.
    """

    prev_sample: Array


@dataclass(frozen=True)
class SchedulerConfig(Mapping[str, Any]):
    """A scheduler's settings: a frozen dataclass that reads as a mapping, as diffusers' configs do."""

    def __getitem__(self, key: str) -> Any:
        if key not in type(self).__dataclass_fields__:
            raise KeyError(key)
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        return (item.name for item in fields(self))

    def __len__(self) -> int:
        return len(fields(self))

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for item in fields(self):
            _check_kind(item.name, getattr(self, item.name), hints[item.name])


def _check_kind(name: str, value: Any, hint: Any) -> None:
    """Refuses a value that is not of its field's annotated kind; an integer counts as a float."""
    if any(isinstance(option, str) for option in get_args(hint)):
        if value not in get_args(hint):
            raise RequestError(f"{name} is {value!r}; expected one of {', '.join(map(repr, get_args(hint)))}")
        return
    options = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    kinds = tuple(get_origin(option) or option for option in options)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    good = isinstance(value, kinds) and (not isinstance(value, bool) or bool in kinds)
    good = good or (float in kinds and number) or (tuple in kinds and isinstance(value, list))
    if not good or (number and not math.isfinite(value)):
        expected = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
        raise RequestError(f"{name} is {value!r}; expected a finite {expected}")


C = TypeVar("C", bound=SchedulerConfig)


class Scheduler(Generic[C]):
    """Base of the samplers: built from settings, prepared by `set_timesteps`, advanced by `step`.

    Steps are counted, not looked up by timestep: truncated timesteps can repeat.

    Raises:
        RequestError: an unknown setting, or one of the wrong kind.
    """

    Config: ClassVar[type[SchedulerConfig]]
    order = 1
    init_noise_sigma: float = 1.0

    def __init__(self, **settings: Any) -> None:
        known = {item.name for item in fields(self.Config)}
        unknown = sorted(set(settings) - known)
        if unknown:
            raise RequestError(
                f"{type(self).__name__} has no setting {unknown[0]!r}; it has {', '.join(sorted(known))}"
            )
        self.config: C = self.Config(**settings)  # type: ignore[assignment]
        self.timesteps: Array = np.empty(0, np.float32)
        self.sigmas: NDArray[np.float32] = np.empty(0, np.float32)
        self.num_inference_steps: int | None = None
        self._step_index = 0
        self._reset()

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **overrides: Any) -> Self:
        """Builds a scheduler from a saved config, a sibling class's too.

        Args:
            config: keys that this class does not have are ignored, as diffusers does.
            overrides: settings that replace the config's; unlike its keys, they must be known.

        Raises:
            RequestError: an unknown override, or a value of the wrong kind.
        """
        if not isinstance(config, Mapping):
            raise RequestError(f"from_config got a {type(config).__name__}; expected a mapping of settings")
        known = {item.name for item in fields(cls.Config)}
        own = {key: value for key, value in config.items() if key in known}
        return cls(**{**own, **overrides})

    @property
    def step_index(self) -> int:
        """How many steps have been made since `set_timesteps`."""
        return self._step_index

    def copy(self) -> Self:
        """An independent copy: a pipeline call works on its own."""
        return copy.deepcopy(self)

    def scale_model_input(self, sample: Array, timestep: float | None = None) -> Array:
        """Returns the sample as the model takes it; these samplers leave it as it is."""
        return sample

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        *,
        sigmas: Sequence[float] | None = None,
        timesteps: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Prepares the schedule; see the class for what it takes."""
        raise NotImplementedError  # each sampler has its own

    def step(
        self,
        model_output: Array,
        timestep: float,
        sample: Array,
        *,
        generator: Generator | None = None,
        eta: float = 0.0,
    ) -> SchedulerOutput:
        """Advances the sample by one step of the schedule.

        Args:
            model_output: the denoiser's (guided) prediction, shape of `sample`.
            timestep: the schedule's current timestep.
            sample: current sample, float32 or float16; not changed.
            generator: source of the noise of stochastic samplers.
            eta: amount of noise, where the sampler has that dial.

        Returns:
            The next sample, in the dtype of `sample`.

        Raises:
            RequestError: `set_timesteps` was not called, or all steps are made.
        """
        if self._step_index >= len(self.timesteps):
            done = "set_timesteps has not been called" if not len(self.timesteps) else "all steps are made already"
            raise RequestError(f"{type(self).__name__}.step: {done}; call set_timesteps first")
        result = self._advance(np.asarray(model_output, np.float32), np.asarray(sample, np.float32), generator, eta)
        self._step_index += 1
        return SchedulerOutput(result.astype(np.asarray(sample).dtype, copy=False))

    def _reset(self) -> None:
        """Forgets what earlier steps left behind."""
        self._step_index = 0

    def _advance(
        self, model_output: NDArray[np.float32], sample: NDArray[np.float32], generator: Generator | None, eta: float
    ) -> NDArray[np.float32]:
        raise NotImplementedError  # each sampler has its own

    def __repr__(self) -> str:
        defaults = self.Config()
        changed = ", ".join(f"{key}={value!r}" for key, value in self.config.items() if value != defaults[key])
        return f"{type(self).__name__}({changed})"


def check_steps(num_inference_steps: int | None) -> int:
    """Returns the number of steps; raises RequestError where it is none, or not an integer of 1 or more."""
    valid = isinstance(num_inference_steps, (int, np.integer)) and not isinstance(num_inference_steps, bool)
    if not valid or not 1 <= int(num_inference_steps or 0) <= MAX_STEPS:
        raise RequestError(f"num_inference_steps is {num_inference_steps!r}; expected an integer from 1 to {MAX_STEPS}")
    return int(num_inference_steps or 0)


def check_sigmas(sigmas: Sequence[float], steps: int | None) -> NDArray[np.float64]:
    """Custom sigmas as an array; raises RequestError where they do not fall within (0, 1] or differ from the steps."""
    values = np.asarray(sigmas, np.float64)
    falling = values.ndim == 1 and len(values) > 0 and bool(np.all(np.diff(values) < 0))
    if not falling or not np.all(np.isfinite(values)) or values[0] > 1.0 or values[-1] <= 0.0:
        raise RequestError("sigmas must be a list that falls from at most 1 to above 0")
    if steps is not None and steps != len(values):
        raise RequestError(f"{len(values)} sigmas were given for {steps} steps; give as many, or leave the steps out")
    return values


def shift_sigmas(sigmas: Array, shift: float) -> Array:
    """s x / (1 + (s - 1) x): moves a flow schedule towards noise for s > 1 (Esser et al., arXiv:2403.03206)."""
    result: Array = shift * sigmas / (1 + (shift - 1) * sigmas)
    return result


def dynamic_shift(sigmas: Array, mu: float, kind: str) -> Array:
    """The same shift with s = e^mu (`exponential`) or s = mu (`linear`), mu chosen per resolution by the caller."""
    s = math.exp(mu) if kind == "exponential" else mu
    result: Array = s / (s + (1 / sigmas - 1))
    return result


def stretch_to_terminal(sigmas: Array, terminal: float) -> Array:
    """Stretches a schedule so that its last sigma is `terminal` (Lightricks LTX-Video)."""
    distance = 1 - sigmas
    result: Array = 1 - distance / (distance[-1] / (1 - terminal))
    return result


def add_flow_noise(
    original: Array, noise: Array, timesteps: Array, schedule_timesteps: Array, sigmas: NDArray[np.float32]
) -> Array:
    """(1 - sigma) x0 + sigma noise for each sample's timestep, found in the schedule.

    Raises:
        RequestError: a timestep that is not in the schedule.
    """
    rows = []
    for t in np.atleast_1d(timesteps):
        found = np.flatnonzero(schedule_timesteps == t)
        if not len(found):
            raise RequestError(f"timestep {t} is not in the schedule; give one of the scheduler's timesteps")
        rows.append(sigmas[found[0]])
    sigma = np.asarray(rows, np.float32).reshape(-1, *(1,) * (original.ndim - 1))
    result: Array = ((1 - sigma) * original + sigma * noise).astype(original.dtype, copy=False)
    return result
