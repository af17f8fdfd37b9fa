"""DDIM: Denoising Diffusion Implicit Models (Song et al., arXiv:2010.02502), equations 12 and 16."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t2v_rt.options import documented_by
from t2v_rt.runtime.schedulers.alpha import AlphaScheduler, BetaConfig, Spacing
from t2v_rt.runtime.schedulers.base import Array, Draw, Generators, SchedulerOutput
from t2v_rt.runtime.schedulers.blockwise import blockwise
from t2v_rt.runtime.schedulers.predictions import Prediction

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class DDIMConfig(BetaConfig):
    """Settings, names and defaults as in diffusers."""

    clip_sample: bool = True
    set_alpha_to_one: bool = True
    prediction_type: Prediction = "epsilon"
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    clip_sample_range: float = 1.0
    sample_max_value: float = 1.0
    timestep_spacing: Spacing = "leading"
    rescale_betas_zero_snr: bool = False


class DDIMScheduler(AlphaScheduler[DDIMConfig]):
    """Deterministic at eta 0, DDPM's variance at eta 1; diffusers' class of the same name."""

    Config = DDIMConfig
    takes_eta = True
    stateless = True

    @documented_by(AlphaScheduler.step)
    def step(
        self,
        model_output: Array,
        timestep: float,
        sample: Array,
        *,
        generator: Generators = None,
        eta: float = 0.0,
        variance_noise: Array | None = None,
        use_clipped_model_output: bool = False,
    ) -> SchedulerOutput:
        """Advances the sample by one step of the schedule.

        Args:
            eta: share of DDPM's noise that is added, 0 to 1.
            use_clipped_model_output: derives epsilon from the clipped x0 again (GLIDE).

        Returns:
            The next sample, in the dtype of `sample`.

        Raises:
            RequestError: `set_timesteps` was not called, all steps are made, or an argument does not fit.
        """
        advance = partial(self._towards, use_clipped_model_output)
        return self._make_step(advance, model_output, timestep, sample, generator, eta, variance_noise)

    def _towards(
        self, from_clipped: bool, i: int, model_output: Float32, sample: Float32, draw: Draw, eta: float
    ) -> Float32:
        kind = self.config.prediction_type
        t = int(self.timesteps[i])
        abar, abar_prev = self.alphas_cumprod[t], self._alpha(self._previous_on_grid(t))
        a, b = np.sqrt(abar), np.sqrt(1 - abar)
        variance = (1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)
        std = np.float32(eta) * np.sqrt(variance)
        of_x0 = np.sqrt(abar_prev)
        of_epsilon = np.sqrt(np.maximum(1 - abar_prev - std * std, 0))  # rounded below 0 at eta 1 and no signal
        x0 = self._x0(model_output, sample, abar)

        def epsilon(x: Float32, m: Float32, x0: Float32) -> Any:
            if from_clipped:
                return (x - a * x0) / b
            if kind == "v_prediction":
                return a * m + b * x
            return m if kind == "epsilon" else (x - a * m) / b

        def formula(x: Float32, m: Float32, x0: Float32, *z: Float32) -> Any:
            moved = of_x0 * x0 + of_epsilon * epsilon(x, m, x0)
            return moved + std * z[0] if z else moved

        noise: tuple[Any, ...] = (draw(),) if eta > 0 else ()
        return blockwise(formula, sample, model_output, x0, *noise)
