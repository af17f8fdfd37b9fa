"""Video files: what is written is what was given, whole or not at all, and the same bytes twice."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from t2v_rt.errors import RequestError, T2VError
from t2v_rt.runtime.video import (
    FORMATS,
    check_output,
    contact_sheet,
    encode_png,
    open_writer,
    read_metadata,
    write_png,
)

NAMES = ("out.mp4", "out.webm", "out.gif", "frames", "frames.png", "out.npy")
LOSSY_TOLERANCE = 12.0  # mean absolute difference in levels that compression and 4:2:0 colour may cost
COLOUR_TOLERANCE = 2.0  # levels that a plain colour may shift by: 8-bit limited range, and quantization at crf 17 to 24
GROWTH_TOLERANCE = 60  # frames' worth of memory: half of those written while it is watched
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
        frames: np.ndarray = np.load(path)
        return frames
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


def test_metadata_is_kept_to_the_letter(tmp_path: Path) -> None:
    metadata = {"z": [1, 2.5, None], "prompt": '红球 \U0001f534 "弹跳"\n<b>é</b>', "a": {"长": "x" * 20_000, "b": True}}
    for name in NAMES:
        assert read_metadata(write(tmp_path / name, clip(2), metadata=metadata)) == metadata
    with av.open(str(tmp_path / "out.mp4")) as mp4, av.open(str(tmp_path / "out.webm")) as webm:
        assert mp4.metadata["title"] == metadata["prompt"]
        tags = {key.lower(): value for key, value in webm.metadata.items()}
        assert tags["title"] == metadata["prompt"]
        assert tags["comment"] == json.dumps(metadata, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    assert (tmp_path / "frames.json").is_file()
    assert (tmp_path / "out.gif.json").is_file()


def test_metadata_that_cannot_be_kept_or_read(tmp_path: Path) -> None:
    for metadata in ({"a": float("nan")}, {"a": Path("a")}, {"a": "\ud800"}):
        with pytest.raises(RequestError, match="metadata cannot be kept as JSON"):
            write(tmp_path / "out.mp4", clip(), metadata=metadata)
    (tmp_path / "a.npy.json").write_text("[1]")
    (tmp_path / "a.mp4").write_text("not a video")
    for name in ("a.npy", "a.mp4", "a.avi"):
        with pytest.raises(RequestError, match="no metadata of t2v-rt"):
            read_metadata(tmp_path / name)


WRITE_ALL = """
import os, sys
from pathlib import Path
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
sys.path.insert(0, sys.argv[1])
from test_video import NAMES, clip, write
for name in NAMES:
    write(Path(sys.argv[2]) / name, clip(40))
"""


def test_another_process_on_one_core_writes_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    for name in NAMES:
        write(tmp_path / "one" / name, clip(40))
    arguments = [sys.executable, "-c", WRITE_ALL, str(Path(__file__).parent), str(tmp_path / "two")]
    subprocess.run(arguments, check=True)
    ours, theirs = (
        {name: hashlib.sha256(data).hexdigest() for name, data in content(tmp_path / folder).items()}
        for folder in ("one", "two")
    )
    assert ours == theirs
    assert len(ours) == 2 * 40 + 4 + 4  # two folders of frames, four files, four metadata files


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads memory from /proc")
@pytest.mark.parametrize("name", ["out.mp4", "out.webm", "out.gif", "frames", "out.npy"])
def test_frames_are_not_held(tmp_path: Path, name: str) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    size, count, start = 256, 200, 80  # by then the encoders' look-ahead is full
    ramp = np.add.outer(np.arange(size), np.arange(size))
    before = 0
    with open_writer(tmp_path / name, fps=16, width=size, height=size, num_frames=count, metadata={}) as writer:
        for i in range(count):
            writer.write(np.stack([ramp + i, ramp, ramp - i], axis=-1).astype(np.uint8))
            before = resident() if i == start else before
        grown = resident() - before
    assert grown < GROWTH_TOLERANCE * size * size * 3


FILL_DISK = """
import resource, sys
from pathlib import Path
from t2v_rt.errors import T2VError
sys.path.insert(0, sys.argv[1])
from test_video import NAMES, write
import numpy as np
noise = np.random.default_rng(0).integers(0, 255, (4, 64, 64, 3), dtype=np.uint8)
resource.setrlimit(resource.RLIMIT_FSIZE, (8_000, 8_000))
for name in NAMES:
    try:
        write(Path(sys.argv[2]) / name, noise)
    except T2VError as exc:
        assert "cannot be written" in str(exc) and exc.exit_code == 1, exc
    else:
        raise SystemExit(f"{name} was written")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="a limit on file size stands for a full disk")
