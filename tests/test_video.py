"""Video files: what is written is what was given, whole or not at all, and the same bytes twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from t2v_rt.errors import RequestError
from t2v_rt.runtime.video import FORMATS, check_output, contact_sheet, encode_png, open_writer, read_metadata

NAMES = ("out.mp4", "out.webm", "out.gif", "frames", "frames.png", "out.npy")
LOSSY_TOLERANCE = 12.0  # mean absolute difference in levels that compression and 4:2:0 colour may cost
METADATA = {"prompt": "一个红色的球", "seed": 3, "guidance_scale": 5.0}


def clip(count: int = 9, height: int = 32, width: int = 48) -> np.ndarray:
    """A disc that crosses a plain background."""
    rows, columns = np.mgrid[0:height, 0:width]
    frames = np.empty((count, height, width, 3), np.uint8)
    for i, frame in enumerate(frames):
        disc = np.hypot(rows - height / 2, columns - 8 - 3 * i) < 7
        frame[:] = np.where(disc[..., None], (220, 30, 35), (35, 65, 220))
    return frames


def write(path: Path, frames: np.ndarray, **changes: Any) -> Path:
    settings: dict[str, Any] = {
        "fps": 8.0,
        "width": frames.shape[2],
        "height": frames.shape[1],
        "num_frames": len(frames),
        "metadata": METADATA,
        **changes,
    }
    with open_writer(path, **settings) as writer:
        for frame in frames:
            writer.write(frame)
    return path


def read(path: Path) -> np.ndarray:
    if path.suffix == ".npy":
        return np.load(path)
    if path.is_dir():
        return np.concatenate([read(file) for file in sorted(path.iterdir())])
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def content(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("name", NAMES)
def test_frames_and_metadata_come_back(tmp_path: Path, name: str) -> None:
    frames = clip()
    path = write(tmp_path / name, frames)
    found = read(path)
    assert found.shape == frames.shape
    difference = np.abs(found.astype(float) - frames).mean()
    assert difference == 0 if path.suffix in ("", ".png", ".npy") else difference < LOSSY_TOLERANCE
    assert read_metadata(path) == METADATA


@pytest.mark.parametrize("name", NAMES)
def test_the_same_frames_give_the_same_bytes(tmp_path: Path, name: str) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / name, clip())
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_mp4_plays_in_a_browser(tmp_path: Path) -> None:
    path = write(tmp_path / "out.mp4", clip())
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == 8
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # it can start before all of it is loaded


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_left_after_an_error_and_an_old_file_stays(
    tmp_path: Path, name: str, error: type[BaseException]
) -> None:
    def fail(path: Path) -> None:
        frames = clip()
        with open_writer(path, fps=8, width=48, height=32, num_frames=9, metadata={}) as writer:
            writer.write(frames[0])
            raise error

    with pytest.raises(error):
        fail(tmp_path / name)
    assert not list(tmp_path.iterdir())
    write(tmp_path / name, clip())
    before = content(tmp_path)
    with pytest.raises(error):
        fail(tmp_path / name)
    assert content(tmp_path) == before


def test_an_older_file_is_replaced(tmp_path: Path) -> None:
    for count in (9, 5):
        assert len(read(write(tmp_path / "frames", clip(count)))) == count


@pytest.mark.parametrize("name", NAMES)
def test_promised_frames_must_come(tmp_path: Path, name: str) -> None:
    with pytest.raises(RequestError, match="9 of 10 frames"):
        write(tmp_path / name, clip(), num_frames=10)
    with pytest.raises(RequestError, match="more than the 8 frames"):
        write(tmp_path / name, clip(), num_frames=8)
    assert not list(tmp_path.iterdir())


def test_what_is_refused(tmp_path: Path) -> None:
    frames = clip()
    with pytest.raises(RequestError, match="even sizes"):
        write(tmp_path / "out.mp4", frames[:, :31])
    with pytest.raises(RequestError, match="0 per second"):
        write(tmp_path / "out.mp4", frames, fps=0)
    with pytest.raises(RequestError, match="expected uint8"):
        write(tmp_path / "out.mp4", frames.astype(np.float32))
    with pytest.raises(RequestError, match="no metadata"):
        read_metadata(tmp_path / "none.mp4")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "letter.txt").touch()
    for name, message in (("folder.mp4", "is a folder"), ("taken", "not a folder of frames"), ("a.avi", ".webm")):
        with pytest.raises(RequestError, match=message):
            check_output(tmp_path / name)
    assert len(FORMATS) == 5


def test_contact_sheet(tmp_path: Path) -> None:
    frames = clip(5)
    sheet = contact_sheet(frames, 3)
    assert sheet.shape == (2 * 32 + 2, 3 * 48 + 4, 3)
    assert np.array_equal(sheet[34:, 50:98], frames[4])
    (tmp_path / "sheet.png").write_bytes(encode_png(sheet))
    assert np.array_equal(read(tmp_path / "sheet.png")[0], sheet)
