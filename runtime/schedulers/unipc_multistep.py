"""UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models (Zhao et al., arXiv:2302.04867).

Letters as in the paper: lambda is the half log signal-to-noise ratio, h its step, r_k the ratios to earlier steps, m_k
the data (or noise) predictions, D_k their differences over r_k, B(h) the free function (bh1: h, bh2: e^h - 1), rho the
weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from t2v_rt.errors import RequestError
from t2v_rt.runtime.schedulers.base import Draw
from t2v_rt.runtime.schedulers.blockwise import blockwise
from t2v_rt.runtime.schedulers.multistep import MOST_REMEMBERED, MultistepConfig, MultistepScheduler, level
from t2v_rt.runtime.schedulers.noise_schedules import (
    dynamic_shift,
    expm1,
    falling,
    shift_sigmas,
    stretch_to_terminal,
    timestep_grid,
)
from t2v_rt.runtime.schedulers.predictions import noise_prediction
from t2v_rt.runtime.schedulers.sigma import spacing_of

Float32 = NDArray[np.float32]
FIRST_SIGMA_GAP = 1e-6  # a first flow sigma of exactly 1 has no finite lambda


@dataclass(frozen=True)
class UniPCConfig(MultistepConfig):
    """Settings, names and defaults as in diffusers."""

    predict_x0: bool = True
    solver_type: Literal["bh1", "bh2"] = "bh2"
    disable_corrector: tuple[int, ...] = ()
    solver_p: None = None
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"
    rescale_betas_zero_snr: bool = False
    time_shift_type: Literal["exponential", "linear"] = "exponential"  # type: ignore[assignment]
    sigma_min: float | None = None
    sigma_max: float | None = None
    shift_terminal: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prediction_type == "flow_prediction" and not self.predict_x0:
            raise RequestError("prediction_type is 'flow_prediction' with predict_x0 False; expected True")
        if self.shift_terminal is not None and not self.use_flow_sigmas:
            raise RequestError("shift_terminal is set without use_flow_sigmas; set that, or leave it out")
        if self.use_flow_sigmas and spacing_of(self) not in (None, "use_karras_sigmas"):
            raise RequestError(
                f"use_flow_sigmas and {spacing_of(self)} are both set; expected use_karras_sigmas, or no spacing"
            )


class UniPCMultistepScheduler(MultistepScheduler[UniPCConfig]):
    """Multistep predictor-corrector sampler of orders 1 to 3; diffusers' class of the same name.

    Timesteps are int64; a flow model's are truncated from sigma * num_train_timesteps.
    """

    Config = UniPCConfig
    custom: ClassVar[frozenset[str]] = frozenset({"sigmas", "mu"})
    substitutes: ClassVar[Mapping[str, Mapping[str, str]]] = {
        "solver_type": dict.fromkeys(("midpoint", "heun", "logrho"), "bh2")
    }

    def _start(self) -> None:
        super()._start()
        self._last_sample: Float32 | None = None
        self._last_order = 0

    def _schedule(
        self, steps: int, sigmas: Sequence[float] | None, timesteps: Sequence[float] | None, mu: float | None
    ) -> None:
        config = self.config
        if (mu is not None) != config.use_dynamic_shifting:
            raise RequestError("mu goes with use_dynamic_shifting; give both or neither")
        if sigmas is not None and (not config.use_flow_sigmas or spacing_of(config)):
            raise RequestError(
                "sigmas are taken with use_flow_sigmas, and without a spacing of their own; leave them out"
            )
        between: NDArray[Any]
        if spacing_of(config):
            between, grid = self._spaced(steps)
            if config.use_flow_sigmas:
                between = between / (between + 1)
                grid = between * config.num_train_timesteps
            elif config.use_karras_sigmas:
                grid = grid.round()
            last = between[-1]
        elif config.use_flow_sigmas:
            between = self._shifted(steps, sigmas, mu)
            grid, last = between * config.num_train_timesteps, between[-1]
        else:
            train = config.num_train_timesteps
            between, grid = self._on_grid(
                timestep_grid(config.timestep_spacing, steps, train, config.steps_offset, last=train)
            )
            last = self._levels[0]
        if config.final_sigmas_type == "zero" and not config.lower_order_final and config.solver_order > 1 < len(grid):
            raise RequestError(
                "lower_order_final is False with final_sigmas_type 'zero': a last step of higher order divides by "
                "zero; set one of them otherwise"
            )
        self._finish(between, last if config.final_sigmas_type == "sigma_min" else 0.0, grid)

    def _shifted(self, steps: int, sigmas: Sequence[float] | None, mu: float | None) -> NDArray[Any]:
        """Flow sigmas: even ones or the given, shifted."""
        config = self.config
        if sigmas is None:
            flow: NDArray[np.float64] = np.linspace(1, 1 / config.num_train_timesteps, steps + 1)[:-1]
        else:
            flow = falling("sigmas", sigmas, lowest=1e-6, highest=1.0)
        if mu is not None:
            flow = dynamic_shift(flow, mu, config.time_shift_type)
        else:
            flow = shift_sigmas(flow, config.flow_shift)
        if config.shift_terminal:
            flow = stretch_to_terminal(flow, config.shift_terminal)
        if abs(flow[0] - 1) < FIRST_SIGMA_GAP:
            flow[0] -= FIRST_SIGMA_GAP
        return flow

    def _advance(self, i: int, model_output: Float32, sample: Float32, draw: Draw, eta: float) -> Float32:
        config = self.config
        m_t = self._converted(i, model_output, sample)
        if self._last_sample is not None and i - 1 not in config.disable_corrector:
            sample = self._update(self._last_sample, i - 1, self._last_order, m_t)
        self._m.append(m_t)
        remaining = len(self.timesteps) - i if config.lower_order_final else config.solver_order
        order = min(config.solver_order, remaining, len(self._m))
        self._last_sample, self._last_order = sample, order
        return self._update(sample, i, order, None)

    def _converted(self, i: int, m: Float32, x: Float32) -> Float32:
        if self.config.predict_x0:
            return self._x0(i, m, x)
        return noise_prediction(self.config.prediction_type, m, x, *self._alpha_sigma(self.sigmas[i]))

    def _update(self, x: Float32, i: int, order: int, m_t: Float32 | None) -> Float32:
        """UniP from step i to i + 1, or UniC where the new prediction m_t is known."""
        levels = self.sigmas[i - order + 1 : i + 2].tobytes()
        config = self.config
        kind = config.use_flow_sigmas, config.predict_x0, config.solver_type == "bh1"
        ratio, of_m0, of_D, r, rho = factors(levels, *kind, m_t is not None)

        def formula(x: Float32, m0: Float32, *rest: Float32) -> Any:
            x_t = ratio * x - of_m0 * m0
            D = [(m - m0) / r_k for m, r_k in zip(rest, r, strict=False)]
            if m_t is not None:
                D.append(rest[-1] - m0)
            total = None
            for rho_k, D_k in zip(rho, D, strict=True):
                total = rho_k * D_k if total is None else total + rho_k * D_k
            return x_t if total is None else x_t - of_D * total

        history = list(self._m)[::-1][:order]
        return blockwise(formula, x, *history, *(() if m_t is None else (m_t,)))


@lru_cache(MOST_REMEMBERED)
def factors(
    levels: bytes, flow: bool, predict_x0: bool, bh1: bool, corrector: bool
) -> tuple[Any, Any, Any, tuple[Any, ...], Any]:
    """What a step multiplies with, which its noise levels alone decide; remembered from call to call.

    x_t = sigma_t / sigma_0 x - alpha_t (e^-h - 1) m_0 - alpha_t B(h) (sum rho_k D_k + rho_t (m_t - m_0)), with alpha
    and sigma exchanged where the noise is predicted.

    Args:
        levels: float32 sigmas of the steps before it, as many as its order takes, of its begin and of its end.
        flow: whether they are of a flow model.
        predict_x0: whether the data is predicted, else the noise.
        bh1: whether B(h) is h, else e^h - 1.
        corrector: whether the newest prediction is known.

    Returns:
        The factors of x, of m_0 and of the sum, and r and rho of its differences.
    """
    (alpha, sigma, lam), (alpha0, sigma0, lam0), *before = (
        level(x, flow) for x in np.frombuffer(levels, np.float32)[::-1]
    )
    h = lam - lam0
    r = [(lam_k - lam0) / h for _, _, lam_k in before]
    hh = -h if predict_x0 else h
    phi = expm1(hh)
    B = hh if bh1 else phi
    rho = weights(hh, phi, B, r, corrector=corrector)
    ratio, scale = (sigma / sigma0, alpha) if predict_x0 else (alpha / alpha0, sigma)
    return ratio, scale * phi, scale * B, tuple(r), rho


def weights(hh: Any, phi: Any, B: Any, r: list[Any], *, corrector: bool) -> Any:
    """The weights rho that solve R rho = b: of all differences, or of all but the newest for the predictor."""
    size = len(r) + corrector
    if size < 2:
        return np.full(size, 0.5, np.float32)
    ratios = np.array([*r, 1.0], np.float32)
    b = []
    factorial, phi_k = 1, phi / hh - 1
    for k in range(size):
        b.append(phi_k * np.float32(factorial) / B)
        factorial *= k + 2
        phi_k = phi_k / hh - np.float32(1 / factorial)
    R = np.array([ratios[:size] ** k for k in range(size)], np.float32)
    try:
        rho = np.linalg.solve(R, np.array(b, np.float32))
    except np.linalg.LinAlgError:
        rho = np.full(size, np.nan, np.float32)
    if not np.all(np.isfinite(rho)):
        raise RequestError("the last sigmas coincide, so UniPC has no step of this order; set lower_order_final")
    return rho
