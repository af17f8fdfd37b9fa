"""DEIS: Fast Sampling of Diffusion Models with Exponential Integrator (Zhang and Chen, arXiv:2204.13902), log-rho form.

rho = sigma_t / alpha_t; the noise predictions m_k are interpolated by Lagrange polynomials in ln rho, which are
integrated over rho in closed form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from t2v_rt.errors import RequestError
from t2v_rt.runtime.schedulers.base import Draw
from t2v_rt.runtime.schedulers.blockwise import blockwise
from t2v_rt.runtime.schedulers.multistep import MultistepConfig, MultistepScheduler
from t2v_rt.runtime.schedulers.noise_schedules import exp, timestep_grid
from t2v_rt.runtime.schedulers.sigma import spacing_of

Float32 = NDArray[np.float32]
FEW_STEPS = 15  # below, the last steps are made with lower order


@dataclass(frozen=True)
class DEISConfig(MultistepConfig):
    """Settings, names and defaults as in diffusers."""

    algorithm_type: Literal["deis"] = "deis"
    solver_type: Literal["logrho"] = "logrho"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.use_flow_sigmas and spacing_of(self):
            raise RequestError(
                f"use_flow_sigmas and {spacing_of(self)} are both set; a flow model takes use_flow_sigmas alone"
            )


class DEISMultistepScheduler(MultistepScheduler[DEISConfig]):
    """Sampler of orders 1 to 3; diffusers' class of the same name. Timesteps are int64."""

    Config = DEISConfig
    custom: ClassVar[frozenset[str]] = frozenset({"mu"})
    substitutes: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "solver_type": dict.fromkeys(("midpoint", "heun", "bh1", "bh2"), "logrho"),
        "algorithm_type": dict.fromkeys(("dpmsolver", "dpmsolver++"), "deis"),
    }

    def _schedule(
        self, steps: int, sigmas: Sequence[float] | None, timesteps: Sequence[float] | None, mu: float | None
    ) -> None:
        config = self.config
        if mu is not None and not config.use_dynamic_shifting:
            raise RequestError("mu was given without use_dynamic_shifting; set that, or leave mu out")
        if spacing_of(config):
            between, grid = self._spaced(steps)
            self._finish(between, between[-1], grid.round() if config.use_karras_sigmas else grid)
        elif config.use_flow_sigmas:
            between, grid = self._flow(steps, config.flow_shift if mu is None else float(np.exp(mu)))
            self._finish(between, between[-1], grid)
        else:
            train = config.num_train_timesteps
            between, grid = self._on_grid(
                timestep_grid(config.timestep_spacing, steps, train, config.steps_offset, last=train)
            )
            self._finish(between, self._levels[0], grid)

    def _advance(self, i: int, model_output: Float32, sample: Float32, draw: Draw, eta: float) -> Float32:
        config, count = self.config, len(self.timesteps)
        alpha0, sigma0, lam0 = self._lambda(i)
        alpha, sigma, lam = self._lambda(i + 1)
        x0 = self._x0(i, model_output, sample)
        self._m.append(blockwise(lambda x, x0: (x - alpha0 * x0) / sigma0, sample, x0))
        few = config.lower_order_final and count < FEW_STEPS
        limit = count - i if few else 3  # order 1 at the last step, 2 at the one before
        order = min(len(self._m), limit)
        m = list(self._m)[::-1][:order]
        if order == 1:
            of_x, of_m = alpha / alpha0, sigma * (exp(lam - lam0) - 1)
            return blockwise(lambda x, m0: of_x * x - of_m * m0, sample, *m)
        rho_t, rho = sigma / alpha, [self._rho(i - k) for k in range(order)]
        c = [_integral(rho_t, rho, k) - _integral(rho[0], rho, k) for k in range(order)]

        def formula(x: Float32, *m: Float32) -> Any:
            total = x / alpha0
            for c_k, m_k in zip(c, m, strict=True):
                total += c_k * m_k
            return alpha * total

        return blockwise(formula, sample, *m)

    def _rho(self, i: int) -> Any:
        alpha, sigma, _ = self._lambda(i)
        return sigma / alpha


def _integral(t: Any, rho: list[Any], k: int) -> Any:
    """Antiderivative at t of the Lagrange polynomial in ln rho that is 1 at rho_k and 0 at the others."""
    others = [rho[(k + j) % len(rho)] for j in range(1, len(rho))]
    ln_t, ln_b, ln_c = np.log(t), np.log(rho[k]), np.log(others[0])
    if len(others) == 1:
        return t * (-ln_c + ln_t - 1) / (ln_b - ln_c)
    ln_d = np.log(others[1])
    numerator = t * (ln_c * (ln_d - ln_t + 1) - ln_d * ln_t + ln_d + ln_t * ln_t - 2 * ln_t + 2)
    return numerator / ((ln_b - ln_c) * (ln_b - ln_d))
