"""Single images: png, and many frames on one sheet."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from t2v_rt.errors import RequestError, T2VError
from t2v_rt.system.files import writing
from t2v_rt.system.outputs import check_file

Frame = NDArray[np.uint8]
SHEET_GAP = 2  # pixels between the tiles of a contact sheet
PNG_OPTIONS = {"pred": "mixed"}  # a filter per row: about 7 % smaller than one for all


def check_image(what: str, image: Frame, shape: tuple[int, ...] | None = None) -> None:
    """Refuses what is not an RGB image.

    Args:
        what: its name in the error.
        image: expected to be uint8 (H, W, 3).
        shape: the exact shape, where it is known.

    Raises:
        RequestError: another type, dtype or shape, or an empty image.
    """
    if isinstance(image, np.ndarray):
        right = image.shape == shape if shape else image.ndim == 3 and image.shape[2] == 3 and image.size > 0
        if right and image.dtype == np.uint8:
            return
        found = f"{image.dtype} {list(image.shape)}"
    else:
        found = type(image).__name__
    raise RequestError(f"{what} is {found}; expected uint8 {list(shape) if shape else '[height, width, 3]'}")


def encode_png(image: Frame) -> bytes:
    """An image as the bytes of a png file.

    Args:
        image: uint8 (H, W, 3), RGB.

    Returns:
        The file's content, the same for the same image.

    Raises:
        RequestError: not such an image.
    """
    import av

    check_image("image", image)
    context = av.CodecContext.create("png", "w")
    context.height, context.width = image.shape[:2]
    context.pix_fmt, context.time_base = "rgb24", Fraction(1, 1)
    context.options = dict(PNG_OPTIONS)
    context.thread_count = 1
    packets = context.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24"))
    return b"".join(bytes(packet) for packet in [*packets, *context.encode(None)])


def write_png(path: str | Path, image: Frame) -> None:
    """Writes an image; the file is there whole or not at all.

    Args:
        path: name of the file, ending in .png; an older one is replaced.
        image: uint8 (H, W, 3), RGB.

    Raises:
        RequestError: not such an image, or the path cannot be written to.
        T2VError: the disk failed.
    """
    target = check_png(path)
    content = encode_png(image)
    try:
        with writing(target) as stream:
            stream.write(content)
    except OSError as exc:
        raise T2VError(f"{target} cannot be written ({exc}); free some disk space or choose another place") from exc


def check_png(path: str | Path) -> Path:
    """Checks that a png can be written; see `check_file`."""
    return check_file(path, ".png", "a png file")


def contact_sheet(frames: Frame, columns: int) -> Frame:
    """Frames side by side in rows, a thin white gap between them.

    Args:
        frames: uint8 (F, H, W, 3).
        columns: frames per row, at most; fewer frames make a narrower sheet.

    Returns:
        uint8 (h, w, 3).

    Raises:
        RequestError: no frames, frames of another kind, or no columns.
    """
    if not isinstance(frames, np.ndarray) or frames.ndim != 4 or not len(frames):
        found = f"{frames.dtype} {list(frames.shape)}" if isinstance(frames, np.ndarray) else type(frames).__name__
        raise RequestError(f"frames is {found}; expected uint8 [frames, height, width, 3]")
    check_image("frame", frames[0])
    if columns < 1:
        raise RequestError(f"columns is {columns}; expected 1 or more")
    count, height, width, _ = frames.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    step_y, step_x = height + SHEET_GAP, width + SHEET_GAP
    sheet = np.full((rows * step_y - SHEET_GAP, columns * step_x - SHEET_GAP, 3), 255, np.uint8)
    for i, frame in enumerate(frames):
        y, x = i // columns * step_y, i % columns * step_x
        sheet[y : y + height, x : x + width] = frame
    return sheet
