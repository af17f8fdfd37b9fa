"""Checkpoint tensors in, graph weights out: one tensor in memory at a time, whatever the model's size."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from t2v_rt.errors import CheckpointError
from t2v_rt.export.quantize import Quantization

HEADER_LIMIT = 100_000_000  # the format's own limit on the JSON header, in bytes
ALIGNMENT = 4096  # tensors start on page boundaries, so that a backend can map them from the file
STORED_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "uint8": 1}
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
COPIED_DTYPES = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # of a table copied as it is
CHUNK = 1 << 24  # bytes of a copy at a time
Transform = Callable[[NDArray[np.float32]], NDArray[np.float32]]
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor of a safetensors file lies."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


class CheckpointWeights:
    """The tensors of one network.

    Args:
        place: folder or file that they are in, for errors.
        files: that hold them.
        tensors: name -> place.
    """

    def __init__(self, place: Path, files: Sequence[Path], tensors: Mapping[str, StoredTensor]) -> None:
        self.place, self.files, self.tensors = place, files, tensors

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Opens a component folder, such as `checkpoint/vae`: a single safetensors file, or shards with an index.

        Raises:
            CheckpointError: no safetensors weights, pickled weights only, a truncated or damaged file, a missing shard,
                or an index that names a tensor no shard has.
        """
        files, index = _weight_files(folder)
        tensors = {name: tensor for file in files for name, tensor in read_header(file).items()}
        missing = sorted(set(index) - set(tensors))
        if missing:
            raise CheckpointError(
                f"{folder}: the index names {len(missing)} tensors that no shard holds, the first {missing[0]!r}; "
                "download the shards again"
            )
        return cls(folder, files, tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor; raises CheckpointError where the checkpoint has none of that name."""
        return self._find(name).shape

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def read(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Reads one tensor as float32.

        Args:
            name: tensor name in the checkpoint.
            shape: the shape the component's config implies.

        Returns:
            A new float32 array of `shape`.

        Raises:
            CheckpointError: the tensor is missing, has another shape, or is not a floating-point tensor.
        """
        stored = self.check(name, shape)
        raw = np.fromfile(stored.file, np.uint8, prod(shape) * ITEM_BYTES[stored.dtype], offset=stored.offset)
        return _to_float32(raw, stored.dtype).reshape(shape)

    def copy(self, name: str, shape: tuple[int, ...], path: Path) -> str:
        """Copies one tensor's values into a raw file of their own, piece by piece.

        Args:
            name: as for `read`.
            shape: as for `read`.
            path: the file to create.

        Returns:
            The dtype written, the checkpoint's own but for float64: `float32`, `float16` or `bfloat16`.

        Raises:
            CheckpointError: as for `read`.
        """
        stored = self.check(name, shape)
        left = prod(shape) * ITEM_BYTES[stored.dtype]
        with stored.file.open("rb") as source, path.open("wb") as target:
            source.seek(stored.offset)
            while left:
                piece = source.read(min(left, CHUNK))
                if not piece:
                    raise CheckpointError(f"{stored.file}: ends inside tensor {name!r}; download it again")
                left -= len(piece)
                target.write(
                    _to_float32(np.frombuffer(piece, np.uint8), "F64").data if stored.dtype == "F64" else piece
                )
        return COPIED_DTYPES[stored.dtype]

    def copied_bytes(self, name: str) -> int:
        """Bytes of the file that `copy` writes; raises CheckpointError where the checkpoint has no such tensor."""
        stored = self._find(name)
        return prod(stored.shape) * STORED_BYTES[COPIED_DTYPES.get(stored.dtype, "float32")]

    def check(self, name: str, shape: tuple[int, ...]) -> StoredTensor:
        """Where a tensor lies; raises CheckpointError as `read` does."""
        stored = self._find(name)
        if stored.shape != shape:
            raise CheckpointError(
                f"{stored.file}: tensor {name!r} has shape {list(stored.shape)}, "
                f"config.json implies {list(shape)}; weights and config do not belong together"
            )
        if stored.dtype not in ITEM_BYTES:
            raise CheckpointError(
                f"{stored.file}: tensor {name!r} has dtype {stored.dtype}; expected one of {', '.join(ITEM_BYTES)}"
            )
        return stored

    def _find(self, name: str) -> StoredTensor:
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.place}: tensor {name!r} is missing; expected a complete checkpoint") from None


