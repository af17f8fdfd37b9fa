"""Euler's method on a flow-matching model (Lipman et al., arXiv:2210.02747; Esser et al., arXiv:2403.03206).

The model predicts the velocity v = noise - x0; the sample moves along it to the next sigma: x += (sigma' - sigma) v.
With `stochastic_sampling` it jumps to x0 and is noised to the next sigma, as distilled few-step models want it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from t2v_rt.errors import RequestError
from t2v_rt.runtime.schedulers.base import Draw, Scheduler
from t2v_rt.runtime.schedulers.blockwise import blockwise
from t2v_rt.runtime.schedulers.config import SchedulerConfig
from t2v_rt.runtime.schedulers.noise_schedules import dynamic_shift, falling, shift_sigmas, stretch_to_terminal
from t2v_rt.runtime.schedulers.sigma import spaced_sigmas, spacing_of

Float32 = NDArray[np.float32]
Array = NDArray[Any]


@dataclass(frozen=True)
class FlowMatchEulerConfig(SchedulerConfig):
    """Settings, names and defaults as in diffusers; `base_*` and `max_*` are for callers that compute mu."""

    num_train_timesteps: int = 1000
    shift: float = 1.0
    use_dynamic_shifting: bool = False
    base_shift: float | None = 0.5
    max_shift: float | None = 1.15
    base_image_seq_len: int | None = 256
    max_image_seq_len: int | None = 4096
    invert_sigmas: bool = False
    shift_terminal: float | None = None
    use_karras_sigmas: bool | None = False
    use_exponential_sigmas: bool | None = False
    use_beta_sigmas: bool | None = False
    time_shift_type: Literal["exponential", "linear"] = "exponential"
    stochastic_sampling: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        spacing_of(self)
        if self.num_train_timesteps < 1 or self.shift <= 0:
            raise RequestError(
                f"num_train_timesteps is {self.num_train_timesteps}, shift {self.shift}; expected positive numbers"
            )


class FlowMatchEulerDiscreteScheduler(Scheduler[FlowMatchEulerConfig]):
    """Euler sampler for flow models; diffusers' class of the same name. Timesteps are float32.

    Without custom values the timesteps fall evenly between the shifted end points, then all are shifted again, as the
    reference does. Custom timesteps go to the model as they are; their sigmas are shifted.
    """

    Config = FlowMatchEulerConfig
    custom: ClassVar[frozenset[str]] = frozenset({"sigmas", "timesteps", "mu"})

    def _schedule(
        self, steps: int, sigmas: Sequence[float] | None, timesteps: Sequence[float] | None, mu: float | None
    ) -> None:
        config = self.config
        if (mu is not None) != config.use_dynamic_shifting:
            raise RequestError("mu goes with use_dynamic_shifting; give both or neither")
        train = config.num_train_timesteps
        given: Float32 | None = None
        flow: Array
        if timesteps is not None:
            given = falling("timesteps", timesteps, lowest=train * 1e-6, highest=train).astype(np.float32)
            flow = given / np.float32(train)
        elif sigmas is not None:
            flow = falling("sigmas", sigmas, lowest=1e-6, highest=1.0).astype(np.float32)
        else:
            flow = np.linspace(*self._end_timesteps(), steps) / train
        flow = dynamic_shift(flow, mu, config.time_shift_type) if mu is not None else shift_sigmas(flow, config.shift)
        if config.shift_terminal:
            flow = stretch_to_terminal(flow, config.shift_terminal)
        if spacing_of(config):
            flow = spaced_sigmas(config, flow, len(flow))
        self._finish(flow.astype(np.float32), given)

    def _finish(self, sigmas: Float32, given: Float32 | None) -> None:
        train = np.float32(self.config.num_train_timesteps)
        self.timesteps = sigmas * train if given is None else given
        end = np.float32(0.0)
        if self.config.invert_sigmas:
            sigmas = np.float32(1.0) - sigmas
            self.timesteps, end = sigmas * train, np.float32(1.0)
        self.sigmas = np.append(sigmas, end)
        self.num_inference_steps = len(sigmas)

    def _end_timesteps(self) -> tuple[float, float]:
        """First and last training timestep after the constructor's shift, in float32 steps as the reference."""
        n = self.config.num_train_timesteps
        ends = np.array([n, 1], np.float32) / np.float32(n)
        if not self.config.use_dynamic_shifting:
            ends = shift_sigmas(ends, self.config.shift).astype(np.float32)
        return float(ends[0]) * n, float(ends[1]) * n

    def _advance(self, i: int, model_output: Float32, sample: Float32, draw: Draw, eta: float) -> Float32:
        sigma, following = self.sigmas[i], self.sigmas[i + 1]
        if self.config.stochastic_sampling:
            keep = 1 - following
            return blockwise(lambda x, v, z: keep * (x - sigma * v) + following * z, sample, model_output, draw())
        dt = following - sigma
        return blockwise(lambda x, v: x + dt * v, sample, model_output)

    def _signal_and_noise(self, timestep: float) -> tuple[Any, Any]:
        i = self._index_of(timestep) if len(self.timesteps) else None
        if i is None:
            raise RequestError(f"timestep {timestep:g} is not in the schedule; give one of the scheduler's timesteps")
        return 1 - self.sigmas[i], self.sigmas[i]

    def scale_noise(self, sample: Array, timestep: Array, noise: Array) -> Array:
        """Noises samples: `add_noise` under the name, and with the order of arguments, that diffusers' class has.

        Args:
            sample: float (B, …).
            timestep: (B,), timesteps of the schedule, one for each sample of the batch.
            noise: float, of the shape of `sample`.

        Returns:
            The noisy samples, in the dtype of `sample`.

        Raises:
            RequestError: an unknown timestep, or shapes that differ.
        """
        return self.add_noise(sample, noise, timestep)