def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", FILL_DISK, str(Path(__file__).parent), str(tmp_path)]
    subprocess.run(arguments, check=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_an_old_file_stays_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / name, clip())
    before = content(tmp_path)

    def refuse(*_: Any) -> None:
        raise PermissionError("in use")

    monkeypatch.setattr("t2v_rt.runtime.video.writers.replace_file", refuse)
    monkeypatch.setattr("t2v_rt.runtime.video.writers.replace_together", refuse)
    with pytest.raises(T2VError, match="in use"):
        write(tmp_path / name, clip(5))
    with pytest.raises(RequestError, match="5 of 6"):
        write(tmp_path / name, clip(5), num_frames=6)
    assert content(tmp_path) == before


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read(write(Path("OUT.MP4"), clip(2))).shape == clip(2).shape
    if sys.platform != "win32":
        path = write(Path("12:30 视频.mp4"), clip(2))  # FFmpeg takes "12:" for a protocol unless told otherwise
        assert read_metadata(path) == METADATA
    write(Path("n" * 240 + ".npy"), clip(2))
    with open_writer("v1.2/", fps=8, width=48, height=32, num_frames=1, metadata=METADATA) as writer:
        writer.write(clip(1)[0])
    assert [path.name for path in Path("v1.2").iterdir()] == ["frame_00000.png"]
    assert read_metadata("v1.2/") == read_metadata(Path("v1.2")) == METADATA
    for name in ("", ".", "..", "n" * 300 + ".mp4", "a\0.mp4", "none/a.mp4", "OUT.MP4/a.mp4"):
        with pytest.raises(RequestError):
            check_output(name)
    Path("b.npy.json").mkdir()
    with pytest.raises(RequestError, match="metadata is to be written there"):
        check_output("b.npy")
    assert not list(tmp_path.glob(".*"))


def test_more_that_is_refused(tmp_path: Path) -> None:
    for changes, message in (
        ({"fps": float("nan")}, "nan per second"),
        ({"num_frames": 0}, "1 or more"),
        ({"width": 70_000}, "choose another size"),
        ({"width": 50}, r"expected uint8 \[32, 50, 3\]"),
    ):
        with pytest.raises(RequestError, match=message):
            write(tmp_path / "out.webm", clip(), **changes)
    with pytest.raises(RequestError, match="at most 50 frames per second"):
        write(tmp_path / "out.gif", clip(), fps=60)
    writer = open_writer(tmp_path / "out.mp4", fps=8, width=48, height=32, num_frames=9, metadata={})
    with pytest.raises(T2VError, match="not open"):
        writer.write(clip()[0])
    with pytest.raises(RequestError, match="frame is list"):
        writer.write(clip()[0].tolist())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["out.mp4", "out.webm", "out.gif"])
def test_colours_and_times(tmp_path: Path, name: str) -> None:
    colours = np.array([(220, 30, 35), (35, 65, 220), (10, 10, 10), (245, 245, 240), (90, 160, 60)], np.uint8)
    frames = np.broadcast_to(colours[:, None, None], (5, 64, 64, 3))
    path = write(tmp_path / name, frames, fps=10)
    assert np.abs(read(path).astype(float) - frames).max() <= (0 if name == "out.gif" else COLOUR_TOLERANCE)
    with av.open(str(path)) as container:
        assert container.duration == 500_000  # microseconds
        times = [frame.time for frame in container.decode(video=0)]
        context = container.streams.video[0].codec_context
        if name != "out.gif":
            assert (context.colorspace, context.color_primaries, context.color_trc, context.color_range) == (1, 1, 1, 1)
    assert times == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_mp4_lasts_as_long_as_its_frames(tmp_path: Path) -> None:
    for count, fps in ((17, 16.0), (1, 16.0), (7, 30000 / 1001)):
        with av.open(str(write(tmp_path / "out.mp4", clip(count), fps=fps))) as container:
            stream = container.streams.video[0]
            assert stream.duration is not None
            assert stream.time_base is not None
            assert float(stream.duration * stream.time_base) == pytest.approx(count / fps, abs=1e-4)


def test_npy_is_what_numpy_writes(tmp_path: Path) -> None:
    np.save(tmp_path / "numpy.npy", clip())
    assert write(tmp_path / "ours.npy", clip()).read_bytes() == (tmp_path / "numpy.npy").read_bytes()


def test_images(tmp_path: Path) -> None:
    image = clip(1)[0][:31, ::2]  # odd sizes and a strided array
    write_png(tmp_path / "a.png", image)
    assert np.array_equal(read(tmp_path / "a.png")[0], image)
    assert (tmp_path / "a.png").read_bytes() == encode_png(image)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert contact_sheet(clip(2), 6).shape == (32, 2 * 48 + 2, 3)
    assert (contact_sheet(clip(2), 2)[:, 48:50] == 255).all()
    for refused in (lambda: write_png(tmp_path / "b.png", image[0]), lambda: contact_sheet(image, 2)):
        with pytest.raises(RequestError, match="expected uint8"):
            refused()
    with pytest.raises(RequestError, match="columns is 0"):
        contact_sheet(clip(2), 0)
    with pytest.raises(RequestError, match="does not exist"):
        write_png(tmp_path / "none" / "b.png", image)
    (tmp_path / "c.png").mkdir()
    with pytest.raises(RequestError, match="is a folder"):
        write_png(tmp_path / "c.png", image)


def test_importing_does_not_load_av() -> None:
    code = "import sys, t2v_rt.runtime.video; sys.exit('av' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
