"""DDPM: Denoising Diffusion Probabilistic Models (Ho et al., arXiv:2006.11239).

Each step draws from q(x_{t-1} | x_t, x0), equations 6 and 7, with the model's x0 and a variance by `variance_type`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from t2v_rt.errors import RequestError
from t2v_rt.runtime.schedulers.alpha import AlphaScheduler, BetaConfig, Spacing
from t2v_rt.runtime.schedulers.base import Draw
from t2v_rt.runtime.schedulers.blockwise import blockwise
from t2v_rt.runtime.schedulers.noise_schedules import exp, log
from t2v_rt.runtime.schedulers.predictions import Prediction

Float32 = NDArray[np.float32]
LEAST_VARIANCE = np.float32(1e-20)


@dataclass(frozen=True)
class DDPMConfig(BetaConfig):
    """Settings, names and defaults as in diffusers."""

    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "laplace", "sigmoid"] = "linear"  # type: ignore[assignment]
    variance_type: Literal["fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range"] = "fixed_small"
    clip_sample: bool = True
    prediction_type: Prediction = "epsilon"
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    clip_sample_range: float = 1.0
    sample_max_value: float = 1.0
    timestep_spacing: Spacing = "leading"
    rescale_betas_zero_snr: bool = False


class DDPMScheduler(AlphaScheduler[DDPMConfig]):
    """Ancestral sampler; diffusers' class of the same name, but for `fixed_large_log`, which gives NaN there."""

    Config = DDPMConfig
    custom: ClassVar[frozenset[str]] = frozenset({"timesteps"})
    stateless = True

    def _advance(self, i: int, model_output: Float32, sample: Float32, draw: Draw, eta: float) -> Float32:
        t = int(self.timesteps[i])
        t_prev = int(self.timesteps[i + 1]) if i + 1 < len(self.timesteps) else -1
        abar, abar_prev = self.alphas_cumprod[t], self._alpha(t_prev)
        alpha = abar / abar_prev
        beta = 1 - alpha
        m, predicted = self._split(model_output, sample)
        x0 = self._x0(m, sample, abar)
        of_x0 = np.sqrt(abar_prev) * beta / (1 - abar)
        of_x = np.sqrt(alpha) * (1 - abar_prev) / (1 - abar)
        if t <= 0:
            return blockwise(lambda x, x0: of_x0 * x0 + of_x * x, sample, x0)
        variance = np.maximum((1 - abar_prev) / (1 - abar) * beta, LEAST_VARIANCE)
        noise = draw()
        if predicted is None:
            std = self._deviation(variance, beta)
            return blockwise(lambda x, x0, z: of_x0 * x0 + of_x * x + std * z, sample, x0, noise)
        if self.config.variance_type == "learned":
            return blockwise(lambda x, x0, z, v: of_x0 * x0 + of_x * x + np.sqrt(v) * z, sample, x0, noise, predicted)
        small, large = log(variance), log(beta)

        def learned_range(x: Float32, x0: Float32, z: Float32, v: Float32) -> Any:
            frac = (v + 1) / 2
            return of_x0 * x0 + of_x * x + np.exp(0.5 * (frac * large + (1 - frac) * small)) * z

        return blockwise(learned_range, sample, x0, noise, predicted)

    def _deviation(self, variance: Any, beta: Any) -> Any:
        """The noise's standard deviation where it is not predicted."""
        if self.config.variance_type == "fixed_small_log":
            return exp(np.float32(0.5) * log(variance))
        return np.sqrt(beta if self.config.variance_type == "fixed_large" else variance)

    def _split(self, model_output: Float32, sample: Float32) -> tuple[Float32, Float32 | None]:
        """The prediction, and the variance's where the model has one in further channels."""
        if not self.config.variance_type.startswith("learned"):
            return model_output, None
        channels = sample.shape[1] if sample.ndim > 1 else 0
        if model_output.shape == sample.shape:
            raise RequestError(
                f"variance_type is {self.config.variance_type!r} and model_output has {channels} channels; expected "
                f"{2 * channels}: the prediction, then its variance"
            )
        return model_output[:, :channels], model_output[:, channels:]

    def _learned_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        learned = self.config.variance_type.startswith("learned") and len(shape) > 1
        return (shape[0], 2 * shape[1], *shape[2:]) if learned else shape
