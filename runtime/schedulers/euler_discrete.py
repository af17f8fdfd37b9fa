"""Euler's method over noise levels: algorithm 2 of Karras et al., arXiv:2206.00364, without its correction.

s_churn and its kin are that algorithm's stochastic dials; sigma_hat is the raised noise level, d the derivative.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from t2v_rt.errors import RequestError
from t2v_rt.numbers import as_number
from t2v_rt.options import documented_by
from t2v_rt.runtime.schedulers.alpha import BetaConfig
from t2v_rt.runtime.schedulers.base import Array, Draw, Generators, SchedulerOutput
from t2v_rt.runtime.schedulers.blockwise import blockwise
from t2v_rt.runtime.schedulers.noise_schedules import even_timesteps, exp, falling, linspace, log, timesteps_of_sigmas
from t2v_rt.runtime.schedulers.sigma import SigmaScheduler, spaced_sigmas, spacing_of

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class EulerDiscreteConfig(BetaConfig):
    """Settings, names and defaults as in diffusers."""

    prediction_type: Literal["epsilon", "sample", "original_sample", "v_prediction"] = "epsilon"
    interpolation_type: Literal["linear", "log_linear"] = "linear"
    use_karras_sigmas: bool | None = False
    use_exponential_sigmas: bool | None = False
    use_beta_sigmas: bool | None = False
    sigma_min: float | None = None
    sigma_max: float | None = None
    timestep_type: Literal["discrete", "continuous"] = "discrete"
    rescale_betas_zero_snr: bool = False
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"

    def __post_init__(self) -> None:
        super().__post_init__()
        spacing_of(self)


class EulerDiscreteScheduler(SigmaScheduler[EulerDiscreteConfig]):
    """Euler sampler of noise-predicting models; diffusers' class of the same name. Timesteps are float32."""

    Config = EulerDiscreteConfig
    custom: ClassVar[frozenset[str]] = frozenset({"timesteps", "sigmas"})

    def _schedule(
        self, steps: int, sigmas: Sequence[float] | None, timesteps: Sequence[float] | None, mu: float | None
    ) -> None:
        config, levels = self.config, self._levels
        continuous = config.timestep_type == "continuous" and config.prediction_type == "v_prediction"
        if timesteps is not None and (continuous or spacing_of(config)):
            raise RequestError(
                f"timesteps do not go with {spacing_of(config) or 'continuous timesteps'}; leave them out"
            )
        if sigmas is not None:
            all_sigmas = falling("sigmas", sigmas, lowest=0, highest=math.inf).astype(np.float32)
            grid = timesteps_of_sigmas(all_sigmas[:-1], np.log(levels))
            if not len(grid):
                raise RequestError("sigmas has one value; expected those of all steps and, last, the one to end at")
        else:
            all_sigmas, grid = self._spaced(steps, timesteps)
        self.sigmas = all_sigmas
        self.timesteps = np.float32(0.25) * log(all_sigmas[:-1]) if continuous else grid.astype(np.float32)
        self.num_inference_steps = len(grid) if sigmas is not None or timesteps is not None else steps

    def _spaced(self, steps: int, timesteps: Sequence[float] | None) -> tuple[Float32, NDArray[Any]]:
        """Sigmas with the one to end at, and timesteps."""
        config, levels = self.config, self._levels
        train = config.num_train_timesteps
        grid: NDArray[Any]
        if timesteps is not None:
            grid = falling("timesteps", timesteps, lowest=0, highest=train - 1).astype(np.float32)
        else:
            grid = even_timesteps(config.timestep_spacing, steps, train, config.steps_offset)
        between: NDArray[Any]
        if config.interpolation_type == "linear":
            between = np.interp(grid, np.arange(len(levels)), levels)
        else:
            between = exp(linspace(float(np.log(levels[-1])), float(np.log(levels[0])), (steps or len(grid)) + 1))
        if spacing_of(config):
            between = spaced_sigmas(config, between, steps)
            grid = timesteps_of_sigmas(between, np.log(levels))
        last = levels[0] if config.final_sigmas_type == "sigma_min" else 0.0
        return np.append(between, last).astype(np.float32), grid

    @documented_by(SigmaScheduler.step)
    def step(
        self,
        model_output: Array,
        timestep: float,
        sample: Array,
        *,
        generator: Generators = None,
        eta: float = 0.0,
        variance_noise: Array | None = None,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        s_noise: float = 1.0,
    ) -> SchedulerOutput:
        """Advances the sample by one step of the schedule.

        Args:
            generator: source of the noise that `s_churn` adds; a list has one for each video.
            eta: 0; this sampler has no such dial.
            s_churn: how much noise is added before each step, over all steps.
            s_tmin: smallest sigma at which noise is added.
            s_tmax: largest sigma at which noise is added.
            s_noise: standard deviation of the added noise.

        Returns:
            The next sample, in the dtype of `sample`.

        Raises:
            RequestError: `set_timesteps` was not called, all steps are made, or an argument does not fit.
        """
        dials: list[float] = []
        for name, value in (("s_churn", s_churn), ("s_tmin", s_tmin), ("s_tmax", s_tmax), ("s_noise", s_noise)):
            dial = math.inf if name == "s_tmax" and value == math.inf else as_number(value)  # no limit, the default
            if dial is None or dial < 0:
                raise RequestError(f"{name} is {value!r}; expected a number of 0 or more")
            dials.append(dial)
        advance = partial(self._churned, dials[0], dials[1], dials[2], dials[3])
        return self._make_step(advance, model_output, timestep, sample, generator, eta, variance_noise)

    def _churned(
        self,
        s_churn: float,
        s_tmin: float,
        s_tmax: float,
        s_noise: float,
        i: int,
        model_output: Float32,
        sample: Float32,
        draw: Draw,
        eta: float,
    ) -> Float32:
        sigma, following = self.sigmas[i], self.sigmas[i + 1]
        churned = s_tmin <= sigma <= s_tmax
        gamma = np.float32(min(s_churn / (len(self.sigmas) - 1), math.sqrt(2) - 1)) if churned else np.float32(0)
        sigma_hat = sigma * (gamma + 1)
        x = sample
        if gamma > 0:
            strength, added = np.float32(s_noise), np.sqrt(sigma_hat * sigma_hat - sigma * sigma)
            x = blockwise(lambda x, z: x + z * strength * added, x, draw())
        level = sigma_hat if self.config.prediction_type == "epsilon" else sigma
        x0 = self._data(model_output, x, level)
        dt = following - sigma_hat
        return blockwise(lambda x, x0: x + (x - x0) / sigma_hat * dt, x, x0)
