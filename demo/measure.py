"""What a clip shows, measured from its pixels: colours, shape and motion of the one object on a plain background."""

from __future__ import annotations

from dataclasses import dataclass

import clips
import numpy as np
from numpy.typing import NDArray

BORDER = 3  # pixels along the edge that show the background
LEAST_CONTRAST = 0.12  # of an object against its background, in units of the colour cube's side
BOUNCE_PATH = 10.0  # pixels that a bouncing object covers at least, up and down
SQUARE_FILL, BALL_FILL = 0.89, 0.66  # share of its bounding box: a square 1, a disc 0.785, a triangle 0.5


@dataclass(frozen=True)
class Reading:
    """What was measured of one clip; None where no object was found."""

    colour: str | None
    background: str
    shape: str | None
    motion: str | None


def read_clip(frames: NDArray[np.floating]) -> Reading:
    """Measures a clip.

    Args:
        frames: (F, H, W, 3) in [0, 1].

    Returns:
        The nearest names of colour, background, shape and motion.
    """
    edge = np.ones(frames.shape[1:3], bool)
    edge[BORDER:-BORDER, BORDER:-BORDER] = False
    background = np.median(frames[:, edge], axis=(0, 1))
    contrast = np.linalg.norm(frames - background, axis=3)
    strongest = float(np.quantile(contrast, 0.98))
    if strongest < LEAST_CONTRAST:
        return Reading(None, nearest_colour(background), None, None)
    mask = contrast > 0.5 * strongest
    colour = np.median(frames[contrast > 0.75 * strongest], axis=0)
    return Reading(nearest_colour(colour), nearest_colour(background), _shape(mask), _motion(mask))


def nearest_colour(colour: NDArray[np.floating]) -> str:
    """The name of the nearest colour of the palette."""
    names = list(clips.COLOURS)
    palette = np.array([clips.COLOURS[name] for name in names]) / 255
    return names[int(np.argmin(np.linalg.norm(palette - colour, axis=1)))]


def _shape(mask: NDArray[np.bool_]) -> str:
    fills = []
    for frame in mask:
        if frame.any():
            rows, columns = np.flatnonzero(frame.any(1)), np.flatnonzero(frame.any(0))
            fills.append(frame.sum() / ((rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)))
    fill = float(np.median(fills))
    return "square" if fill > SQUARE_FILL else "ball" if fill > BALL_FILL else "triangle"


def _motion(mask: NDArray[np.bool_]) -> str | None:
    """Of the track of the object's centre: the larger net displacement, or a way up and down that leads nowhere."""
    seen = mask[mask.any((1, 2))]
    if len(seen) < 4:
        return None
    weight = seen.sum((1, 2))
    y = (seen * np.arange(mask.shape[1])[:, None]).sum((1, 2)) / weight
    x = (seen * np.arange(mask.shape[2])).sum((1, 2)) / weight
    dx, dy = (float(v[-2:].mean() - v[:2].mean()) for v in (x, y))
    path = float(np.abs(np.diff(y)).sum())
    if path > BOUNCE_PATH and path > 2.0 * abs(dy) and path > abs(dx):
        return "bouncing"
    if abs(dx) > abs(dy):
        return "right" if dx > 0 else "left"
    return "down" if dy > 0 else "up"
