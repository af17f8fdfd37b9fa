"""CogVideoX's two samplers (Yang et al., arXiv:2408.06072): schedules whose signal-to-noise ratio is shifted.

The DDIM one is first-order. The DPM one is DPM-Solver++(2M) with noise (arXiv:2211.01095), lambda = log(alpha / sigma).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t2v_rt.runtime.schedulers.alpha import AlphaScheduler, BetaConfig, BetaSchedule, Spacing
from t2v_rt.runtime.schedulers.base import Draw
from t2v_rt.runtime.schedulers.blockwise import blockwise
from t2v_rt.runtime.schedulers.noise_schedules import (
    cumulative_alphas,
    exp,
    expm1,
    log,
    make_betas,
    rescaled_to_zero_snr,
)
from t2v_rt.runtime.schedulers.predictions import Prediction, data_prediction

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class CogVideoXConfig(BetaConfig):
    """Settings of both, names and defaults as in diffusers; `clip_sample*` and `sample_max_value` have no effect."""

    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: BetaSchedule = "scaled_linear"
    clip_sample: bool = True
    set_alpha_to_one: bool = True
    prediction_type: Prediction = "epsilon"
    clip_sample_range: float = 1.0
    sample_max_value: float = 1.0
    timestep_spacing: Spacing = "leading"
    rescale_betas_zero_snr: bool = False
    snr_shift_scale: float = 3.0


class CogVideoXScheduler(AlphaScheduler[CogVideoXConfig]):
    """What the two share: the schedule. `eta` is taken and has no effect, as in diffusers."""

    Config = CogVideoXConfig
    takes_eta = True

    def _cumulative_alphas(self) -> NDArray[Any]:
        config = self.config
        betas: NDArray[Any]
        if config.beta_schedule == "scaled_linear" and config.trained_betas is None:  # in float64, in the reference too
            ends = config.beta_start**0.5, config.beta_end**0.5
            betas = np.linspace(*ends, config.num_train_timesteps) ** 2
        else:
            ends = config.beta_start, config.beta_end
            betas = make_betas(config.beta_schedule, *ends, config.num_train_timesteps, config.trained_betas)
        abar = cumulative_alphas(betas)
        scale = abar.dtype.type(config.snr_shift_scale)
        abar = abar / (scale + (1 - scale) * abar)
        return rescaled_to_zero_snr(abar) if config.rescale_betas_zero_snr else abar

    def _x0(self, m: Float32, x: Float32, alpha_cumprod: Any) -> Float32:
        return data_prediction(self.config.prediction_type, m, x, np.sqrt(alpha_cumprod), np.sqrt(1 - alpha_cumprod))


class CogVideoXDDIMScheduler(CogVideoXScheduler):
    """Deterministic first-order sampler; diffusers' class of the same name."""

    stateless = True

    def _advance(self, i: int, model_output: Float32, sample: Float32, draw: Draw, eta: float) -> Float32:
        t = int(self.timesteps[i])
        abar, abar_prev = self.alphas_cumprod[t], self._alpha(self._previous_on_grid(t))
        a = np.sqrt((1 - abar_prev) / (1 - abar))
        b = np.sqrt(abar_prev) - np.sqrt(abar) * a
        a_t, b_t = np.float32(a), np.float32(b)
        x0 = self._x0(model_output, sample, abar)
        return blockwise(lambda x, x0: a_t * x + b_t * x0, sample, x0)


class CogVideoXDPMScheduler(CogVideoXScheduler):
    """Stochastic second-order sampler; diffusers' class of the same name, which is handed the last x0 by its caller."""

    def _start(self) -> None:
        super()._start()
        self._last: tuple[int, Float32] | None = None

    def _advance(self, i: int, model_output: Float32, sample: Float32, draw: Draw, eta: float) -> Float32:
        t = int(self.timesteps[i])
        t_prev = self._previous_on_grid(t)
        abar, abar_prev = self.alphas_cumprod[t], self._alpha(t_prev)
        lam, lam_prev = self._lambda(abar), self._lambda(abar_prev)
        h = lam_prev - lam
        of_x = np.float32(np.sqrt((1 - abar_prev) / (1 - abar)) * exp(-h))
        of_x0 = np.float32(expm1(-2 * h) * np.sqrt(abar_prev))
        of_noise = np.float32(np.sqrt(1 - abar_prev) * np.sqrt(1 - exp(-2 * h)))
        x0 = self._x0(model_output, sample, abar)
        last, self._last = self._last, (t, x0)
        noise = draw()
        if last is None or t_prev < 0:
            return blockwise(lambda x, x0, z: of_x * x - of_x0 * x0 + of_noise * z, sample, x0, noise)
        r = (lam - self._lambda(self.alphas_cumprod[last[0]])) / h
        newer, older = np.float32(1 + 1 / (2 * r)), np.float32(1 / (2 * r))
        noise = draw()  # the reference has used one draw for a first-order result that it throws away

        def second_order(x: Float32, x0: Float32, x0_last: Float32, z: Float32) -> Any:
            return of_x * x - of_x0 * (newer * x0 - older * x0_last) + of_noise * z

        return blockwise(second_order, sample, x0, last[1], noise)

    @staticmethod
    def _lambda(abar: Any) -> Any:
        return log(np.sqrt(abar / (1 - abar)))
