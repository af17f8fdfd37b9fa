"""What is particular to the Wan2.1 family at run time: sizes, the text encoder's extra input, the padded text."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from t2v_rt.engines.manifest import ModelSpec
from t2v_rt.errors import RequestError

Array = NDArray[np.float32]


def check_size(model: ModelSpec, height: int, width: int, num_frames: int) -> None:
    """Refuses sizes the model cannot make, naming the nearest it can.

    Raises:
        RequestError: height or width is no multiple of the patch, frames are not `k * temporal_factor + 1`, or an axis
            has more patches than the model has positions.
    """
    for name, value, patch in (("height", height, model.patch[1]), ("width", width, model.patch[2])):
        step = model.spatial_factor * patch
        _check_grid(name, value, step, 0, step * model.max_patches)
    limit = (model.patch[0] * model.max_patches - 1) * model.temporal_factor + 1
    _check_grid("num_frames", num_frames, model.temporal_factor, 1, max(limit, 1))


def _check_grid(name: str, value: int, step: int, offset: int, limit: int) -> None:
    if value >= max(offset, 1) and (value - offset) % step == 0:
        if value > limit:
            raise RequestError(f"{name} is {value}; the model has positions for at most {limit}")
        return
    least = offset or step
    below = max(least, (value - offset) // step * step + offset)
    rule = f"a multiple of {step}" if offset == 0 else f"a multiple of {step} plus {offset}"
    nearest = f"{below} or {below + step}" if value > least else f"{least}"
    raise RequestError(f"{name} is {value}; expected {rule}: the nearest valid value is {nearest}")


def latent_shape(model: ModelSpec, batch: int, height: int, width: int, num_frames: int) -> tuple[int, ...]:
    """Shape (B, C, F, H, W) of the latents of a video of that size."""
    return (
        batch,
        model.latent_channels,
        (num_frames - 1) // model.temporal_factor + 1,
        height // model.spatial_factor,
        width // model.spatial_factor,
    )


def video_size(model: ModelSpec, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Height, width in pixels and frames of the video that latents of a shape (B, C, F, H, W) stand for."""
    _, _, frames, height, width = shape
    return height * model.spatial_factor, width * model.spatial_factor, (frames - 1) * model.temporal_factor + 1


def relative_buckets(length: int, buckets: int, max_distance: int) -> NDArray[np.int64]:
    """Bucket of each (query, key) pair of positions for the encoder's relative-position bias.

    Exact up to a quarter of the buckets, then logarithmic up to `max_distance`; later keys use the upper half.
    Source: T5 (arXiv:1910.10683), transformers `UMT5Attention._relative_position_bucket`.

    Args:
        length: L.
        buckets: number of buckets.
        max_distance: distance from which all share the last bucket.

    Returns:
        int64 (L, L).
    """
    side = buckets // 2
    exact = side // 2
    position = np.arange(length)
    offset = position[None, :] - position[:, None]
    distance = np.arange(length)
    # in float32 step by step, as the reference: a distance on the edge of two buckets must fall on the same side
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact)) / np.float32(
        math.log(max_distance / exact)
    )
    far = np.minimum(exact + (ratio * np.float32(side - exact)).astype(np.int64), side - 1)
    bucket = np.where(distance < exact, distance, far)
    result: NDArray[np.int64] = bucket[np.abs(offset)] + side * (offset > 0)
    return result


@dataclass(frozen=True)
class TextContext:
    """Prompt embeddings as the denoiser takes them.

    Args:
        embeds: float32 (B, L, D).
        bias: float32 (B, L), added to each position's attention score; minus infinity hides a position.
    """

    embeds: Array
    bias: Array


def text_context(prompt_embeds: Array) -> TextContext:
    """Merges the zero rows that pad prompt embeddings into one row that weighs as many.

    The reference lets the denoiser attend to all padded positions; they are zero vectors, so their keys and values are
    alike, and n equal scores s weigh as much as one of s + log(n).

    Args:
        prompt_embeds: float32 (B, L, D), each prompt's rows followed by rows of zeros.

    Returns:
        The same content in as few rows as the longest prompt needs, plus one where there is padding.
    """
    batch, length, _ = prompt_embeds.shape
    used = np.any(prompt_embeds != 0, axis=2)
    lengths = [int(np.flatnonzero(row)[-1]) + 1 if row.any() else 0 for row in used]
    rows = min(length, max(lengths) + 1)
    bias = np.full((batch, rows), -np.inf, np.float32)
    for row, valid in zip(bias, lengths, strict=True):
        row[:valid] = 0.0
        if valid < length:
            row[valid] = math.log(length - valid)
    return TextContext(np.ascontiguousarray(prompt_embeds[:, :rows]), bias)


def denormalize(model: ModelSpec, latents: Array) -> Array:
    """Latents of the denoiser -> latents of the VAE, (B, C, …): z * std + mean per channel."""
    shape = (1, -1) + (1,) * (latents.ndim - 2)
    # divided by 1/std, as the reference rounds it
    scale = np.float32(1.0) / np.asarray(model.latents_std, np.float32).reshape(shape)
    return latents / scale + np.asarray(model.latents_mean, np.float32).reshape(shape)


def to_unit_range(frames: Array) -> Array:
    """Decoder output (F, 3, H, W), nominally in [-1, 1] -> frames (F, H, W, 3) in [0, 1]."""
    unit = np.clip(np.clip(frames, -1.0, 1.0) * np.float32(0.5) + np.float32(0.5), 0.0, 1.0)
    return np.ascontiguousarray(unit.transpose(0, 2, 3, 1))


def to_uint8(frames: Array) -> NDArray[np.uint8]:
    """Frames in [0, 1] -> 0..255, rounded to nearest as diffusers' `numpy_to_pil`."""
    levels: NDArray[np.uint8] = np.rint(frames * np.float32(255.0)).astype(np.uint8)
    return levels
