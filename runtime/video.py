"""Video files, written frame by frame: mp4, webm, gif, a folder of png, npy; the same frames give the same bytes."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from t2v_rt.engines import platform
from t2v_rt.errors import RequestError

if TYPE_CHECKING:
    from av.container import OutputContainer
    from av.filter import Graph
    from av.video.stream import VideoStream

Frame = NDArray[np.uint8]
FORMATS = (".mp4", ".webm", ".gif", ".png", ".npy")
FOLDER = ".png"  # also what a path without a suffix means
SIDECAR = (".gif", ".png", ".npy")  # formats that carry no metadata
# One encoder thread: with more, the bytes would depend on the machine's cores.
CODECS: Mapping[str, tuple[str, str, dict[str, str]]] = {
    ".mp4": ("libx264", "yuv420p", {"crf": "16", "preset": "slow", "threads": "1"}),
    ".webm": ("libvpx-vp9", "yuv420p", {"crf": "24", "b": "0", "row-mt": "0", "threads": "1", "cpu-used": "2"}),
    ".gif": ("gif", "pal8", {}),
}
CONTAINERS: Mapping[str, dict[str, str]] = {
    ".mp4": {"movflags": "+faststart+use_metadata_tags", "fflags": "+bitexact"},
    ".webm": {"fflags": "+bitexact"},
    ".gif": {"fflags": "+bitexact"},
}
SHEET_GAP = 2  # pixels between the tiles of a contact sheet


def check_output(path: str | Path) -> Path:
    """Checks, before any work, that a video can be written to a path.

    Args:
        path: a file of a known extension, or a folder (no extension, or .png) for single images.

    Returns:
        The path.

    Raises:
        RequestError: unknown extension (the known are listed), a missing or unwritable folder, a folder in the place of
            a file or the other way round.
    """
    target = Path(path)
    suffix = target.suffix.lower() or FOLDER
    if suffix not in FORMATS:
        raise RequestError(
            f"{target}: unknown video format {target.suffix!r}; expected one of {', '.join(FORMATS)}, "
            "or a name without extension for a folder of png"
        )
    platform.check_writable_parent(target)
    if suffix == FOLDER:
        if target.is_file() or (target.is_dir() and any(not _is_frame(item) for item in target.iterdir())):
            raise RequestError(f"{target} exists and is not a folder of frames; choose another name")
    elif target.is_dir():
        raise RequestError(f"{target} is a folder; expected the name of a {suffix} file")
    return target


def _is_frame(path: Path) -> bool:
    return path.suffix == ".png" and path.stem.startswith("frame_")


def open_writer(
    path: str | Path, *, fps: float, width: int, height: int, num_frames: int, metadata: Mapping[str, Any]
) -> VideoWriter:
    """Opens a video for writing; use it in a `with` block.

    The file appears, complete, when the block ends well; after an error nothing is left, and an older file of that name
    stays as it was.

    Args:
        path: as `check_output` takes it.
        fps: frames per second.
        width: in pixels, even for mp4 and webm.
        height: likewise.
        num_frames: that will be written.
        metadata: plain JSON values that are kept with the video (`read_metadata`).

    Raises:
        RequestError: the path, the size or the rate is not possible.
    """
    target = check_output(path)
    suffix = target.suffix.lower() or FOLDER
    if not 0 < fps <= 1000 or num_frames < 1:
        raise RequestError(f"a video of {num_frames} frames at {fps} per second; expected both above 0")
    if suffix in (".mp4", ".webm") and (width % 2 or height % 2):
        raise RequestError(f"{suffix} needs even sizes, not {width}x{height}; choose another format or size")
    kinds: dict[str, type[VideoWriter]] = {FOLDER: FolderWriter, ".npy": ArrayWriter}
    return kinds.get(suffix, ContainerWriter)(target, suffix, fps, width, height, num_frames, metadata)


def metadata_path(path: Path) -> Path:
    """The JSON file beside a video whose format carries no metadata."""
    return path.with_name(path.name + ".json")


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Reads back what `open_writer` was given as metadata.

    Raises:
        RequestError: the file is missing or carries none.
    """
    target = Path(path)
    try:
        if (target.suffix.lower() or FOLDER) in SIDECAR:
            text = metadata_path(target).read_text(encoding="utf-8")
        else:
            import av

            with av.open(str(target)) as container:
                tags = {key.lower(): value for key, value in container.metadata.items()}
                text = tags.get("comment", "")
        content = json.loads(text)
    except (OSError, ValueError) as exc:
        raise RequestError(f"{target}: no metadata of t2v-rt can be read ({exc})") from exc
    return dict(content)


