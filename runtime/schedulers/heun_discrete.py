"""Heun's second-order method: the deterministic algorithm 1 of Karras et al., arXiv:2206.00364.

Every step but the last is made twice, so the schedule has 2 N - 1 entries: an Euler step to the next sigma, then the
same step again with the mean of both derivatives d.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from t2v_rt.errors import RequestError
from t2v_rt.runtime.schedulers.alpha import BetaConfig
from t2v_rt.runtime.schedulers.base import Draw
from t2v_rt.runtime.schedulers.blockwise import blockwise
from t2v_rt.runtime.schedulers.noise_schedules import even_timesteps, falling, timesteps_of_sigmas
from t2v_rt.runtime.schedulers.predictions import Prediction, clip
from t2v_rt.runtime.schedulers.sigma import SigmaScheduler, spaced_sigmas, spacing_of

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class HeunConfig(BetaConfig):
    """Settings, names and defaults as in diffusers."""

    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "exp"] = "linear"  # type: ignore[assignment]
    prediction_type: Prediction = "epsilon"
    use_karras_sigmas: bool = False
    use_exponential_sigmas: bool = False
    use_beta_sigmas: bool = False
    clip_sample: bool = False
    clip_sample_range: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        spacing_of(self)


class HeunDiscreteScheduler(SigmaScheduler[HeunConfig]):
    """Second-order sampler of noise-predicting models, two model calls a step; diffusers' class of the same name."""

    Config = HeunConfig
    order = 2
    custom: ClassVar[frozenset[str]] = frozenset({"timesteps"})

    def _start(self) -> None:
        super()._start()
        self._first: tuple[Float32, Float32] | None = None  # sample and derivative of the Euler step

    def _schedule(
        self, steps: int, sigmas: Sequence[float] | None, timesteps: Sequence[float] | None, mu: float | None
    ) -> None:
        config, levels = self.config, self._levels
        train = config.num_train_timesteps
        grid: NDArray[Any]
        if timesteps is not None:
            if spacing_of(config):
                raise RequestError(f"timesteps do not go with {spacing_of(config)}; leave them out")
            grid = falling("timesteps", timesteps, lowest=0, highest=train - 1).astype(np.float32)
        else:
            grid = even_timesteps(config.timestep_spacing, steps, train, config.steps_offset)
        between = np.interp(grid, np.arange(len(levels)), levels)
        if spacing_of(config):
            between = spaced_sigmas(config, between, steps)
            grid = timesteps_of_sigmas(between, np.log(levels))
        between = between.astype(np.float32)
        self.sigmas = np.concatenate([between[:1], between[1:].repeat(2), np.zeros(1, np.float32)])
        self.timesteps = np.concatenate([grid[:1], grid[1:].repeat(2)]).astype(np.float32)
        self.num_inference_steps = len(grid) if timesteps is not None else steps

    def _advance(self, i: int, model_output: Float32, sample: Float32, draw: Draw, eta: float) -> Float32:
        if self._first is None:
            sigma, following = self.sigmas[i], self.sigmas[i + 1]
            x0 = self._limited(self._data(model_output, sample, sigma))
            d = blockwise(lambda x, x0: (x - x0) / sigma, sample, x0)
            self._first = sample, d
            dt = following - sigma
            return blockwise(lambda x, d: x + d * dt, sample, d)
        sigma, following = self.sigmas[i - 1], self.sigmas[i]
        x0 = self._limited(self._data(model_output, sample, following))
        (start, d), self._first = self._first, None
        dt = following - sigma

        def corrected(x: Float32, x0: Float32, start: Float32, d: Float32) -> Any:
            return start + (d + (x - x0) / following) / 2 * dt

        return blockwise(corrected, sample, x0, start, d)

    def _limited(self, x0: Float32) -> Float32:
        return clip(x0.copy(), self.config.clip_sample_range) if self.config.clip_sample else x0
