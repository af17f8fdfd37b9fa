"""Writers of video files: frame by frame into a temporary name, which becomes the final one at the end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from fractions import Fraction
from io import BufferedWriter
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np

from t2v_rt.errors import RequestError, T2VError
from t2v_rt.runtime.video.formats import (
    BT709,
    CODECS,
    LIMITED_RANGE,
    SIDECAR,
    canonical_json,
    file_url,
    make_filters,
    metadata_path,
)
from t2v_rt.runtime.video.images import Frame, check_image, encode_png
from t2v_rt.system.files import remove_abandoned, remove_tree, replace_file, replace_together
from t2v_rt.system.temporaries import temporary_sibling

if TYPE_CHECKING:
    from av.container import OutputContainer
    from av.filter import Graph
    from av.video.stream import VideoStream

FPS_DENOMINATOR = 1001  # the largest that a rate can have: 30000/1001 and its like


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
        metadata: Mapping[str, object],
    ) -> None:
        self.target = target
        self.suffix = suffix
        self.fps = Fraction(float(fps)).limit_denominator(FPS_DENOMINATOR)
        self.shape = (height, width, 3)
        self.num_frames = num_frames
        self.written = 0
        self._is_open = False
        self._metadata = canonical_json(metadata)
        self._title = metadata.get("prompt")
        self._temporary = temporary_sibling(target)

    def write(self, frame: Frame) -> None:
        """Adds a frame.

        Args:
            frame: uint8 (H, W, 3), RGB; it is not kept.

        Raises:
            RequestError: wrong shape or dtype, or more frames than promised.
            T2VError: the disk or the encoder failed.
        """
        check_image(f"{self.target}: frame", frame, self.shape)
        if self.written == self.num_frames:
            raise RequestError(f"{self.target}: more than the {self.num_frames} frames that were promised")
        if not self._is_open:
            raise T2VError(f"{self.target}: the writer is not open; use it in a `with` block")
        with self._wrapped(T2VError, "free some disk space or choose another place"):
            self._add(np.ascontiguousarray(frame))
        self.written += 1

    def __enter__(self) -> Self:
        remove_abandoned(self.target)
        try:
            with self._wrapped(RequestError, "choose another size or format"):
                self._open()
        except BaseException as exc:
            self.__exit__(type(exc), exc, exc.__traceback__)
            raise
        self._is_open = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_open = False
        complete = error is None and self.written == self.num_frames
        try:
            # after an error, or with frames missing, all is thrown away: what closing has to say does not matter
            with self._wrapped(T2VError, "free some disk space") if complete else suppress(Exception):
                self._close(complete=complete)
            if complete:
                with self._wrapped(T2VError, "close programs that use it, or choose another place"):
                    self._publish()
        finally:
            remove_tree(self._temporary)
        if error is None and not complete:
            raise RequestError(f"{self.target}: {self.written} of {self.num_frames} frames were written; nothing kept")

    @contextmanager
    def _wrapped(self, kind: type[T2VError], advice: str) -> Iterator[None]:
        try:
            yield
        except Exception as exc:  # PyAV's errors have no other base than this one, and naming them would import it
            height, width, _ = self.shape
            raise kind(f"{self.target}: a {width}x{height} {self.suffix} cannot be written ({exc}); {advice}") from exc

    def _publish(self) -> None:
        if self.suffix not in SIDECAR:
            replace_file(self._temporary, self.target)
            return
        beside = metadata_path(self.target)
        remove_abandoned(beside)
        temporary = temporary_sibling(beside)
        try:
            temporary.write_text(self._metadata + "\n", encoding="utf-8", newline="\n")
            replace_together([(self._temporary, self.target), (temporary, beside)])
        finally:
            remove_tree(temporary)

    @abstractmethod
    def _open(self) -> None: ...

    @abstractmethod
    def _add(self, frame: Frame) -> None: ...

    @abstractmethod
    def _close(self, *, complete: bool) -> None: ...


class ContainerWriter(VideoWriter):
    """mp4, webm and gif, through PyAV."""

    _container: OutputContainer | None = None
    _stream: VideoStream
    _filters: Graph

    def _open(self) -> None:
        import av

        codec = CODECS[self.suffix]
        muxer = dict(codec.muxer)
        if self.suffix == ".mp4":  # its clock would else count milliseconds and cut the last frame short
            muxer["movie_timescale"] = str(self.fps.numerator * 100)
        container = av.open(file_url(self._temporary), "w", format=self.suffix[1:], options=muxer)
        self._container = container
        if self.suffix not in SIDECAR:
            container.metadata["comment"] = self._metadata
            if isinstance(self._title, str):
                container.metadata["title"] = self._title
        self._stream = container.add_stream(codec.name, rate=self.fps, options=dict(codec.options))  # type: ignore[assignment]
        self._stream.height, self._stream.width = self.shape[:2]
        self._stream.pix_fmt = codec.pixels
        context = self._stream.codec_context
        context.flags |= av.codec.context.Flags.bitexact
        if codec.pixels == "yuv420p":
            context.colorspace = context.color_primaries = context.color_trc = BT709
            context.color_range = LIMITED_RANGE
        self._filters = make_filters(codec, self._stream.width, self._stream.height, 1 / self.fps)
        container.start_encoding()

    def _add(self, frame: Frame) -> None:
        import av

        assert self._container is not None  # `write` checks
        picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
        picture.pts, picture.time_base = self.written, 1 / self.fps
        self._filters.push(picture)
        self._container.mux(self._stream.encode(self._filters.vpull()))

    def _close(self, *, complete: bool) -> None:
        container, self._container = self._container, None
        if container is None:
            return
        try:
            if complete:
                container.mux(self._stream.encode(None))
        finally:
            container.close()


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

    _stream: BufferedWriter | None = None

    def _open(self) -> None:
        self._stream = self._temporary.open("wb")
        header = {"descr": "|u1", "fortran_order": False, "shape": (self.num_frames, *self.shape)}
        np.lib.format.write_array_header_1_0(self._stream, header)

    def _add(self, frame: Frame) -> None:
        assert self._stream is not None  # `write` checks
        self._stream.write(frame.tobytes())

    def _close(self, *, complete: bool) -> None:
        if self._stream is not None:
            self._stream.close()
