"""Samplers over noise levels (Karras et al., arXiv:2206.00364), whose sample is x0 + sigma epsilon."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t2v_rt.errors import RequestError
from t2v_rt.runtime.schedulers.alpha import betas_of
from t2v_rt.runtime.schedulers.base import Array, C, Scheduler
from t2v_rt.runtime.schedulers.blockwise import blockwise
from t2v_rt.runtime.schedulers.config import SchedulerConfig
from t2v_rt.runtime.schedulers.noise_schedules import (
    NEARLY_ZERO_ALPHA,
    beta_sigmas,
    cumulative_alphas,
    exponential_sigmas,
    karras_sigmas,
    noise_levels,
)

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
SPACINGS: dict[str, Callable[[float, float, int], Float64]] = {
    "use_karras_sigmas": karras_sigmas,
    "use_exponential_sigmas": exponential_sigmas,
    "use_beta_sigmas": beta_sigmas,
}


def spacing_of(config: SchedulerConfig) -> str | None:
    """Which of the spacings of sigmas a config asks for.

    Raises:
        RequestError: more than one.
    """
    chosen = [name for name in SPACINGS if config.get(name)]
    if len(chosen) > 1:
        raise RequestError(f"{' and '.join(chosen)} exclude each other; set one of them")
    return chosen[0] if chosen else None


def spaced_sigmas(config: SchedulerConfig, levels: NDArray[Any], steps: int) -> Float64:
    """Sigmas in the config's spacing, between its sigma_max and sigma_min, or the first and last of falling levels."""
    spacing = spacing_of(config)
    assert spacing is not None
    highest, lowest = config.get("sigma_max"), config.get("sigma_min")
    highest = levels[0].item() if highest is None else highest
    lowest = levels[-1].item() if lowest is None else lowest
    return SPACINGS[spacing](highest, lowest, steps)


def training_levels(config: SchedulerConfig) -> Float32:
    """Noise levels of all training timesteps, rising."""
    alphas = cumulative_alphas(betas_of(config))  # type: ignore[arg-type]
    if config.get("rescale_betas_zero_snr"):
        alphas[-1] = NEARLY_ZERO_ALPHA
    return noise_levels(alphas)


class SigmaScheduler(Scheduler[C]):
    """Base of the Euler and Heun samplers: input scaled by the noise level, samples noised by adding."""

    def _prepare(self) -> None:
        self._levels = training_levels(self.config)

    @property
    def init_noise_sigma(self) -> float:
        """The largest sigma; with leading timesteps, which do not begin at pure noise, sqrt(sigma^2 + 1)."""
        highest = np.max(self.sigmas if len(self.sigmas) else self._levels)
        leading = self.config["timestep_spacing"] == "leading"
        return float(np.sqrt(highest * highest + 1) if leading else highest)

    def scale_model_input(self, sample: Array, timestep: float | None = None) -> Array:
        """The sample over sqrt(sigma^2 + 1), which has the variance of the training data.

        Args:
            sample: float (B, C, …), the current sample; not changed.
            timestep: the schedule's current timestep; None for the current step's.

        Returns:
            The denoiser's input, in the dtype and shape of `sample`.

        Raises:
            RequestError: `set_timesteps` was not called, or the timestep is not the schedule's.
        """
        sigma = self.sigmas[self._locate(timestep)]
        scale = np.sqrt(sigma * sigma + 1)
        scaled = blockwise(lambda x: x / scale, self._checked("sample", sample))
        return scaled.astype(sample.dtype, copy=False)

    def _data(self, m: Float32, x: Float32, sigma: Any) -> Float32:
        """x0 from a prediction; at these samples, alpha is 1 and the model has seen x / sqrt(sigma^2 + 1)."""
        kind = self.config["prediction_type"]
        if kind == "epsilon":
            return blockwise(lambda x, m: x - sigma * m, x, m)
        if kind == "v_prediction":
            square = sigma * sigma + 1
            of_m = -sigma / np.sqrt(square)
            return blockwise(lambda x, m: m * of_m + x / square, x, m)
        return m

    def _signal_and_noise(self, timestep: float) -> tuple[Any, Any]:
        i = self._index_of(timestep) if len(self.timesteps) else None
        if i is None:
            raise RequestError(f"timestep {timestep:g} is not in the schedule; give one of the scheduler's timesteps")
        return np.float32(1.0), self.sigmas[i]
