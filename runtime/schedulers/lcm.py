"""LCM: Latent Consistency Models (Luo et al., arXiv:2310.04378): jump to x0, then noise it to the next timestep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from t2v_rt.errors import RequestError
from t2v_rt.runtime.schedulers.alpha import AlphaScheduler, BetaConfig, BetaSchedule, Spacing
from t2v_rt.runtime.schedulers.base import Draw
from t2v_rt.runtime.schedulers.blockwise import blockwise
from t2v_rt.runtime.schedulers.predictions import Prediction

Float32 = NDArray[np.float32]
SIGMA_DATA = 0.5  # standard deviation of the data, of the boundary condition's scalings


@dataclass(frozen=True)
class LCMConfig(BetaConfig):
    """Settings, names and defaults as in diffusers."""

    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: BetaSchedule = "scaled_linear"
    original_inference_steps: int = 50
    clip_sample: bool = False
    clip_sample_range: float = 1.0
    set_alpha_to_one: bool = True
    prediction_type: Prediction = "epsilon"
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    timestep_spacing: Spacing = "leading"
    timestep_scaling: float = 10.0
    rescale_betas_zero_snr: bool = False


class LCMScheduler(AlphaScheduler[LCMConfig]):
    """Few-step sampler of distilled models that predict noise, data or velocity; diffusers' class of the same name.

    Timesteps are a subset of the `original_inference_steps` that the model was distilled on.
    """

    Config = LCMConfig
    custom: ClassVar[frozenset[str]] = frozenset({"timesteps"})

    def _schedule(
        self, steps: int, sigmas: Sequence[float] | None, timesteps: Sequence[float] | None, mu: float | None
    ) -> None:
        original, train = self.config.original_inference_steps, self.config.num_train_timesteps
        if original > train:
            raise RequestError(
                f"original_inference_steps is {original}; the model was trained on {train} timesteps only: set it to "
                f"{train} or less"
            )
        if timesteps is not None or steps > self.config.num_train_timesteps:
            return super()._schedule(steps, sigmas, timesteps, mu)
        if steps > original:
            raise RequestError(
                f"num_inference_steps is {steps}; the model was distilled on original_inference_steps, {original}"
            )
        trained = np.arange(original, 0, -1) * (self.config.num_train_timesteps // original) - 1
        self.timesteps = trained[np.linspace(0, original, steps, endpoint=False).astype(np.int64)].astype(np.int64)
        self.num_inference_steps = steps
        return None

    def _advance(self, i: int, model_output: Float32, sample: Float32, draw: Draw, eta: float) -> Float32:
        t = self.timesteps[i]
        scaled = np.float32(t) * np.float32(self.config.timestep_scaling)
        square = scaled * scaled + np.float32(SIGMA_DATA**2)
        c_skip, c_out = np.float32(SIGMA_DATA**2) / square, scaled / np.sqrt(square)
        x0 = self._x0(model_output, sample, self.alphas_cumprod[t])
        if i == len(self.timesteps) - 1:
            return blockwise(lambda x, x0: c_out * x0 + c_skip * x, sample, x0)
        abar = self._alpha(int(self.timesteps[i + 1]))
        alpha, sigma = np.sqrt(abar), np.sqrt(1 - abar)
        return blockwise(lambda x, x0, z: alpha * (c_out * x0 + c_skip * x) + sigma * z, sample, x0, draw())
