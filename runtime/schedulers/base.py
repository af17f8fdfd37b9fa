"""What all samplers share: how they are made, prepared and stepped, and the checks on the way."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Generic, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from t2v_rt.errors import RequestError
from t2v_rt.numbers import as_integer, as_number
from t2v_rt.runtime.noise import Generator, randn_for
from t2v_rt.runtime.schedulers.config import SchedulerConfig

Array = NDArray[Any]
Float32 = NDArray[np.float32]
Generators = Generator | Sequence[Generator] | None
Draw = Callable[[], Float32]
MAX_STEPS = 100_000
TIMESTEP_TOLERANCE = 1e-3  # the reference's float32 timesteps and ours may differ in the last digit
# A sample, and predictions that differ from one step to the next, as differences of equal ones hide a division by zero;
# three channels, as a model that predicts variances too has.
REHEARSED = np.array([[[0.7, -1.3, 0.4]], [[0.9, -0.2, 1.1]], [[-0.6, 0.5, 1.7]], [[0.3, 1.9, -1.2]]], np.float32)
SAMPLE_DTYPES = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(np.float64))


@dataclass(frozen=True)
class SchedulerOutput:
    """Result of one step.

    Args:
        prev_sample: the sample at the next, less noisy timestep; shape and dtype of the step's sample.
    """

    prev_sample: Array


MOST_REMEMBERED = 256  # schedules
_steppable: set[tuple[object, ...]] = set()  # schedules that were rehearsed: calls of a program mostly have the same


C = TypeVar("C", bound=SchedulerConfig)


class Scheduler(Generic[C]):
    """Base of the samplers: built from settings, prepared by `set_timesteps`, advanced by `step`.

    Raises:
        RequestError: an unknown setting, or one of the wrong kind.
    """

    Config: ClassVar[type[SchedulerConfig]]
    order = 1
    # values that a saved config of a sibling class may have for a setting of the same name -> what stands here for them
    substitutes: ClassVar[Mapping[str, Mapping[str, str]]] = {}
    custom: ClassVar[frozenset[str]] = frozenset()  # which of sigmas, timesteps and mu `set_timesteps` takes
    takes_eta: ClassVar[bool] = False
    stateless: ClassVar[bool] = (
        False  # a step depends on nothing but its arguments, so any timestep may come at any time
    )

    def __init__(self, **settings: Any) -> None:
        known = {item.name for item in fields(self.Config)}
        unknown = sorted(set(settings) - known)
        if unknown:
            raise RequestError(
                f"{type(self).__name__} has no setting {unknown[0]!r}; it has {', '.join(sorted(known))}"
            )
        try:
            self.config: C = self.Config(**settings)  # type: ignore[assignment]
        except RequestError as exc:
            raise RequestError(f"{type(self).__name__}: {exc}") from exc
        self.timesteps: Array = np.empty(0, np.float32)
        self.sigmas: Float32 = np.empty(0, np.float32)
        self.num_inference_steps: int | None = None
        self._prepare()
        self._start()

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
        defaults = {item.name: item.default for item in fields(cls.Config)}
        own = {key: value for key, value in config.items() if key in defaults and not _spells(value, defaults[key])}
        for key, words in cls.substitutes.items():
            if isinstance(own.get(key), str):
                own[key] = words.get(own[key], own[key])
        return cls(**{**own, **overrides})

    @property
    def step_index(self) -> int:
        """Index of the schedule's current timestep."""
        return self._step_index

    @property
    def init_noise_sigma(self) -> float:
        """What initial noise of standard deviation 1 is multiplied with."""
        return 1.0

    def copy(self) -> Self:
        """An independent copy: a pipeline call works on its own."""
        return copy.deepcopy(self)

    def settings(self) -> dict[str, Any]:
        """Class name and config as plain JSON values."""
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in self.config.items()}
        finite = {key: str(v) if isinstance(v, float) and not math.isfinite(v) else v for key, v in plain.items()}
        return {"_class_name": type(self).__name__, **finite}

    def __len__(self) -> int:
        return int(self.config["num_train_timesteps"])

    def __repr__(self) -> str:
        defaults = self.Config()
        changed = ", ".join(f"{key}={value!r}" for key, value in self.config.items() if value != defaults[key])
        return f"{type(self).__name__}({changed})"

    # -- the schedule --

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        *,
        sigmas: Sequence[float] | None = None,
        timesteps: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Prepares the schedule and forgets earlier steps.

        Args:
            num_inference_steps: number of steps N.
            sigmas: instead, custom noise levels, falling; where the class takes them.
            timesteps: instead, custom timesteps, falling; where the class takes them.
            mu: the shift of the schedule where `use_dynamic_shifting` is on.

        Raises:
            RequestError: none or several of them, a bad value, or one that the class does not take.
        """
        name = type(self).__name__
        for key, value in (("sigmas", sigmas), ("timesteps", timesteps), ("mu", mu)):
            if value is not None and key not in self.custom:
                raise RequestError(f"{name}.set_timesteps takes no {key}; leave them out")
        if sigmas is not None and timesteps is not None:
            raise RequestError("sigmas and timesteps were both given; give one of them")
        given = timesteps if sigmas is None else sigmas
        shift = as_number(mu)
        if mu is not None and shift is None:
            raise RequestError(f"mu is {mu!r}; expected a finite number")
        if given is None:
            self._schedule(check_steps(num_inference_steps), None, None, shift)
        else:
            if num_inference_steps is not None and num_inference_steps != len(given):
                raise RequestError(
                    f"{len(given)} {'timesteps' if sigmas is None else 'sigmas'} and num_inference_steps "
                    f"{num_inference_steps} were given; give one of them"
                )
            self._schedule(0, sigmas, timesteps, shift)
        self._start()
        self._rehearse()
        self._start()

    def _rehearse(self) -> None:
        """Steps once through a new schedule on a few values; raises RequestError where a step cannot be made."""
        schedule = (type(self), self.config, self.timesteps.tobytes(), self.sigmas.tobytes())
        if schedule in _steppable:
            return
        x, *outputs = REHEARSED
        learned = self._learned_shape(x.shape) != x.shape
        for i, t in enumerate(self.timesteps):
            m = outputs[i % len(outputs)]
            try:
                self.step(np.concatenate([m, np.abs(m)], 1) if learned else m, float(t), x, variance_noise=x)
            except RequestError as exc:
                raise RequestError(
                    f"{type(self).__name__} cannot make step {i + 1} of {len(self.timesteps)}, from timestep {t:g}: "
                    f"{exc}; take another number of steps, or other settings of the schedule"
                ) from exc
        if len(_steppable) >= MOST_REMEMBERED:
            _steppable.clear()
        _steppable.add(schedule)

    # -- steps --

    def scale_model_input(self, sample: Array, timestep: float | None = None) -> Array:
        """The sample as the model takes it: as it is, but for samplers over sigmas that let it grow with the noise.

        Args:
            sample: float (B, C, …), the current sample; not changed.
            timestep: the schedule's current timestep.

        Returns:
            The denoiser's input, in the dtype and shape of `sample`.
        """
        return sample

    def step(
        self,
        model_output: Array,
        timestep: float,
        sample: Array,
        *,
        generator: Generators = None,
        eta: float = 0.0,
        variance_noise: Array | None = None,
    ) -> SchedulerOutput:
        """Advances the sample by one step of the schedule.

        Args:
            model_output: the denoiser's (guided) prediction, shape of `sample`.
            timestep: the schedule's current timestep; the first step may begin at a later one.
            sample: current sample (B, C, …), float32 or float16; not changed.
            generator: source of the noise of stochastic samplers; a list has one for each video.
            eta: amount of noise, 0 to 1, where the sampler has that dial.
            variance_noise: the noise itself, instead of a generator.

        Returns:
            The next sample, in the dtype of `sample`.

        Raises:
            RequestError: `set_timesteps` was not called, all steps are made, or an argument does not fit.
        """
        return self._make_step(self._advance, model_output, timestep, sample, generator, eta, variance_noise)

    def _make_step(
        self,
        advance: Callable[[int, Float32, Float32, Draw, float], Float32],
        model_output: Array,
        timestep: float,
        sample: Array,
        generator: Generators,
        eta: float,
        variance_noise: Array | None,
    ) -> SchedulerOutput:
        """Checks what `step` is given, and lets `advance` compute the next sample from it."""
        i = self._locate(timestep)
        x, m = self._checked("sample", sample), self._checked("model_output", model_output)
        if m.shape != x.shape and m.shape != self._learned_shape(x.shape):
            raise RequestError(
                f"model_output has shape {list(m.shape)}, sample {list(x.shape)}; expected the same shape"
            )
        amount = as_number(eta)
        if amount is None or not 0.0 <= amount <= 1.0:
            raise RequestError(f"eta is {eta!r}; expected a number from 0 to 1")
        if amount and not self.takes_eta:
            raise RequestError(f"{type(self).__name__} has no eta; leave it at 0")
        noise = None if variance_noise is None else self._checked("variance_noise", variance_noise)
        if noise is not None and (generator is not None or noise.shape != x.shape):
            raise RequestError(
                "variance_noise stands instead of a generator and has the sample's shape; give one of them"
            )
        with np.errstate(all="ignore"):  # logarithms of 0 and their like are meant: a last sigma is 0
            result = advance(i, m, x, lambda: randn_for(x.shape, generator) if noise is None else noise, amount)
            suspicious = not math.isfinite(float(np.sum(result)))  # far cheaper than a mask, but can overflow
        if suspicious:
            _check_finite(sample=x, model_output=m, result=result)
        self._step_index = i + 1
        return SchedulerOutput(result.astype(sample.dtype, copy=False))

    def add_noise(self, original_samples: Array, noise: Array, timesteps: Array) -> Array:
        """Noises samples to timesteps, one for each sample of the batch.

        Args:
            original_samples: float (B, …).
            noise: float, of the shape of the samples.
            timesteps: (B,), of the schedule (samplers over sigmas) or of training (the others).

        Returns:
            The noisy samples, in the dtype of the originals.

        Raises:
            RequestError: an unknown timestep, or shapes that differ.
        """
        original, noise = np.asarray(original_samples), np.asarray(noise)
        if original.shape != noise.shape:
            raise RequestError(f"noise has shape {list(noise.shape)}; expected {list(original.shape)}")
        levels = [self._signal_and_noise(float(t)) for t in np.atleast_1d(timesteps)]
        alpha, sigma = (np.asarray(column, np.float32) for column in zip(*levels, strict=True))
        column = (-1, *(1,) * (original.ndim - 1))
        noisy: Array = alpha.reshape(column) * original + sigma.reshape(column) * noise
        return noisy.astype(original.dtype, copy=False)

    # -- what each sampler says --

    def _prepare(self) -> None:
        """Computes what follows from the config alone."""

    def _schedule(
        self, steps: int, sigmas: Sequence[float] | None, timesteps: Sequence[float] | None, mu: float | None
    ) -> None:
        """Sets timesteps, sigmas and num_inference_steps; exactly one of the first three arguments is given."""
        raise NotImplementedError

    def _start(self) -> None:
        """Forgets what earlier steps left behind."""
        self._step_index = 0

    def _advance(self, i: int, model_output: Float32, sample: Float32, draw: Draw, eta: float) -> Float32:
        """The sample after step i; `draw` gives noise of the sample's shape."""
        raise NotImplementedError

    def _signal_and_noise(self, timestep: float) -> tuple[Any, Any]:
        """The factors of sample and noise in a sample noised to that timestep."""
        raise NotImplementedError

    def _learned_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """What else a prediction's shape may be: twice the channels, where the model also predicts a variance."""
        return shape

    # -- checks --

    def _locate(self, timestep: float | None) -> int:
        """The index of the timestep that a step is made from."""
        i, count = self._step_index, len(self.timesteps)
        if not count:
            raise RequestError(f"{type(self).__name__}.step: set_timesteps has not been called; call it first")
        if i >= count and not self.stateless:
            raise RequestError(
                f"{type(self).__name__}.step: all {count} steps are made already; call set_timesteps first"
            )
        if timestep is None or (i < count and abs(float(self.timesteps[i]) - float(timestep)) <= TIMESTEP_TOLERANCE):
            return i
        found = self._index_of(float(timestep)) if i == 0 or self.stateless else None
        if found is None:
            expected = f"{self.timesteps[min(i, count - 1)]:g}" if i else "one of the scheduler's timesteps"
            raise RequestError(f"timestep {float(timestep):g} was given; expected {expected}")
        return found

    def _index_of(self, timestep: float) -> int | None:
        """Where a timestep stands in the schedule; of a repeated one the second place, as the reference has it."""
        found = np.flatnonzero(np.abs(self.timesteps.astype(np.float64) - timestep) <= TIMESTEP_TOLERANCE)
        return int(found[min(1, len(found) - 1)]) if len(found) else None

    def _checked(self, name: str, array: Array) -> Float32:
        if not isinstance(array, np.ndarray) or array.dtype not in SAMPLE_DTYPES or array.ndim < 1:
            found = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
            raise RequestError(f"{name} is {found}; expected a float32 or float16 NumPy array")
        return array.astype(np.float32, copy=False)


def _check_finite(**arrays: Float32) -> None:
    """Names the first of a step's arrays that is not finite."""
    for name, array in arrays.items():
        if not np.all(np.isfinite(array)):
            why = (
                "the schedule has no signal, or no noise, left to divide by"
                if name == "result"
                else "nothing to step on"
            )
            raise RequestError(f"{name} of the step holds values that are not finite: {why}")


def _spells(value: object, default: object) -> bool:
    """Whether a saved value is how `settings` writes an infinite default, which JSON has no number for."""
    return isinstance(value, str) and isinstance(default, float) and math.isinf(default) and value == str(default)


def check_steps(num_inference_steps: int | None) -> int:
    """Returns the number of steps; raises RequestError where it is none, or not an integer of 1 or more."""
    steps = as_integer(num_inference_steps)
    if steps is None or not 1 <= steps <= MAX_STEPS:
        raise RequestError(f"num_inference_steps is {num_inference_steps!r}; expected an integer from 1 to {MAX_STEPS}")
    return steps
