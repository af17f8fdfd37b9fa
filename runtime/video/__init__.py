"""Video files, written frame by frame: mp4, webm, gif, a folder of png, npy; the same frames give the same bytes."""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from t2v_rt.errors import RequestError
from t2v_rt.numbers import as_number
from t2v_rt.runtime.video.formats import (
    CODECS,
    FOLDER,
    FORMATS,
    SIDECAR,
    canonical_json,
    file_url,
    format_of,
    metadata_path,
)
from t2v_rt.runtime.video.images import SHEET_GAP, Frame, check_png, contact_sheet, encode_png, write_png
from t2v_rt.runtime.video.writers import ArrayWriter, ContainerWriter, FolderWriter, VideoWriter
from t2v_rt.system.outputs import check_place

__all__ = [
    "FORMATS",
    "SHEET_GAP",
    "Frame",
    "VideoWriter",
    "canonical_json",
    "check_output",
    "check_png",
    "contact_sheet",
    "encode_png",
    "metadata_path",
    "open_writer",
    "read_metadata",
    "side_files",
    "write_png",
]
FRAME = re.compile(r"frame_\d{5,}\.png")
FPS_RANGE = (0.01, 1000.0)
GIF_MAX_FPS = 50.0  # gif counts in hundredths of a second, and browsers slow down anything shorter than two


def check_output(path: str | Path) -> Path:
    """Checks, before any work, that a video can be written to a path.

    Args:
        path: a file of a known extension, or a folder (no extension, .png, or a trailing separator) for single images.

    Returns:
        The path that is to be written: absolute, and of a link, its target.

    Raises:
        RequestError: unknown extension (the known are listed), a missing or unwritable folder, or something there that
            is not ours to replace: a folder that holds anything but frames written here, a device, a pipe …
    """
    suffix = format_of(path)
    if suffix not in FORMATS:
        raise RequestError(
            f"{path}: unknown video format {suffix!r}; expected one of {', '.join(FORMATS)}, "
            "or a name without extension for a folder of png"
        )
    kind, what = (stat.S_IFDIR, "a folder of frames") if suffix == FOLDER else (stat.S_IFREG, f"a {suffix} file")
    target = check_place(path, kind, what)
    for beside in side_files(path):
        check_place(beside, stat.S_IFREG, "a file, and metadata is to be written there")
        if beside.exists() and not _is_metadata(beside):
            raise RequestError(
                f"{beside} was not written here, and metadata is to be written there; choose another name"
            )
    if target.is_dir() and not _holds_only_frames(target):
        raise RequestError(f"{path} is not a folder of frames that was written here; choose another name")
    return target


def side_files(path: str | Path) -> tuple[Path, ...]:
    """What is written beside a video: its metadata, where its format carries none."""
    return (metadata_path(Path(path)),) if format_of(path) in SIDECAR else ()


def _holds_only_frames(folder: Path) -> bool:
    """Whether nothing is lost with a folder: it is empty, or has frames alone, and their metadata beside it."""
    items = list(folder.iterdir())
    frames = all(FRAME.fullmatch(item.name) and stat.S_ISREG(item.lstat().st_mode) for item in items)
    return frames and (not items or metadata_path(folder).is_file())


def _is_metadata(path: Path) -> bool:
    """Whether a file is written to the letter as metadata is."""
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        return isinstance(content, dict) and text == canonical_json(content) + "\n"
    except (OSError, ValueError):  # RequestError among them
        return False


def open_writer(
    path: str | Path, *, fps: float, width: int, height: int, num_frames: int, metadata: Mapping[str, object]
) -> VideoWriter:
    """Opens a video for writing; use it in a `with` block.

    The file appears, complete, when the block ends well; after an error nothing is left, and an older file of that name
    stays as it was.

    Args:
        path: a file of a known extension, or a folder (no extension, .png, or a trailing separator) for single images.
        fps: frames per second.
        width: in pixels, even for mp4 and webm.
        height: in pixels, even for mp4 and webm.
        num_frames: how many frames will be written.
        metadata: plain JSON values that are kept with the video (`read_metadata`); its `prompt` is the title as well.

    Returns:
        The writer, to be entered.

    Raises:
        RequestError: the path, the size, the rate or the metadata is not possible.
    """
    target, suffix = check_output(path), format_of(path)
    rate = as_number(fps)
    if rate is None or not FPS_RANGE[0] <= rate <= FPS_RANGE[1]:
        raise RequestError(f"{target}: frames at {fps} per second; expected {FPS_RANGE[0]} to {FPS_RANGE[1]:g}")
    if suffix == ".gif" and rate > GIF_MAX_FPS:
        raise RequestError(f"{target}: gif shows at most {GIF_MAX_FPS:g} frames per second, not {fps}; use mp4 or webm")
    if min(width, height, num_frames) < 1:
        raise RequestError(f"{target}: {num_frames} frames of {width}x{height}; expected all to be 1 or more")
    if suffix in CODECS and CODECS[suffix].pixels == "yuv420p" and (width % 2 or height % 2):
        raise RequestError(f"{target}: {suffix} needs even sizes, not {width}x{height}; choose another format or size")
    kinds: dict[str, type[VideoWriter]] = {FOLDER: FolderWriter, ".npy": ArrayWriter}
    return kinds.get(suffix, ContainerWriter)(target, suffix, rate, width, height, num_frames, metadata)


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Reads back what `open_writer` was given as metadata.

    Args:
        path: the video, in any format.

    Returns:
        The metadata.

    Raises:
        RequestError: the file is missing or carries none.
    """
    target = Path(path)
    suffix = FOLDER if target.is_dir() else format_of(path)
    try:
        text = metadata_path(target).read_text(encoding="utf-8") if suffix in SIDECAR else _comment(target)
        content = json.loads(text)
    except (OSError, ValueError) as exc:
        raise RequestError(f"{target}: no metadata of t2v-rt can be read ({exc}); expected a video it wrote") from exc
    if not isinstance(content, dict):
        raise RequestError(f"{target}: no metadata of t2v-rt, but {type(content).__name__}; expected a video it wrote")
    return content


def _comment(path: Path) -> str:
    import av

    try:
        with av.open(file_url(path)) as container:
            return next((value for key, value in container.metadata.items() if key.lower() == "comment"), "")
    except av.FFmpegError as exc:
        raise OSError(exc.strerror) from exc
