"""A quick look at latents: the VAE decodes a thumbnail of them, and a linear map adds the detail that it lacks.

A linear map from latent channels to colours alone, found once for a model, is the usual way and a cheaper one. But on
the demo's VAE even the map that fits the finished videos best is far less like them, and one that is fitted to what
random latents decode to is not like them at all (benchmarks/results/preview.json): a decoder is linear at most where it
is looked at. So the map is fitted by least squares to the thumbnail of the very latents.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from t2v_rt.engines.bundle.model import thumbnail_factor
from t2v_rt.errors import EngineError, PreviewError
from t2v_rt.runtime.decode.tiles import WHOLE
from t2v_rt.runtime.frames import to_uint8
from t2v_rt.runtime.memory.plan import make_plan
from t2v_rt.runtime.stages import Stages

Array = NDArray[np.float32]
RIDGE = 0.1  # of each channel's variance 1: keeps the slopes of channels that hardly differ from growing


def preview(stages: Stages, latents: Array) -> NDArray[np.uint8]:
    """The colours of latents, one image for each latent frame.

    Args:
        stages: whose VAE is used; it is loaded beside the denoiser.
        latents: float32 (B, C, F, h, w).

    Returns:
        uint8 (B, F, h, w, 3); the frames of one latent frame are averaged.

    Raises:
        PreviewError: the VAE failed or gave values that are not finite.
    """
    try:
        return np.stack([to_uint8(_preview_video(stages, video)) for video in latents])
    except EngineError as exc:
        stages.components.release("vae_decoder")  # with all that the failed try had allocated
        raise PreviewError(str(exc)) from exc


def _preview_video(stages: Stages, video: Array) -> Array:
    """Colours (F, h, w, 3) in [0, 1] of one video's latents (C, F, h, w)."""
    _, _, height, width = video.shape
    factor = thumbnail_factor(height, width)
    means = shrunk(video, factor)
    # the VAE has never seen latents of the little contrast that averages have
    small = with_contrast_of(video, means)
    size = stages.manifest.model.latents.spatial_factor
    # what keeps components loaded is the plan of the run that is looked at, not this one
    plan = make_plan(stages.manifest, (1, *small.shape), grid=WHOLE).releasing()
    counts = stages.manifest.model.decode.chunks(video.shape[1])
    images = [
        frames.mean(0)
        for chunk, count in zip(stages.decode(small[None], plan), counts, strict=True)
        for frames in np.array_split(chunk, count)
    ]
    colours = shrunk(np.stack(images).transpose(3, 0, 1, 2), size)
    detail = video - enlarged(means, factor, height, width)
    slopes = fitted_slopes(small, colours)
    result: Array = enlarged(colours, factor, height, width) + np.einsum("cr,cfhw->rfhw", slopes, detail)
    return np.clip(result, 0.0, 1.0).transpose(1, 2, 3, 0)


def shrunk(array: Array, factor: int) -> Array:
    """Means of squares of pixels, (…, H, W) -> (…, ceil(H / factor), ceil(W / factor)); edges are repeated to fill."""
    *rest, height, width = array.shape
    padding = [(0, 0)] * len(rest) + [(0, -height % factor), (0, -width % factor)]
    padded = np.pad(array, padding, mode="edge")
    rows, columns = padded.shape[-2] // factor, padded.shape[-1] // factor
    result: Array = padded.reshape(*rest, rows, factor, columns, factor).mean((-3, -1))
    return result


def enlarged(array: Array, factor: int, height: int, width: int) -> Array:
    """Pixels repeated, (…, h, w) -> (…, height, width)."""
    return array.repeat(factor, -2).repeat(factor, -1)[..., :height, :width]


def with_contrast_of(full: Array, means: Array) -> Array:
    """Means (C, F, h, w), stretched to the standard deviation that each channel of each frame has in full size."""
    wanted, found = (array.std((2, 3), keepdims=True) for array in (full, means))
    centre = means.mean((2, 3), keepdims=True)
    ratio = np.divide(wanted, found, out=np.ones_like(found), where=found > 0)
    return np.ascontiguousarray((means - centre) * ratio + centre, np.float32)


def fitted_slopes(latents: Array, colours: Array) -> Array:
    """Ridge regression of colours on latent channels.

    Args:
        latents: float32 (C, F, h, w).
        colours: float32 (3, F, h, w).

    Returns:
        float32 (C, 3): how much each colour changes with each channel.
    """
    x, y = (array.reshape(len(array), -1).astype(np.float64) for array in (latents, colours))
    x, y = x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True)
    covariance = x @ x.T / x.shape[1] + RIDGE * np.eye(len(x))
    slopes: NDArray[Any] = np.linalg.solve(covariance, x @ y.T / x.shape[1])
    return slopes.astype(np.float32)
