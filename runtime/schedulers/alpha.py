"""Samplers over the variance-preserving schedule, whose steps look up cumulative alphas by training timestep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from t2v_rt.errors import RequestError
from t2v_rt.runtime.schedulers.base import C, Scheduler
from t2v_rt.runtime.schedulers.config import SchedulerConfig
from t2v_rt.runtime.schedulers.noise_schedules import (
    betas_with_zero_snr,
    cumulative_alphas,
    falling,
    make_betas,
    timestep_grid,
)
from t2v_rt.runtime.schedulers.predictions import clip, data_prediction, threshold

Float32 = NDArray[np.float32]
Spacing = Literal["linspace", "leading", "trailing"]
BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]


@dataclass(frozen=True)
class BetaConfig(SchedulerConfig):
    """Settings that all samplers of beta schedules share."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: BetaSchedule = "linear"
    trained_betas: tuple[float, ...] | None = None
    timestep_spacing: Spacing = "linspace"
    steps_offset: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_train_timesteps < 1 or self.steps_offset < 0:
            raise RequestError(
                f"num_train_timesteps is {self.num_train_timesteps}, steps_offset {self.steps_offset}; expected at "
                "least 1 and 0"
            )
        if not (0 < self.beta_start < 1 and 0 < self.beta_end < 1):
            raise RequestError(
                f"beta_start is {self.beta_start}, beta_end {self.beta_end}; expected both within 0 and 1"
            )
        if self.trained_betas is not None and len(self.trained_betas) != self.num_train_timesteps:
            raise RequestError(
                f"trained_betas has {len(self.trained_betas)} values; expected num_train_timesteps, "
                f"{self.num_train_timesteps}"
            )


def betas_of(config: BetaConfig) -> Float32:
    """The betas that a config describes, rescaled to a zero terminal signal where it says so."""
    betas = make_betas(
        config.beta_schedule, config.beta_start, config.beta_end, config.num_train_timesteps, config.trained_betas
    )
    return betas_with_zero_snr(betas) if config.get("rescale_betas_zero_snr") else betas


def check_training_range(timesteps: NDArray[Any], train: int) -> NDArray[np.int64]:
    """Timesteps as int64; raises RequestError where the steps and their offset go past the training timesteps."""
    if timesteps.max() > train - 1:
        raise RequestError(
            f"the schedule begins at timestep {timesteps.max():g}; the model was trained on 0 to {train - 1}: "
            "take fewer steps, or a smaller steps_offset"
        )
    return timesteps.astype(np.int64)


class AlphaScheduler(Scheduler[C]):
    """Base of DDPM, DDIM and their kin: `alphas_cumprod` per training timestep, plain grids of timesteps."""

    custom: ClassVar[frozenset[str]] = frozenset()

    def _prepare(self) -> None:
        self.alphas_cumprod = self._cumulative_alphas()
        # what stands for the alpha before timestep 0
        one = self.config.get("set_alpha_to_one", True)
        self.final_alpha_cumprod = self.alphas_cumprod.dtype.type(1.0) if one else self.alphas_cumprod[0]

    def _cumulative_alphas(self) -> NDArray[Any]:
        return cumulative_alphas(betas_of(self.config))  # type: ignore[arg-type]

    def _alpha(self, timestep: int) -> Any:
        return self.alphas_cumprod[timestep] if timestep >= 0 else self.final_alpha_cumprod

    def _schedule(
        self, steps: int, sigmas: Sequence[float] | None, timesteps: Sequence[float] | None, mu: float | None
    ) -> None:
        train = self.config["num_train_timesteps"]
        if timesteps is not None:
            self.timesteps = falling("timesteps", timesteps, lowest=0, highest=train - 1).astype(np.int64)
        else:
            if steps > train:
                raise RequestError(f"num_inference_steps is {steps}; the model was trained on {train} timesteps only")
            spacing, offset = self.config["timestep_spacing"], self.config["steps_offset"]
            self.timesteps = check_training_range(timestep_grid(spacing, steps, train, offset), train)
        self.num_inference_steps = len(self.timesteps) if timesteps is not None else steps

    def _previous_on_grid(self, t: int) -> int:
        """The timestep one step of an even grid further down; below 0 at the end."""
        return t - int(self.config["num_train_timesteps"]) // (self.num_inference_steps or 1)

    def _x0(self, m: Float32, x: Float32, alpha_cumprod: Any) -> Float32:
        """The data prediction, thresholded or clipped as the config says."""
        alpha, sigma = np.sqrt(alpha_cumprod), np.sqrt(1 - alpha_cumprod)
        x0 = data_prediction(self.config["prediction_type"], m, x, alpha, sigma)
        if self.config.get("thresholding"):
            return threshold(x0, self.config["dynamic_thresholding_ratio"], self.config["sample_max_value"])
        if self.config.get("clip_sample") and "clip_sample_range" in self.config:
            return clip(x0, self.config["clip_sample_range"])
        return x0

    def _signal_and_noise(self, timestep: float) -> tuple[Any, Any]:
        train = len(self.alphas_cumprod)
        if not (timestep.is_integer() and 0 <= timestep < train):
            raise RequestError(f"timestep {timestep:g} was given; expected an integer from 0 to {train - 1}")
        alpha = self.alphas_cumprod[int(timestep)]
        return np.sqrt(alpha), np.sqrt(1 - alpha)
