"""Ancestral sampling with Euler steps (k-diffusion's `sample_euler_ancestral`): to sigma_down, then noised up again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from t2v_rt.runtime.schedulers.alpha import BetaConfig
from t2v_rt.runtime.schedulers.base import Draw
from t2v_rt.runtime.schedulers.blockwise import blockwise
from t2v_rt.runtime.schedulers.noise_schedules import even_timesteps
from t2v_rt.runtime.schedulers.sigma import SigmaScheduler

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class EulerAncestralConfig(BetaConfig):
    """Settings, names and defaults as in diffusers."""

    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    rescale_betas_zero_snr: bool = False


class EulerAncestralDiscreteScheduler(SigmaScheduler[EulerAncestralConfig]):
    """Stochastic Euler sampler of noise-predicting models; diffusers' class of the same name."""

    Config = EulerAncestralConfig

    def _schedule(
        self, steps: int, sigmas: Sequence[float] | None, timesteps: Sequence[float] | None, mu: float | None
    ) -> None:
        config = self.config
        self.timesteps = even_timesteps(config.timestep_spacing, steps, config.num_train_timesteps, config.steps_offset)
        between = np.interp(self.timesteps, np.arange(len(self._levels)), self._levels)
        self.sigmas = np.append(between, 0.0).astype(np.float32)
        self.num_inference_steps = steps

    def _advance(self, i: int, model_output: Float32, sample: Float32, draw: Draw, eta: float) -> Float32:
        sigma, to = self.sigmas[i], self.sigmas[i + 1]
        square, square_to = sigma * sigma, to * to
        up = np.sqrt(square_to * (square - square_to) / square)
        down = np.sqrt(square_to - up * up)
        dt = down - sigma
        x0 = self._data(model_output, sample, sigma)
        return blockwise(lambda x, x0, z: x + (x - x0) / sigma * dt + z * up, sample, x0, draw())
