"""Classifier-free guidance (Ho and Salimans, arXiv:2207.12598) and what has been added to it since."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t2v_rt.errors import RequestError
from t2v_rt.numbers import as_flag, as_integer, as_number

Array = NDArray[np.float32]
NORM_FLOOR = 1e-8  # added to a squared norm so that a prediction of zeros does not divide by zero; as in the reference
WHOLE = (0.0, 1.0)


@dataclass(frozen=True)
class Guidance:
    """How conditional and unconditional predictions become one.

    Args:
        scale: at 1 or less there is no unconditional prediction, as in the reference pipeline.
        rescale: 0 to 1, how far the standard deviation is brought back to that of the conditional prediction
            (arXiv:2305.08891, section 3.4; diffusers' `rescale_noise_cfg`).
        interval: (start, stop), fractions of the steps; outside it only the conditional prediction is made
            (arXiv:2404.07724; rounded to steps as diffusers' guiders do: from int(start n) up to int(stop n)).
        cfg_zero_star: CFG-Zero* (arXiv:2503.18886; diffusers' `ClassifierFreeZeroStarGuidance`): the unconditional
            prediction is scaled to its projection on the conditional one, and the first steps predict zero.
        zero_init_steps: how many first steps predict zero; 0 without `cfg_zero_star`.

    Raises:
        RequestError: a value is out of its range, or not a number.
    """

    scale: float
    rescale: float = 0.0
    interval: tuple[float, float] = WHOLE
    cfg_zero_star: bool = False
    zero_init_steps: int = 0

    def __post_init__(self) -> None:
        scale, rescale = as_number(self.scale), as_number(self.rescale)
        if scale is None or scale < 0:
            raise RequestError(
                f"guidance_scale is {self.scale!r}; expected a finite number of 0 or more (1 turns guidance off)"
            )
        if rescale is None or not 0 <= rescale <= 1:
            raise RequestError(f"guidance_rescale is {self.rescale!r}; expected a number from 0 to 1 (0 turns it off)")
        star, steps = as_flag(self.cfg_zero_star), as_integer(self.zero_init_steps)
        if star is None:
            raise RequestError(f"cfg_zero_star is {self.cfg_zero_star!r}; expected True or False")
        if steps is None or steps < 0:
            raise RequestError(f"zero_init_steps is {self.zero_init_steps!r}; expected an integer of 0 or more")
        if steps and not star:
            raise RequestError(f"zero_init_steps is {steps} but cfg_zero_star is off; turn it on, or leave it out")
        interval = _checked_interval(self.interval)
        checked = {"scale": scale, "rescale": rescale, "interval": interval, "cfg_zero_star": star}
        for name, value in {**checked, "zero_init_steps": steps}.items():
            object.__setattr__(self, name, value)

    @property
    def needs_negative(self) -> bool:
        """Whether any step may need the unconditional prediction."""
        return self.scale > 1.0

    def passes(self, step: int, steps: int) -> int:
        """Predictions that a step is made of: none where it predicts zero, the conditional one, or both.

        Args:
            step: index of the step, from 0.
            steps: how many times the sampler asks for a prediction in all.
        """
        if step < self.zero_init_steps:
            return 0
        start, stop = (int(fraction * steps) for fraction in self.interval)
        return 2 if self.needs_negative and start <= step < stop else 1

    def combine(self, predictions: Sequence[Array]) -> Array:
        """The prediction that the sampler steps with.

        Args:
            predictions: float32 (B, …): the conditional one, or the conditional and the unconditional one.

        Returns:
            float32, of their shape.
        """
        conditional = predictions[0]
        if len(predictions) == 1:
            return conditional
        unconditional = predictions[1]
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused by name in the end
            if self.cfg_zero_star:
                unconditional = projection_scale(conditional, unconditional) * unconditional
            guided = guide(conditional, unconditional, self.scale)
            return rescaled(guided, conditional, self.rescale) if self.rescale else guided

    def settings(self) -> dict[str, Any]:
        """As plain JSON values, under the names that the pipeline's call has for them."""
        return {
            "guidance_scale": self.scale,
            "guidance_rescale": self.rescale,
            "guidance_interval": list(self.interval),
            "cfg_zero_star": self.cfg_zero_star,
            "zero_init_steps": self.zero_init_steps,
        }


def guide(conditional: Array, unconditional: Array, scale: float) -> Array:
    """unconditional + scale * (conditional - unconditional), in float32; both arrays keep their shape."""
    guided: Array = conditional - unconditional
    guided *= np.float32(scale)
    guided += unconditional
    return guided


def projection_scale(conditional: Array, unconditional: Array) -> Array:
    """s* = <c, u> / |u|^2 of each video: s* u is the multiple of u that comes nearest to c.

    Args:
        conditional: c, float32 (B, …).
        unconditional: u, of that shape.

    Returns:
        float32 (B, 1, …), one factor for each video.
    """
    axes = tuple(range(1, conditional.ndim))
    product = np.sum(conditional * unconditional, axis=axes, keepdims=True, dtype=np.float64)
    square = np.sum(np.square(unconditional), axis=axes, keepdims=True, dtype=np.float64)
    scale: Array = np.asarray(product / (square + NORM_FLOOR), np.float32)
    return scale


def rescaled(guided: Array, conditional: Array, rescale: float) -> Array:
    """Brings each video's standard deviation back towards that of its conditional prediction.

    Source: arXiv:2305.08891, equations 15 and 16; diffusers' `rescale_noise_cfg`.

    Args:
        guided: float32 (B, …).
        conditional: of that shape.
        rescale: 0 to 1; at 1 both have one standard deviation.

    Returns:
        float32, of that shape; a guided prediction that is constant stays as it is.
    """
    axes = tuple(range(1, guided.ndim))
    wanted, found = (
        np.std(prediction, axis=axes, keepdims=True, ddof=1, dtype=np.float64) for prediction in (conditional, guided)
    )
    ratio = np.divide(wanted, found, out=np.ones_like(found), where=found > 0)
    factor = (rescale * ratio + (1 - rescale)).astype(np.float32)
    result: Array = guided * factor
    return result


def _checked_interval(interval: object) -> tuple[float, float]:
    given = interval if isinstance(interval, (tuple, list)) else ()
    pair = [number for item in given if (number := as_number(item)) is not None]
    if not len(given) == len(pair) == 2 or not 0 <= pair[0] < pair[1] <= 1:
        raise RequestError(
            f"guidance_interval is {interval!r}; expected (start, stop), fractions of the steps with "
            "0 <= start < stop <= 1"
        )
    return pair[0], pair[1]
