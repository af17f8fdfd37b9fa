"""Arrays between latents and pictures: the decoder's scaling, and the ranges of pixels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from t2v_rt.engines.bundle.model import LatentSpec

Array = NDArray[np.float32]


def denormalize(spec: LatentSpec, latents: Array) -> Array:
    """Latents of the denoiser -> latents of the VAE, (B, C, …): z / scale + shift per channel."""
    shape = (1, -1) + (1,) * (latents.ndim - 2)
    scale, shift = (np.asarray(values, np.float32).reshape(shape) for values in (spec.scale, spec.shift))
    result: Array = latents / scale + shift
    return result


def to_unit_range(frames: Array) -> Array:
    """Decoder output (F, 3, H, W), nominally in [-1, 1] -> frames (F, H, W, 3) in [0, 1]."""
    unit: Array = np.clip(frames.transpose(0, 2, 3, 1), -1.0, 1.0, order="C")
    unit *= np.float32(0.5)
    unit += np.float32(0.5)
    return unit


def to_uint8(frames: Array) -> NDArray[np.uint8]:
    """Frames in [0, 1] -> 0..255, rounded to nearest as diffusers' `numpy_to_pil`."""
    levels: Array = frames * np.float32(255.0)
    return np.rint(levels, out=levels).astype(np.uint8)
