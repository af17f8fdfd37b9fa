"""ONNX graphs whose files are links, as in the cache of huggingface_hub, where a snapshot's files lead into `blobs`.

ONNX Runtime resolves a graph's path and takes the weights beside it only, under the name that the graph has for them.
In the cache they lie elsewhere, under hashes. So a graph is given to it as bytes that name the weights as they are
really called, and their folder beside: they are mapped from their file as those of any other bundle. Handed over in
memory, or as initializers, they would be copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from t2v_rt.errors import EngineError

FOLDER_OPTION = "session.model_external_initializers_file_folder_path"  # of ONNX Runtime, for graphs given as bytes
# fields on the way to the weights' file: ModelProto.graph, GraphProto.initializer, TensorProto.external_data
WAY = (7, 5, 13)
LOCATION = b"\x0a\x08location\x12"  # begins a StringStringEntryProto whose key that is; its value follows
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types of protobuf


def real_graph(path: Path) -> tuple[bytes, Path] | None:
    """A graph that names its weights where they really are.

    Args:
        path: of the graph.

    Returns:
        The graph, and the folder of its weights; None where the files beside it are no links, or it has no weights.

    Raises:
        EngineError: it is no ONNX graph, or its weights lie in several folders.
    """
    if not any(file.is_symlink() for file in path.parent.iterdir()):
        return None
    folders: set[Path] = set()

    def rename(entry: bytes) -> bytes:
        if not entry.startswith(LOCATION):
            return entry
        _, start = _varint(entry, len(LOCATION))
        real = (path.parent / entry[start:].decode()).resolve()
        folders.add(real.parent)
        return LOCATION + _sized(real.name.encode())

    try:
        graph = _changed(path.read_bytes(), WAY, rename)
    except (IndexError, ValueError) as exc:
        raise EngineError(f"{path} is no ONNX graph ({exc}); build the bundle again") from exc
    if len(folders) > 1:
        raise EngineError(f"{path}: its weights are links into {len(folders)} folders; expected one: copy the bundle")
    return (graph, folders.pop()) if folders else None


def _changed(message: bytes, way: tuple[int, ...], change: Callable[[bytes], bytes]) -> bytes:
    """A protobuf message with `change` applied to each part at the end of a way of fields."""
    pieces = []
    for number, start, content, end in _fields(message):
        if number != way[0] or content is None:
            pieces.append(message[start:end])
            continue
        part = message[content:end]
        part = change(part) if len(way) == 1 else _changed(part, way[1:], change)
        pieces.append(_as_varint(number << 3 | BYTES) + _sized(part))
    return b"".join(pieces)


def _fields(message: bytes) -> Iterator[tuple[int, int, int | None, int]]:
    """Number, start, start of the content where it has a length, and end of each field."""
    at = 0
    while at < len(message):
        start, content = at, None
        key, at = _varint(message, at)
        kind = key & 7
        if kind == BYTES:
            size, at = _varint(message, at)
            content, at = at, at + size
        elif kind == VARINT:
            _, at = _varint(message, at)
        elif kind in (FIXED32, FIXED64):
            at += 4 if kind == FIXED32 else 8
        else:
            raise ValueError(f"wire type {kind}")
        if at > len(message):
            raise ValueError("it ends inside a field")
        yield key >> 3, start, content, at


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, and where it ends."""
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _as_varint(value: int) -> bytes:
    result = bytearray()
    while value > 0x7F:
        result.append(value & 0x7F | 0x80)
        value >>= 7
    result.append(value)
    return bytes(result)


def _sized(content: bytes) -> bytes:
    return _as_varint(len(content)) + content
