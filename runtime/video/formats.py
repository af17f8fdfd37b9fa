"""The formats of a video file: names, encoder settings, colour conversion, metadata as text."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from t2v_rt.errors import RequestError

if TYPE_CHECKING:  # importing av takes about as long as NumPy: only functions that need it do
    from av.filter import Graph

FORMATS = (".mp4", ".webm", ".gif", ".png", ".npy")
FOLDER = ".png"  # also what a path without a suffix, or with a trailing separator, means
SIDECAR = (".gif", ".png", ".npy")  # formats that carry no metadata


@dataclass(frozen=True)
class Codec:
    """How FFmpeg writes one format.

    Args:
        name: of the encoder.
        pixels: its pixel format; yuv420p is the one that every browser plays.
        options: of the encoder. One thread: with more, the bytes would depend on the machine's cores.
        muxer: options of the container; bitexact leaves out time stamps and version strings.
    """

    name: str
    pixels: str
    options: Mapping[str, str]
    muxer: Mapping[str, str]


CODECS: Mapping[str, Codec] = {
    ".mp4": Codec(
        "libx264",
        "yuv420p",
        # cpu-independent: x264 otherwise chooses between algorithms by the processor's instructions
        {"crf": "17", "preset": "slow", "threads": "1", "x264-params": "cpu-independent=1"},
        {"movflags": "+faststart", "fflags": "+bitexact"},
    ),
    ".webm": Codec(
        "libvpx-vp9",
        "yuv420p",
        {"crf": "24", "b": "0", "row-mt": "0", "threads": "1", "cpu-used": "2"},
        {"fflags": "+bitexact"},
    ),
    ".gif": Codec("gif", "pal8", {}, {"fflags": "+bitexact"}),
}
BT709 = 1  # in FFmpeg's tables of matrices, primaries and transfer curves alike
LIMITED_RANGE = 1
TO_YUV = "out_color_matrix=bt709:out_range=tv:flags=bicubic+accurate_rnd+full_chroma_int+bitexact:threads=1"
PALETTE = "stats_mode=single:threads=1"  # colours of each frame alone: one over all frames would need to hold them all
USE_PALETTE = "new=1:dither=none:threads=1"  # dithering speckles flat colours, and made files larger and no closer


def format_of(path: str | Path) -> str:
    """The suffix of `FORMATS` that a path asks for, or the unknown one that it has."""
    text = os.fspath(path)
    if text[-1:] in (os.sep, os.altsep):
        return FOLDER
    return Path(text).suffix.lower() or FOLDER


def metadata_path(path: Path) -> Path:
    """The JSON file beside a video whose format carries no metadata; of a link, beside what it points to."""
    real = Path(os.path.realpath(path))
    return Path(os.path.realpath(real.with_name(real.name + ".json")))


def canonical_json(metadata: Mapping[str, object]) -> str:
    """One spelling for equal contents.

    Args:
        metadata: plain JSON values.

    Returns:
        JSON in one line, keys sorted, no spaces, text as it is.

    Raises:
        RequestError: a value is not plain JSON (NaN and infinities are not).
    """
    try:
        text = json.dumps(dict(metadata), sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        text.encode()
    except (TypeError, ValueError) as exc:
        raise RequestError(f"metadata cannot be kept as JSON ({exc}); give plain JSON values only") from exc
    return text


def file_url(path: Path) -> str:
    """A path as FFmpeg takes it: what stands before a colon is a protocol, unless it is told that this is a file."""
    return f"file:{path}"


def make_filters(codec: Codec, width: int, height: int, time_base: Fraction) -> Graph:
    """Filters from RGB to what an encoder takes; one frame in, one frame out, none held.

    Args:
        codec: whose pixel format is wanted.
        width: in pixels.
        height: in pixels.
        time_base: seconds per frame.

    Returns:
        The filters, ready to be pushed to.
    """
    import av

    graph = av.filter.Graph()
    pixels = av.VideoFormat("rgb24", width, height)
    source = graph.add_buffer(width=width, height=height, format=pixels, time_base=time_base)
    sink = graph.add("buffersink")
    if codec.pixels == "pal8":
        split = graph.add("split")
        generate, use = graph.add("palettegen", PALETTE), graph.add("paletteuse", USE_PALETTE)
        source.link_to(split)
        split.link_to(use, 0, 0)
        split.link_to(generate, 1, 0)
        generate.link_to(use, 0, 1)
        use.link_to(sink)
    else:
        graph.link_nodes(source, graph.add("scale", TO_YUV), graph.add("format", codec.pixels), sink)
    graph.configure()
    return graph
