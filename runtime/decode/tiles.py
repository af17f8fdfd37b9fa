"""Tiles of a decoder's local part: which features each is fed, and which of its pixels are kept.

Every pixel is kept from one tile that saw all it depends on, so nothing is blended and no seam can show. All tiles of a
grid have one size, so that engines of a fixed shape serve: those at the border see more than they need.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from t2v_rt.engines.bundle.manifest import TileSpec
from t2v_rt.errors import RequestError
from t2v_rt.numbers import as_integer

Grid = tuple[int, int]  # tiles from top to bottom, and from left to right
WHOLE: Grid = (1, 1)


@dataclass(frozen=True)
class Span:
    """One tile along one axis.

    Args:
        fed: features that it is fed.
        kept: of its own pixels, those that are kept.
        target: the frame's pixels that these are.
    """

    fed: slice
    kept: slice
    target: slice


@dataclass(frozen=True)
class Tile:
    """One tile of a grid."""

    rows: Span
    columns: Span


def make_tiles(height: int, width: int, grid: Grid, spec: TileSpec) -> list[Tile]:
    """The tiles of a frame.

    Args:
        height: of the features.
        width: of the features.
        grid: tiles from top to bottom, and from left to right.
        spec: of the decoder.

    Returns:
        As many tiles, row by row, all fed the same number of rows and of columns.

    Raises:
        RequestError: more tiles than there are rows or columns of features.
    """
    rows, columns = spans(height, grid[0], spec), spans(width, grid[1], spec)
    return [Tile(*pair) for pair in itertools.product(rows, columns)]


def spans(length: int, count: int, spec: TileSpec) -> list[Span]:
    """Splits an axis of features into `count` spans of nearly one length; each is fed `halo` more on both sides."""
    fed = fed_length(length, count, spec)
    edges = [i * length // count for i in range(count + 1)]
    result = []
    for begin, end in itertools.pairwise(edges):
        start = min(max(begin - spec.halo, 0), length - fed)
        up = spec.upscale
        result.append(
            Span(
                slice(start, start + fed), slice((begin - start) * up, (end - start) * up), slice(begin * up, end * up)
            )
        )
    return result


def fed_length(length: int, count: int, spec: TileSpec) -> int:
    """Features that each of `count` tiles is fed along an axis.

    Raises:
        RequestError: more tiles than features.
    """
    if not 1 <= count <= length:
        raise RequestError(f"{count} tiles were asked for along an axis of {length} features; expected 1 to {length}")
    return spec.fed_length(length, count)


def parse_grid(text: str | Sequence[int]) -> Grid:
    """Reads a grid: `2x3` or (2, 3) is two tiles from top to bottom and three from left to right.

    Raises:
        RequestError: not a grid.
    """
    if isinstance(text, str):
        match = re.fullmatch(r"\s*(\d+)\s*x\s*(\d+)\s*", text)
        given: tuple[object, ...] = match.groups() if match else ()
        pair = [int(item) for item in match.groups()] if match else []
    else:
        given = tuple(text) if isinstance(text, (tuple, list)) else ()
        pair = [size for item in given if (size := as_integer(item)) is not None]
    if not len(given) == len(pair) == 2 or min(pair) < 1:
        raise RequestError(f"vae_tiles is {text!r}; expected rows x columns, such as 2x3")
    return pair[0], pair[1]
