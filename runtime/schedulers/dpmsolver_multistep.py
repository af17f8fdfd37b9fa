"""DPM-Solver and DPM-Solver++ (Lu et al., arXiv:2206.00927 and arXiv:2211.01095), multistep, and their SDE variants.

Letters as in the papers: lambda is the half log signal-to-noise ratio, h its step, r_k the ratios of earlier steps to
h, m_k the newest data (++) or noise predictions, D_k their divided differences.
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
from t2v_rt.runtime.schedulers.noise_schedules import exp, falling, log, timestep_grid, timesteps_of_sigmas
from t2v_rt.runtime.schedulers.predictions import noise_prediction
from t2v_rt.runtime.schedulers.sigma import spacing_of

Float32 = NDArray[np.float32]
FEW_STEPS = 15  # below, the last steps are made with lower order
LEARNED_CHANNELS = 3  # of a model that predicts variances too, the reference keeps so many


@dataclass(frozen=True)
class DPMSolverConfig(MultistepConfig):
    """Settings, names and defaults as in diffusers."""

    algorithm_type: Literal["dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"] = "dpmsolver++"
    solver_type: Literal["midpoint", "heun"] = "midpoint"
    euler_at_final: bool = False
    use_lu_lambdas: bool = False
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"
    lambda_min_clipped: float = -float("inf")
    variance_type: Literal["learned", "learned_range"] | None = None
    rescale_betas_zero_snr: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.of_data and self.final_sigmas_type == "zero":
            raise RequestError(
                f"final_sigmas_type is 'zero' with algorithm_type {self.algorithm_type!r}; expected 'sigma_min', or "
                "dpmsolver++"
            )
        if not self.of_data and self.prediction_type == "flow_prediction":
            raise RequestError(
                f"prediction_type is 'flow_prediction' with algorithm_type {self.algorithm_type!r}; expected "
                "dpmsolver++ or sde-dpmsolver++"
            )
        if self.algorithm_type == "sde-dpmsolver" and self.solver_order == 3:
            raise RequestError("solver_order is 3 with algorithm_type 'sde-dpmsolver'; expected 1 or 2")
        own = "use_lu_lambdas" if self.use_lu_lambdas else spacing_of(self)
        if self.use_flow_sigmas and own:
            raise RequestError(f"use_flow_sigmas and {own} are both set; a flow model takes use_flow_sigmas alone")

    @property
    def of_data(self) -> bool:
        """Whether the integral is over data predictions, not noise predictions."""
        return self.algorithm_type.endswith("++")


class DPMSolverMultistepScheduler(MultistepScheduler[DPMSolverConfig]):
    """Sampler of orders 1 to 3; diffusers' class of the same name. Timesteps are int64."""

    Config = DPMSolverConfig
    custom: ClassVar[frozenset[str]] = frozenset({"timesteps", "mu"})
    substitutes: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "solver_type": {"logrho": "midpoint", "bh1": "midpoint", "bh2": "midpoint"},
        "algorithm_type": {"deis": "dpmsolver++"},
    }

    def _schedule(
        self, steps: int, sigmas: Sequence[float] | None, timesteps: Sequence[float] | None, mu: float | None
    ) -> None:
        config, levels = self.config, self._levels
        if mu is not None and not config.use_dynamic_shifting:
            raise RequestError("mu was given without use_dynamic_shifting; set that, or leave mu out")
        if timesteps is not None:
            own = spacing_of(config) or next((k for k in ("use_lu_lambdas", "use_flow_sigmas") if config[k]), None)
            if own:
                raise RequestError(f"timesteps do not go with {own}; leave them out")
            custom = falling("timesteps", timesteps, lowest=0, highest=config.num_train_timesteps - 1)
            between, grid = self._on_grid(custom)
        elif spacing_of(config) or config.use_lu_lambdas:
            between, grid = self._lu_spaced(steps) if config.use_lu_lambdas else self._spaced(steps)
            rounded = config.use_karras_sigmas or config.use_lu_lambdas
            grid = grid.round() if rounded and config.beta_schedule != "squaredcos_cap_v2" else grid
        elif config.use_flow_sigmas:
            between, grid = self._flow(steps, config.flow_shift if mu is None else float(np.exp(mu)))
        else:
            between, grid = self._on_grid(self._grid(steps))
        self._finish(between, levels[0] if config.final_sigmas_type == "sigma_min" else 0.0, grid)

    def _grid(self, steps: int) -> NDArray[np.float64]:
        """Whole timesteps, from the last whose lambda is not below `lambda_min_clipped`."""
        config = self.config
        lambdas = -log(self._levels)  # falling
        last = config.num_train_timesteps - int(np.searchsorted(lambdas[::-1], np.float32(config.lambda_min_clipped)))
        return timestep_grid(config.timestep_spacing, steps, config.num_train_timesteps, config.steps_offset, last=last)

    def _lu_spaced(self, steps: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Evenly spaced in lambda (arXiv:2206.00927, section 3.3)."""
        log_levels = np.log(self._levels)
        highest, lowest = log_levels[-1].item(), log_levels[0].item()
        sigmas = np.exp(highest + np.linspace(0, 1, steps) * (lowest - highest))
        return sigmas, timesteps_of_sigmas(sigmas, log_levels)

    def _advance(self, i: int, model_output: Float32, sample: Float32, draw: Draw, eta: float) -> Float32:
        config, count = self.config, len(self.timesteps)
        self._m.append(self._converted(i, model_output, sample))
        order, few = len(self._m), config.lower_order_final and count < FEW_STEPS
        if i == count - 1 and (few or config.euler_at_final or config.final_sigmas_type == "zero"):
            order = 1
        elif i == count - 2 and few:
            order = min(order, 2)
        lam0 = self._lambda(i)[2]
        h = self._lambda(i + 1)[2] - lam0
        r = [(self._lambda(i - k)[2] - self._lambda(i - k - 1)[2]) / h for k in range(order - 1)]
        of_x, of_m, of_D1, of_D2, of_noise = self._coefficients(i, h, order)
        noise = (draw(),) if config.algorithm_type.startswith("sde") else ()

        def formula(x: Float32, *rest: Float32) -> Any:
            m, z = rest[:order], rest[order:]
            x_t = of_x * x + of_m * m[0]
            if order == 2:
                x_t += of_D1 * (1 / r[0] * (m[0] - m[1]))
            elif order == 3:
                D1_0, D1_1 = 1 / r[0] * (m[0] - m[1]), 1 / r[1] * (m[1] - m[2])
                x_t += of_D1 * (D1_0 + r[0] / (r[0] + r[1]) * (D1_0 - D1_1))
                x_t += of_D2 * (1 / (r[0] + r[1]) * (D1_0 - D1_1))
            return x_t + of_noise * z[0] if z else x_t

        history = list(self._m)[::-1][:order]
        return blockwise(formula, sample, *history, *noise)

    def _coefficients(self, i: int, h: Any, order: int) -> tuple[Any, Any, Any, Any, Any]:
        """Factors of x, m_0, D_1, D_2 and the noise in the step from level i to i + 1."""
        alpha, sigma, _ = self._lambda(i + 1)
        alpha0, sigma0, _ = self._lambda(i)
        midpoint = order == 2 and self.config.solver_type == "midpoint"
        half, two = np.float32(0.5), np.float32(2.0)
        match self.config.algorithm_type:
            case "dpmsolver++":
                e = exp(-h) - 1
                D1 = -half * (alpha * e) if midpoint else alpha * (e / h + 1)
                return sigma / sigma0, -(alpha * e), D1, -(alpha * ((e + h) / (h * h) - half)), 0
            case "dpmsolver":
                e = exp(h) - 1
                D1 = -half * (sigma * e) if midpoint else -(sigma * (e / h - 1))
                return alpha / alpha0, -(sigma * e), D1, -(sigma * ((e - h) / (h * h) - half)), 0
            case "sde-dpmsolver++":
                e = 1 - exp(-two * h)
                D1 = half * (alpha * e) if midpoint else alpha * (e / (-two * h) + 1)
                D2 = alpha * ((e - two * h) / ((two * h) * (two * h)) - half)
                return sigma / sigma0 * exp(-h), alpha * e, D1, D2, sigma * np.sqrt(e)
            case _:
                e = exp(h) - 1
                D1 = -(sigma * e) if midpoint else -two * (sigma * (e / h - 1))
                return alpha / alpha0, -two * (sigma * e), D1, 0, sigma * np.sqrt(exp(two * h) - 1)

    def _converted(self, i: int, m: Float32, x: Float32) -> Float32:
        """The model's output as the data or noise prediction that the algorithm integrates."""
        config = self.config
        if config.variance_type is not None and config.prediction_type == "epsilon":
            m = m[:, :LEARNED_CHANNELS]
        if config.of_data:
            return self._x0(i, m, x)
        alpha, sigma = self._alpha_sigma(self.sigmas[i])
        epsilon = noise_prediction(config.prediction_type, m, x, alpha, sigma)
        if config.thresholding:
            x0 = self._thresholded((x - sigma * epsilon) / alpha)
            epsilon = (x - alpha * x0) / sigma
        return epsilon

    def _learned_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        learned = self.config.variance_type is not None and len(shape) > 1
        return (shape[0], 2 * shape[1], *shape[2:]) if learned else shape