def _to_float32(raw: NDArray[np.uint8], dtype: str) -> NDArray[np.float32]:
    if dtype == "BF16":  # NumPy has no bfloat16: it is the upper half of a float32
        widened = raw.view("<u2").astype(np.uint32)
        widened <<= 16
        return widened.view(np.float32)
    source = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype]
    return raw.view(source).astype(np.float32, copy=False)


def to_bfloat16(array: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of float32 values rounded to bfloat16, to nearest even."""
    bits = array.view(np.uint32)
    upper = bits >> 16
    upper &= 1
    upper += 0x7FFF
    upper += bits
    upper >>= 16
    return upper.astype(np.uint16)


def _weight_files(folder: Path) -> tuple[list[Path], Mapping[str, str]]:
    """The safetensors files of a component and the index that ties shards together (empty for a single file)."""
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if indexes:
        try:
            index: dict[str, str] = json.loads(indexes[0].read_text(encoding="utf-8"))["weight_map"]
            shards = [folder / name for name in sorted(set(index.values()))]
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise CheckpointError(f"{indexes[0]}: not a readable index ({exc}); expected a 'weight_map'") from exc
        for shard in shards:
            if shard.parent != folder or not shard.is_file():
                raise CheckpointError(f"{shard}: shard named in {indexes[0].name} is missing; download it again")
        return shards, index
    files = sorted(folder.glob("*.safetensors"))
    if len(files) > 1:
        named = [file for file in files if file.name in ("model.safetensors", "diffusion_pytorch_model.safetensors")]
        files = named or files
    if len(files) == 1:
        return files, {}
    if files:
        raise CheckpointError(
            f"{folder}: {len(files)} safetensors files and no index; expected one file, or shards with an index"
        )
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
    if pickles:
        raise CheckpointError(
            f"{folder}: only pickled weights found ({pickles[0]}), which can run code when loaded; "
            "expected .safetensors: convert them, or download the safetensors variant"
        )
    raise CheckpointError(f"{folder}: no weights found; expected a .safetensors file")


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Reads and checks the header of a safetensors file (format: huggingface/safetensors, README).

    Args:
        file: path of the file.

    Returns:
        Tensor name -> place in the file.

    Raises:
        CheckpointError: the header is damaged, or the file is shorter than its header says.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or not 2 <= length <= min(HEADER_LIMIT, size - 8):
            raise CheckpointError(
                f"{file}: damaged or truncated: {size} bytes with a header of {length}; download it again"
            )
        try:
            header: dict[str, Any] = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            tensors = {name: _entry(file, 8 + length, fields) for name, fields in header.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise CheckpointError(f"{file}: damaged header ({exc}); download it again") from exc
    end = max((8 + length + int(fields["data_offsets"][1]) for fields in header.values()), default=0)
    if end != size:
        raise CheckpointError(f"{file}: truncated or damaged: {size} bytes, its header says {end}; download it again")
    return tensors


def _entry(file: Path, data_start: int, fields: Mapping[str, Any]) -> StoredTensor:
    start, end = (int(offset) for offset in fields["data_offsets"])
    shape = tuple(int(dim) for dim in fields["shape"])
    dtype = str(fields["dtype"])
    if start < 0 or end < start or min(shape, default=0) < 0:
        raise ValueError(f"impossible offsets {start}..{end} or shape {list(shape)}")
    if dtype in ITEM_BYTES and end - start != prod(shape) * ITEM_BYTES[dtype]:
        raise ValueError(f"{end - start} bytes for shape {list(shape)} of {dtype}")
    return StoredTensor(file, dtype, shape, data_start + start)


@dataclass(frozen=True)
class WeightPlace:
    """Where a written weight lies in its external data file."""

    offset: int
    length: int
    dtype: str
    shape: tuple[int, ...]


class WeightFile:
    """A raw external data file, shared by the graphs of a component; written front to back, each weight once.

    Args:
        path: the file to create, beside the graphs that name it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.places: dict[str, WeightPlace] = {}
        self._stream: BinaryIO = path.open("wb")

    @property
    def nbytes(self) -> int:
        """Bytes of all weights, padding not counted."""
        return sum(place.length for place in self.places.values())

    def add(
        self, name: str, source: CheckpointWeights, shape: tuple[int, ...], transform: Transform | None, dtype: str
    ) -> WeightPlace:
        """Appends a tensor of the checkpoint.

        Args:
            name: in the checkpoint, and of the weight.
            source: the checkpoint's tensors.
            shape: in the checkpoint, checked.
            transform: applied to the float32 tensor before it is stored.
            dtype: to store it in, as for `put`.

        Returns:
            Its place.
        """
        array = source.read(name, shape)
        return self.put(name, transform(array) if transform else array, dtype)

    def put(self, name: str, array: NDArray[np.float32], dtype: str) -> WeightPlace:
        """Appends a weight at the next page boundary, as `float32`, `float16` or `bfloat16`, and returns its place."""
        return self._append(name, _as_stored(array, dtype), dtype, array.shape)

    def add_quantized(
        self, name: str, source: CheckpointWeights, shape: tuple[int, int], scheme: Quantization, scale_dtype: str
    ) -> None:
        """Appends the parts of a quantized matrix of the checkpoint as `name.part`.

        Args:
            name: in the checkpoint.
            source: the checkpoint's tensors.
            shape: in the checkpoint (outputs, inputs), checked.
            scheme: of its parts.
            scale_dtype: of DequantizeLinear's scales, as for `put`.
        """
        outline = scheme.outline(shape[1], shape[0], scale_dtype)
        for part, values in scheme.split(source.read(name, shape)).items():
            dtype, stored_shape = outline[part]
            self._append(f"{name}.{part}", _as_stored(values, dtype), dtype, stored_shape)

    def _append(self, name: str, values: NDArray[Any], dtype: str, shape: tuple[int, ...]) -> WeightPlace:
        offset = -(-self._stream.tell() // ALIGNMENT) * ALIGNMENT
        self._stream.write(b"\0" * (offset - self._stream.tell()))
        self._stream.write(values.data)
        self.places[name] = WeightPlace(offset, values.nbytes, dtype, shape)
        return self.places[name]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()


def _as_stored(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Contiguous, floating-point values in the dtype; packed integers as they are."""
    array: NDArray[Any] = np.ascontiguousarray(values)
    if dtype == "bfloat16":
        return to_bfloat16(array)
    return array.astype(dtype, copy=False) if array.dtype == np.float32 else array


class WeightSizes(WeightFile):
    """Takes weights as a file does and keeps their sizes alone: nothing is read or written.

    Args:
        path: the file that graphs name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.places: dict[str, WeightPlace] = {}

    def add(
        self, name: str, source: CheckpointWeights, shape: tuple[int, ...], transform: Transform | None, dtype: str
    ) -> WeightPlace:
        """Notes a tensor of the checkpoint; raises as the file does for one that is missing or of another shape."""
        source.check(name, shape)
        self.places[name] = WeightPlace(0, prod(shape) * STORED_BYTES[dtype], dtype, shape)  # transposed or not
        return self.places[name]

    def add_quantized(
        self, name: str, source: CheckpointWeights, shape: tuple[int, int], scheme: Quantization, scale_dtype: str
    ) -> None:
        """Notes the parts of a matrix likewise."""
        source.check(name, shape)
        for part, (dtype, stored) in scheme.outline(shape[1], shape[0], scale_dtype).items():
            length = prod(stored) // 2 if dtype == "int4" else prod(stored) * STORED_BYTES[dtype]
            self.places[f"{name}.{part}"] = WeightPlace(0, length, dtype, stored)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return
