"""Euler's method on a flow-matching model (Lipman et al., arXiv:2210.02747; Esser et al., arXiv:2403.03206).

The model predicts the velocity v = noise - x0; the sample moves along it to the next sigma: x += (sigma' - sigma) v.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from t2v_rt.errors import RequestError
from t2v_rt.runtime.noise import Generator
from t2v_rt.runtime.scheduler_base import (
    Array,
    Scheduler,
    SchedulerConfig,
    add_flow_noise,
    check_sigmas,
    check_steps,
    dynamic_shift,
    shift_sigmas,
    stretch_to_terminal,
)

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class FlowMatchEulerConfig(SchedulerConfig):
    """Settings, names and defaults as in diffusers."""

    num_train_timesteps: int = 1000
    shift: float = 1.0
    use_dynamic_shifting: bool = False
    invert_sigmas: bool = False
    shift_terminal: float | None = None
    time_shift_type: Literal["exponential", "linear"] = "exponential"
    stochastic_sampling: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_train_timesteps < 1 or self.shift <= 0:
            raise RequestError(
                f"num_train_timesteps {self.num_train_timesteps}, shift {self.shift}; expected positive numbers"
            )


class FlowMatchEulerDiscreteScheduler(Scheduler[FlowMatchEulerConfig]):
    """Euler sampler for flow models; diffusers' class of the same name. Timesteps are float32."""

    Config = FlowMatchEulerConfig

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        *,
        sigmas: Sequence[float] | None = None,
        timesteps: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Prepares the schedule.

        Without custom values the timesteps fall evenly between the shifted end points, then all are shifted again, as
        the reference does.

        Args:
            num_inference_steps: number of steps.
            sigmas: custom ones, before the shift.
            timesteps: custom ones, given to the model as they are; their sigmas are shifted.
            mu: the shift, with `use_dynamic_shifting`.

        Raises:
            RequestError: no or invalid steps, sigmas or timesteps, or mu missing or surplus.
        """
        config = self.config
        if (mu is not None) != config.use_dynamic_shifting:
            raise RequestError("mu goes with use_dynamic_shifting: give both or neither")
        if sigmas is not None and timesteps is not None:
            raise RequestError("sigmas and timesteps were both given; give one of them")
        given: NDArray[np.float32] | None = None
        flow: Array
        if timesteps is not None:
            as_sigmas = [float(t) / config.num_train_timesteps for t in timesteps]
            check_sigmas(as_sigmas, num_inference_steps)
            given = np.asarray(timesteps, np.float32)
            flow = given / np.float32(config.num_train_timesteps)
        elif sigmas is not None:
            flow = check_sigmas(sigmas, num_inference_steps).astype(np.float32)
        else:
            first, last = self._end_timesteps()
            flow = np.linspace(first, last, check_steps(num_inference_steps)) / config.num_train_timesteps
        shifted = self._shifted(flow, mu).astype(np.float32)
        self._finish(shifted, given)

    def _shifted(self, flow: Array, mu: float | None) -> Array:
        config = self.config
        if mu is not None:
            flow = dynamic_shift(flow, mu, config.time_shift_type)
        else:
            flow = shift_sigmas(flow, config.shift)
        return flow if not config.shift_terminal else stretch_to_terminal(flow, config.shift_terminal)

    def _finish(self, sigmas: Float32, given: Float32 | None) -> None:
        train = np.float32(self.config.num_train_timesteps)
        self.timesteps = sigmas * train if given is None else given
        end = np.float32(0.0)
        if self.config.invert_sigmas:
            sigmas = np.float32(1.0) - sigmas
            self.timesteps, end = sigmas * train, np.float32(1.0)
        self.sigmas = np.append(sigmas, end)
        self.num_inference_steps = len(sigmas)
        self._reset()

    def _end_timesteps(self) -> tuple[float, float]:
        """First and last training timestep after the constructor's shift, in float32 steps as the reference."""
        n = self.config.num_train_timesteps
        ends = np.array([n, 1], np.float32) / np.float32(n)
        if not self.config.use_dynamic_shifting:
            ends = shift_sigmas(ends, self.config.shift).astype(np.float32)
        return float(ends[0]) * n, float(ends[1]) * n

    def _advance(self, model_output: Float32, sample: Float32, generator: Generator | None, eta: float) -> Float32:
        sigma, following = self.sigmas[self._step_index], self.sigmas[self._step_index + 1]
        if self.config.stochastic_sampling:
            if generator is None:
                raise RequestError("stochastic_sampling needs a generator")
            x0 = sample - sigma * model_output
            noise: Float32 = generator.randn(sample.shape)
            stochastic: Float32 = (np.float32(1.0) - following) * x0 + following * noise
            return stochastic
        result: Float32 = sample + (following - sigma) * model_output
        return result

    def add_noise(self, original_samples: Array, noise: Array, timesteps: Array) -> Array:
        """Samples noised to timesteps of the schedule; see `add_flow_noise`."""
        return add_flow_noise(original_samples, noise, timesteps, self.timesteps, self.sigmas)

    scale_noise = add_noise
