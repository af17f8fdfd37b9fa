"""Classifier-free guidance (arXiv:2207.12598)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


def uses_guidance(scale: float) -> bool:
    """Whether a scale needs the unconditional prediction; at 1 or less the reference makes no second call."""
    return scale > 1.0


def guide(conditional: Array, unconditional: Array, scale: float) -> Array:
    """unconditional + scale * (conditional - unconditional), in float32; both arrays keep their shape."""
    return unconditional + np.float32(scale) * (conditional - unconditional)