def canonical_json(metadata: Mapping[str, Any]) -> str:
    """One spelling for equal contents."""
    return json.dumps(metadata, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


class VideoWriter(ABC):
    """A video being written; made by `open_writer`."""

    def __init__(
        self,
        target: Path,
        suffix: str,
        fps: float,
        width: int,
        height: int,
        num_frames: int,
        metadata: Mapping[str, Any],
    ) -> None:
        self.target = target
        self.suffix = suffix
        self.fps = Fraction(fps).limit_denominator(1001)
        self.shape = (height, width, 3)
        self.num_frames = num_frames
        self.written = 0
        self._metadata = canonical_json(metadata)
        self._temporary = platform.temporary_sibling(target)

    def write(self, frame: Frame) -> None:
        """Adds a frame.

        Args:
            frame: uint8 (H, W, 3), RGB.

        Raises:
            RequestError: wrong shape or dtype, or more frames than promised.
        """
        if frame.shape != self.shape or frame.dtype != np.uint8:
            raise RequestError(
                f"{self.target}: frame is {frame.dtype} {list(frame.shape)}; expected uint8 {list(self.shape)}"
            )
        if self.written == self.num_frames:
            raise RequestError(f"{self.target}: more than the {self.num_frames} frames that were promised")
        self._add(np.ascontiguousarray(frame))
        self.written += 1

    def __enter__(self) -> Self:
        self._open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._close(complete=error is None)
            if error is None:
                if self.written != self.num_frames:
                    raise RequestError(f"{self.target}: {self.written} of {self.num_frames} frames were written")
                self._publish()
        finally:
            platform.remove_tree(self._temporary)

    def _publish(self) -> None:
        if self.suffix in SIDECAR:
            beside = metadata_path(self.target)
            temporary = platform.temporary_sibling(beside)
            try:
                temporary.write_text(self._metadata + "\n", encoding="utf-8", newline="\n")
                platform.replace_file(temporary, beside)
            finally:
                platform.remove_tree(temporary)
        if self._temporary.is_dir():
            platform.replace_directory(self._temporary, self.target)
        else:
            platform.replace_file(self._temporary, self.target)

    @abstractmethod
    def _open(self) -> None: ...

    @abstractmethod
    def _add(self, frame: Frame) -> None: ...

    @abstractmethod
    def _close(self, *, complete: bool) -> None: ...


class ContainerWriter(VideoWriter):
    """mp4, webm and gif, through PyAV."""

    _container: OutputContainer | None = None
    _stream: VideoStream | None = None
    _palette: Graph | None = None

    def _open(self) -> None:
        import av

        codec, pixels, options = CODECS[self.suffix]
        self._container = av.open(str(self._temporary), "w", format=self.suffix[1:], options=CONTAINERS[self.suffix])
        if self.suffix not in SIDECAR:
            self._container.metadata["comment"] = self._metadata
        stream: VideoStream = self._container.add_stream(codec, rate=self.fps, options=options)  # type: ignore[assignment]
        stream.height, stream.width = self.shape[:2]
        stream.pix_fmt = pixels
        stream.codec_context.flags |= av.codec.context.Flags.bitexact
        self._stream = stream
        self._palette = _palette_graph(stream.width, stream.height, 1 / self.fps) if pixels == "pal8" else None

    def _add(self, frame: Frame) -> None:
        import av

        assert self._container is not None
        assert self._stream is not None
        picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
        picture.pts, picture.time_base = self.written, 1 / self.fps
        if self._palette is not None:
            self._palette.push(picture)
            picture = self._palette.vpull()
        self._container.mux(self._stream.encode(picture))

    def _close(self, *, complete: bool) -> None:
        container, self._container = self._container, None
        if container is None:
            return
        try:
            if complete and self._stream is not None:
                container.mux(self._stream.encode(None))
        finally:
            container.close()


def _palette_graph(width: int, height: int, time_base: Fraction) -> Graph:
    """Filters that give each frame the 256 colours that suit it best; only one frame is held."""
    import av

    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=width, height=height, format=av.VideoFormat("rgb24", width, height), time_base=time_base
    )
    split, generate = graph.add("split"), graph.add("palettegen", "stats_mode=single")
    use, sink = graph.add("paletteuse", "new=1:dither=bayer:bayer_scale=5"), graph.add("buffersink")
    source.link_to(split)
    split.link_to(use, 0, 0)
    split.link_to(generate, 1, 0)
    generate.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    return graph


class FolderWriter(VideoWriter):
    """A folder of frame_00000.png and so on."""

    def _open(self) -> None:
        self._temporary.mkdir()

    def _add(self, frame: Frame) -> None:
        (self._temporary / f"frame_{self.written:05d}.png").write_bytes(encode_png(frame))

    def _close(self, *, complete: bool) -> None:
        pass


class ArrayWriter(VideoWriter):
    """One uint8 array (F, H, W, 3) in NumPy's format."""

    def _open(self) -> None:
        self._stream = self._temporary.open("wb")
        header = {"descr": "|u1", "fortran_order": False, "shape": (self.num_frames, *self.shape)}
        np.lib.format.write_array_header_1_0(self._stream, header)

    def _add(self, frame: Frame) -> None:
        self._stream.write(frame.tobytes())

    def _close(self, *, complete: bool) -> None:
        self._stream.close()


def encode_png(image: Frame) -> bytes:
    """An image uint8 (H, W, 3) as the bytes of a png file."""
    import av

    context = av.CodecContext.create("png", "w")
    context.width, context.height, context.pix_fmt = image.shape[1], image.shape[0], "rgb24"
    context.time_base = Fraction(1, 1)
    packets = context.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24"))
    return b"".join(bytes(packet) for packet in [*packets, *context.encode(None)])


def contact_sheet(frames: Frame, columns: int) -> Frame:
    """Frames side by side in rows, white between them.

    Args:
        frames: uint8 (F, H, W, 3).
        columns: frames per row.

    Returns:
        uint8 (h, w, 3).
    """
    count, height, width, _ = frames.shape
    rows = -(-count // columns)
    step_y, step_x = height + SHEET_GAP, width + SHEET_GAP
    sheet = np.full((rows * step_y - SHEET_GAP, columns * step_x - SHEET_GAP, 3), 255, np.uint8)
    for i, frame in enumerate(frames):
        y, x = i // columns * step_y, i % columns * step_x
        sheet[y : y + height, x : x + width] = frame
    return sheet
