"""What a model predicts, turned into the data x0 or the noise epsilon, and what keeps x0 in range.

A noisy sample is x = alpha x0 + sigma epsilon. A model predicts epsilon, x0 itself (`sample`), the velocity
alpha epsilon - sigma x0 (`v_prediction`, Salimans and Ho, arXiv:2202.00512) or the flow epsilon - x0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from t2v_rt.runtime.schedulers.blockwise import blockwise

Float32 = NDArray[np.float32]
Prediction = Literal["epsilon", "sample", "v_prediction"]
FlowOrPrediction = Literal["epsilon", "sample", "v_prediction", "flow_prediction"]


def data_prediction(kind: str, m: Float32, x: Float32, alpha: Any, sigma: Any) -> Float32:
    """x0 from a model output m at a sample x with the scalars alpha and sigma; always a new array."""
    a, s = np.float32(alpha), np.float32(sigma)
    formulas: dict[str, Callable[[Float32, Float32], Any]] = {
        "epsilon": lambda x, m: (x - s * m) / a,
        "sample": lambda x, m: m,
        "v_prediction": lambda x, m: a * x - s * m,
        "flow_prediction": lambda x, m: x - s * m,
    }
    return blockwise(formulas[kind], x, m)


def noise_prediction(kind: str, m: Float32, x: Float32, alpha: Any, sigma: Any) -> Float32:
    """epsilon of a prediction; a flow is not taken here."""
    a, s = np.float32(alpha), np.float32(sigma)
    formulas: dict[str, Callable[[Float32, Float32], Any]] = {
        "epsilon": lambda x, m: m,
        "sample": lambda x, m: (x - a * m) / s,
        "v_prediction": lambda x, m: a * m + s * x,
    }
    return blockwise(formulas[kind], x, m)


def clip(x0: Float32, limit: float) -> Float32:
    """x0 clipped to [-limit, limit], in place."""
    return np.clip(x0, -limit, limit, out=x0)


def threshold(x0: Float32, ratio: float, limit: float) -> Float32:
    """Dynamic thresholding (Saharia et al., arXiv:2205.11487): each sample clipped to a quantile of its absolute
    values and divided by it, in place.

    Args:
        x0: float32 (B, …), changed.
        ratio: the quantile, 0 to 1.
        limit: the largest value to clip to; the smallest is 1.
    """
    for sample in x0:
        values = np.abs(sample).reshape(-1)
        rank = float(np.float32(ratio) * np.float32(values.size - 1))
        low, high = math.floor(rank), math.ceil(rank)
        values.partition((low, high))
        s = values[low] + np.float32(rank - low) * (values[high] - values[low])
        s = np.float32(min(max(float(s), 1.0), limit))
        np.clip(sample, -s, s, out=sample)
        np.divide(sample, s, out=sample)
    return x0
