"""PNDM: Pseudo Numerical Methods for Diffusion Models on Manifolds (Liu et al., arXiv:2202.09778).

Runge-Kutta steps of the transfer function (equation 11), then linear multistep ones (equation 12); e are the noise
predictions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from t2v_rt.errors import RequestError
from t2v_rt.runtime.schedulers.alpha import AlphaScheduler, BetaConfig, Spacing, check_training_range
from t2v_rt.runtime.schedulers.base import Draw
from t2v_rt.runtime.schedulers.blockwise import blockwise
from t2v_rt.runtime.schedulers.noise_schedules import timestep_grid

Float32 = NDArray[np.float32]
ORDER = 4
SIXTH, THIRD = np.float32(1 / 6), np.float32(1 / 3)


@dataclass(frozen=True)
class PNDMConfig(BetaConfig):
    """Settings, names and defaults as in diffusers."""

    skip_prk_steps: bool = False
    set_alpha_to_one: bool = False
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    timestep_spacing: Spacing = "leading"


class PNDMScheduler(AlphaScheduler[PNDMConfig]):
    """Multistep sampler with a Runge-Kutta start, or, with `skip_prk_steps`, a second-order one; as in diffusers."""

    Config = PNDMConfig

    def _start(self) -> None:
        super()._start()
        self._e: list[Float32] = []
        self._sum: Float32 | None = None
        self._sample: Float32 | None = None

    def _schedule(
        self, steps: int, sigmas: Sequence[float] | None, timesteps: Sequence[float] | None, mu: float | None
    ) -> None:
        config = self.config
        train = config.num_train_timesteps
        rising = timestep_grid(config.timestep_spacing, steps, train, config.steps_offset)[::-1].astype(np.int64)
        if config.skip_prk_steps:  # the second-lowest but one twice: the first step is made again
            runge_kutta = np.empty(0, np.int64)
            multistep = np.concatenate([rising[:-1], rising[-2:-1], rising[-1:]])[::-1]
        else:
            if len(rising) < ORDER:
                raise RequestError(
                    f"num_inference_steps is {steps}; PNDM's Runge-Kutta start takes {ORDER} or more: take more steps, "
                    "or set skip_prk_steps"
                )
            halves = np.tile([0, train // steps // 2], ORDER)
            runge_kutta = (rising[-ORDER:].repeat(2) + halves)[:-1].repeat(2)[1:-1][::-1]
            multistep = rising[:-3][::-1]
        self._runge_kutta = runge_kutta
        self.timesteps = np.concatenate([runge_kutta, multistep])
        check_training_range(self.timesteps, train)
        self.num_inference_steps = steps

    def _advance(self, i: int, model_output: Float32, sample: Float32, draw: Draw, eta: float) -> Float32:
        if i < len(self._runge_kutta):
            return self._runge_kutta_step(i, model_output, sample)
        return self._multistep(i, model_output, sample)

    def _runge_kutta_step(self, i: int, e: Float32, x: Float32) -> Float32:
        half = int(self.config.num_train_timesteps) // (self.num_inference_steps or 1) // 2
        t_prev = int(self.timesteps[i]) - (0 if i % 2 else half)
        t = int(self._runge_kutta[i // 4 * 4])
        if i % 4 == 0:
            self._sum = blockwise(lambda e: SIXTH * e, e)
            self._e.append(e)
            self._sample = x
        elif i % 4 < 3:
            self._sum = blockwise(lambda s, e: s + THIRD * e, self._sum, e)  # type: ignore[arg-type]
        else:
            e = blockwise(lambda s, e: s + SIXTH * e, self._sum, e)  # type: ignore[arg-type]
        return self._transfer(x if self._sample is None else self._sample, t, t_prev, e)

    def _multistep(self, i: int, e: Float32, x: Float32) -> Float32:
        t = int(self.timesteps[i])
        t_prev = self._previous_on_grid(t)
        if i != 1 or len(self._runge_kutta):
            self._e = [*self._e[-3:], e]
        else:
            t, t_prev = 2 * t - t_prev, t
        count = len(self._e)
        if count == 1 and i == 0:
            self._sample = x
        elif count == 1:
            assert self._sample is not None
            e, x, self._sample = blockwise(lambda e, e1: (e + e1) / 2, e, self._e[-1]), self._sample, None
        elif count == 2:
            e = blockwise(lambda e1, e2: (3 * e1 - e2) / 2, self._e[-1], self._e[-2])
        elif count == 3:
            e = blockwise(lambda e1, e2, e3: (23 * e1 - 16 * e2 + 5 * e3) / 12, *self._e[::-1])
        else:
            share = np.float32(1 / 24)
            e = blockwise(lambda e1, e2, e3, e4: share * (55 * e1 - 59 * e2 + 37 * e3 - 9 * e4), *self._e[::-1])
        return self._transfer(x, t, t_prev, e)

    def _transfer(self, x: Float32, t: int, t_prev: int, e: Float32) -> Float32:
        """Equation 9: x moved from timestep t to t_prev along the noise e."""
        abar, abar_prev = self.alphas_cumprod[t], self._alpha(t_prev)
        a, b = np.sqrt(abar), np.sqrt(1 - abar)
        of_x = np.sqrt(abar_prev / abar)
        denominator = abar * np.sqrt(1 - abar_prev) + np.sqrt(abar * (1 - abar) * abar_prev)
        change = abar_prev - abar
        if self.config.prediction_type == "v_prediction":
            return blockwise(lambda x, v: of_x * x - change * (a * v + b * x) / denominator, x, e)
        return blockwise(lambda x, e: of_x * x - change * e / denominator, x, e)
