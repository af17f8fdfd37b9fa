"""Base of the multistep solvers in lambda, the half log signal-to-noise ratio: DPM-Solver, DEIS and UniPC.

A noise level sigma stands for alpha_t = 1 / sqrt(sigma^2 + 1), sigma_t = sigma alpha_t on variance-preserving models,
and for alpha_t = 1 - sigma, sigma_t = sigma on flow models.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from t2v_rt.errors import RequestError
from t2v_rt.runtime.schedulers.alpha import BetaConfig
from t2v_rt.runtime.schedulers.base import Scheduler
from t2v_rt.runtime.schedulers.noise_schedules import log, shift_sigmas, timesteps_of_sigmas
from t2v_rt.runtime.schedulers.predictions import FlowOrPrediction, data_prediction, threshold
from t2v_rt.runtime.schedulers.sigma import spaced_sigmas, spacing_of, training_levels

Float32 = NDArray[np.float32]
MOST_REMEMBERED = 4096  # noise levels, or steps: of some dozens of schedules


@dataclass(frozen=True)
class MultistepConfig(BetaConfig):
    """Settings that the multistep solvers share, names and defaults as in diffusers."""

    solver_order: int = 2
    prediction_type: FlowOrPrediction = "epsilon"
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    lower_order_final: bool = True
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    use_flow_sigmas: bool = False
    flow_shift: float = 1.0
    use_dynamic_shifting: bool = False
    time_shift_type: Literal["exponential"] = "exponential"

    def __post_init__(self) -> None:
        super().__post_init__()
        spacing_of(self)
        if not 1 <= self.solver_order <= 3 or self.flow_shift <= 0:
            raise RequestError(
                f"solver_order is {self.solver_order}, flow_shift {self.flow_shift}; expected 1 to 3, and more than 0"
            )


def alpha_sigma(sigma: Any, flow: bool) -> tuple[Any, Any]:
    """alpha_t and sigma_t of a noise level, of a flow model or a variance-preserving one."""
    if flow:
        return 1 - sigma, sigma
    alpha = 1 / np.sqrt(sigma * sigma + 1)
    return alpha, sigma * alpha


@lru_cache(MOST_REMEMBERED)
def level(sigma: np.float32, flow: bool) -> tuple[Any, Any, Any]:
    """alpha_t, sigma_t and lambda = ln alpha_t - ln sigma_t; remembered, as steps and calls share their schedules."""
    alpha, sigma_t = alpha_sigma(sigma, flow)
    return alpha, sigma_t, log(alpha) - log(sigma_t)


M = TypeVar("M", bound=MultistepConfig)


class MultistepScheduler(Scheduler[M]):
    """What the multistep solvers share: schedules, alpha and sigma of a level, history of predictions."""

    def _prepare(self) -> None:
        self._levels = training_levels(self.config)

    def _start(self) -> None:
        super()._start()
        self._m: deque[Float32] = deque(maxlen=self.config.solver_order)

    def _spaced(self, steps: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Sigmas in a spacing of their own, and their fractional timesteps."""
        sigmas = spaced_sigmas(self.config, self._levels[::-1], steps)
        return sigmas, timesteps_of_sigmas(sigmas, np.log(self._levels))

    def _flow(self, steps: int, shift: float) -> tuple[NDArray[Any], NDArray[Any]]:
        """Flow sigmas from nearly 1 downward, and their fractional timesteps."""
        train = self.config.num_train_timesteps
        rising = shift_sigmas(1.0 - np.linspace(1, 1 / train, steps + 1), shift)
        sigmas = rising[::-1][:-1].copy()
        return sigmas, sigmas * train

    def _on_grid(self, grid: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Training levels at whole timesteps, and these; one outside the range has the level of its end."""
        return np.interp(grid, np.arange(len(self._levels)), self._levels), grid

    def _finish(self, sigmas: NDArray[Any], last: Any, timesteps: NDArray[Any]) -> None:
        self.sigmas = np.append(sigmas, last).astype(np.float32)
        self.timesteps = timesteps.astype(np.int64)
        self.num_inference_steps = len(timesteps)

    def _alpha_sigma(self, sigma: Any) -> tuple[Any, Any]:
        return alpha_sigma(sigma, self.config.use_flow_sigmas)

    def _lambda(self, i: int) -> tuple[Any, Any, Any]:
        """alpha, sigma and lambda = ln alpha - ln sigma of the schedule's i-th level, rounded as the reference does."""
        return level(self.sigmas[i], self.config.use_flow_sigmas)

    def _x0(self, i: int, m: Float32, x: Float32) -> Float32:
        alpha, sigma = self._alpha_sigma(self.sigmas[i])
        kind = self.config.prediction_type
        x0 = data_prediction(kind, m, x, alpha, self.sigmas[i] if kind == "flow_prediction" else sigma)
        return self._thresholded(x0) if self.config.thresholding else x0

    def _thresholded(self, x0: Float32) -> Float32:
        return threshold(x0, self.config.dynamic_thresholding_ratio, self.config.sample_max_value)

    def _signal_and_noise(self, timestep: float) -> tuple[Any, Any]:
        i = self._index_of(timestep) if len(self.timesteps) else None
        if i is None:
            raise RequestError(f"timestep {timestep:g} is not in the schedule; give one of the scheduler's timesteps")
        return self._alpha_sigma(self.sigmas[i])
