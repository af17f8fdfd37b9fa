"""UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models (Zhao et al., arXiv:2302.04867).

Letters as in the paper: lambda is the half log signal-to-noise ratio, h its step, r_k the ratios to earlier steps, m_i
the data predictions, D_k their differences over r_k, B(h) the free function (bh1: h, bh2: e^h - 1), rho the weights.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

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
FIRST_SIGMA_GAP = 1e-6  # a first sigma of exactly 1 has no finite lambda


@dataclass(frozen=True)
class UniPCConfig(SchedulerConfig):
    """Settings of UniPC on flow-matching models, names and defaults as in diffusers."""

    num_train_timesteps: int = 1000
    solver_order: int = 2
    prediction_type: str = "flow_prediction"
    predict_x0: bool = True
    solver_type: Literal["bh1", "bh2"] = "bh2"
    lower_order_final: bool = True
    disable_corrector: tuple[int, ...] = ()
    use_flow_sigmas: bool = True
    flow_shift: float = 1.0
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"
    use_dynamic_shifting: bool = False
    time_shift_type: Literal["exponential", "linear"] = "exponential"
    shift_terminal: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prediction_type != "flow_prediction" or not self.use_flow_sigmas or not self.predict_x0:
            raise RequestError(
                f"UniPCMultistepScheduler has prediction_type {self.prediction_type!r}, use_flow_sigmas "
                f"{self.use_flow_sigmas}, predict_x0 {self.predict_x0}; supported are 'flow_prediction', True and True"
            )
        if not 1 <= self.solver_order <= 3 or self.num_train_timesteps < 1 or self.flow_shift <= 0:
            raise RequestError(
                f"solver_order {self.solver_order}, num_train_timesteps {self.num_train_timesteps}, flow_shift "
                f"{self.flow_shift}; expected an order from 1 to 3 and positive numbers"
            )


class UniPCMultistepScheduler(Scheduler[UniPCConfig]):
    """Multistep predictor-corrector sampler for flow models; diffusers' class of the same name.

    Timesteps are int64, truncated from sigma * num_train_timesteps.
    """

    Config = UniPCConfig

    def _reset(self) -> None:
        super()._reset()
        self._m: deque[Float32] = deque(maxlen=self.config.solver_order)
        self._last_sample: Float32 | None = None
        self._last_order = 0

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        *,
        sigmas: Sequence[float] | None = None,
        timesteps: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Prepares the schedule.

        Args:
            num_inference_steps: number of steps N; sigmas fall evenly from 1, then are shifted.
            sigmas: instead of the even ones, before the shift.
            timesteps: not taken by this sampler.
            mu: the shift, with `use_dynamic_shifting`.

        Raises:
            RequestError: no or invalid steps or sigmas, timesteps given, or mu missing or surplus.
        """
        if timesteps is not None:
            raise RequestError("UniPCMultistepScheduler takes no custom timesteps; give sigmas")
        if (mu is not None) != self.config.use_dynamic_shifting:
            raise RequestError("mu goes with use_dynamic_shifting: give both or neither")
        if sigmas is None:
            steps = check_steps(num_inference_steps)
            flow: NDArray[np.float64] = np.linspace(1, 1 / self.config.num_train_timesteps, steps + 1)[:-1]
        else:
            flow = check_sigmas(sigmas, num_inference_steps)
        if mu is not None:
            flow = dynamic_shift(flow, mu, self.config.time_shift_type)
        else:
            flow = shift_sigmas(flow, self.config.flow_shift)
        if self.config.shift_terminal is not None:
            flow = stretch_to_terminal(flow, self.config.shift_terminal)
        if abs(flow[0] - 1) < FIRST_SIGMA_GAP:
            flow[0] -= FIRST_SIGMA_GAP
        last = flow[-1] if self.config.final_sigmas_type == "sigma_min" else 0.0
        self.timesteps = (flow * self.config.num_train_timesteps).astype(np.int64)
        self.sigmas = np.append(flow, last).astype(np.float32)
        self.num_inference_steps = len(flow)
        self._reset()

    def _advance(self, model_output: Float32, sample: Float32, generator: Generator | None, eta: float) -> Float32:
        i, config = self._step_index, self.config
        m_t = sample - self.sigmas[i] * model_output
        if self._last_sample is not None and i - 1 not in config.disable_corrector:
            sample = self._update(self._last_sample, i - 1, self._last_order, m_t)
        self._m.append(m_t)
        remaining = len(self.timesteps) - i if config.lower_order_final else config.solver_order
        order = min(config.solver_order, remaining, len(self._m))
        self._last_sample, self._last_order = sample, order
        return self._update(sample, i, order, None)

    def _update(self, x: Float32, i: int, order: int, m_t: Float32 | None) -> Float32:
        """UniP from step i to i + 1, or UniC where the new data prediction m_t is known."""
        m0 = self._m[-1]
        alpha, sigma, lam = _lambda(self.sigmas[i + 1])
        _, sigma0, lam0 = _lambda(self.sigmas[i])
        h = _f32(lam - lam0)
        r = [_f32((_lambda(self.sigmas[i - k])[2] - lam0) / h) for k in range(1, order)]
        phi, B, rho = self._weights(h, r, corrector=m_t is not None)

        # x_t = sigma_t / sigma_0 x - alpha_t (e^-h - 1) m_0 - alpha_t B(h) (sum rho_k D_k + rho_t (m_t - m_0))
        result = _f32(sigma / sigma0) * x
        result -= _f32(alpha * phi) * m0
        for k, r_k in enumerate(r):
            result -= _f32(_f32(alpha * B) * rho[k] / r_k) * (self._m[-(k + 2)] - m0)
        if m_t is not None:
            result -= _f32(_f32(alpha * B) * rho[-1]) * (m_t - m0)
        return result

    def _weights(self, h: np.float32, r: list[np.float32], *, corrector: bool) -> tuple[Any, Any, Array]:
        """e^-h - 1, B(h), and the weights rho that solve R rho = b; of the predictor all but the last."""
        order = len(r) + 1
        hh = -h
        phi = _f32(np.expm1(np.float64(hh)))
        B = hh if self.config.solver_type == "bh1" else phi
        if order == 1 or (order == 2 and not corrector):
            return phi, B, np.full(1, 0.5, np.float32)
        ratios = np.array([*r, 1.0], np.float32)
        R = np.array([ratios**k for k in range(order)], np.float32)
        b = np.empty(order, np.float32)
        factorial, phi_k = 1, _f32(phi / hh - 1)
        for k in range(order):
            b[k] = _f32(phi_k * factorial / B)
            factorial *= k + 2
            phi_k = _f32(phi_k / hh - 1 / factorial)
        size = order if corrector else order - 1
        rho = np.linalg.solve(R[:size, :size].astype(np.float64), b[:size].astype(np.float64))
        return phi, B, rho.astype(np.float32)

    def add_noise(self, original_samples: Array, noise: Array, timesteps: Array) -> Array:
        """Samples noised to timesteps of the schedule; see `add_flow_noise`."""
        return add_flow_noise(original_samples, noise, timesteps, self.timesteps, self.sigmas)


def _f32(value: Any) -> np.float32:
    return np.float32(value)


def _lambda(sigma: np.float32) -> tuple[np.float32, np.float32, np.float32]:
    """alpha, sigma and lambda = ln alpha - ln sigma of a flow sigma, rounded to float32 as the reference does.

    The logarithms are taken in float64, so that no machine's float32 logarithm shows in the result.
    """
    alpha = np.float32(1.0) - sigma
    with np.errstate(divide="ignore"):
        log_alpha, log_sigma = (_f32(np.log(np.float64(value))) for value in (alpha, sigma))
    return alpha, sigma, _f32(log_alpha - log_sigma)
