"""The tensors of a checkpoint's networks: found and checked by the headers of their files, read one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from t2v_rt.errors import CheckpointError
from t2v_rt.export.altering import refuse_altering
from t2v_rt.export.config import read_json
from t2v_rt.export.floats import check_finite, to_float32
from t2v_rt.export.found_instead import APPLE_DOUBLE, found_instead
from t2v_rt.export.tensor_file import ITEM_BYTES, StoredTensor, read_header
from t2v_rt.export.weight_names import PICKLES, choose_weights

STORED_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "uint8": 1}
COPIED_DTYPES = {"F64": "float32", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # of a table copied as it is
CHUNK = 1 << 24  # bytes of a copy at a time
Transform = Callable[[NDArray[np.float32]], NDArray[np.float32]]


class CheckpointWeights:
    """The tensors of one network.

    Args:
        place: folder or file that they are in, for errors.
        files: that hold them.
        tensors: name -> place.
    """

    def __init__(self, place: Path, files: Sequence[Path], tensors: Mapping[str, StoredTensor]) -> None:
        self.place, self.files, self.tensors = place, files, tensors
        self._asked: set[str] = set()

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Opens a component folder, such as `checkpoint/vae`: a single safetensors file, or shards with an index.

        Raises:
            CheckpointError: no safetensors weights, pickled weights only, a truncated or damaged file, a missing shard,
                an index that names a tensor no shard has, or tensors that change what others mean.
        """
        files, index = _weight_files(folder)
        tensors = _merged(folder, files, index)
        refuse_altering(tensors)
        return cls(folder, files, tensors)

    def unasked(self) -> list[str]:
        """Names of tensors that nobody has asked for so far."""
        return sorted(self.tensors.keys() - self._asked)

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
            CheckpointError: the tensor is missing, has another shape, is not a floating-point tensor, or holds values
                that are not finite.
        """
        stored = self.check(name, shape)
        raw = np.fromfile(stored.file, np.uint8, stored.nbytes, offset=stored.offset)
        return to_float32(raw, stored.dtype, _label(stored, name)).reshape(shape)

    def copy(self, name: str, shape: tuple[int, ...], path: Path) -> str:
        """Copies one tensor's values into a raw file of their own, piece by piece.

        Args:
            name: name of the tensor in the checkpoint.
            shape: shape that it must have.
            path: the file to create.

        Returns:
            The dtype written, the checkpoint's own but for float64: `float32`, `float16` or `bfloat16`.

        Raises:
            CheckpointError: the tensor is missing, of another shape, or cannot be read.
        """
        stored = self.check(name, shape)
        left, label = stored.nbytes, _label(stored, name)
        with stored.file.open("rb") as source, path.open("wb") as target:
            source.seek(stored.offset)
            while left:
                piece = source.read(min(left, CHUNK))
                if not piece:
                    raise CheckpointError(f"{stored.file}: ends inside tensor {name!r}; download it again")
                left -= len(piece)
                raw = np.frombuffer(piece, np.uint8)
                if stored.dtype == "F64":
                    target.write(to_float32(raw, stored.dtype, label).data)
                else:
                    check_finite(raw, stored.dtype, label)
                    target.write(piece)
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

    def label(self, name: str) -> str:
        """A tensor and its file, for errors."""
        return _label(self._find(name), name)

    def _find(self, name: str) -> StoredTensor:
        self._asked.add(name)
        try:
            return self.tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.place}: tensor {name!r} is missing; expected a complete checkpoint") from None


def _label(stored: StoredTensor, name: str) -> str:
    return f"{stored.file}: tensor {name!r}"


def _weight_files(folder: Path) -> tuple[list[Path], Mapping[str, str]]:
    """The safetensors files of a component and the index that ties shards together (empty for a single file)."""
    listed = [path for path in sorted(folder.iterdir()) if not path.name.startswith(APPLE_DOUBLE) and not path.is_dir()]
    chosen = choose_weights((path.name for path in listed), folder)
    if chosen is not None:
        if not chosen.index:
            return [folder / name for name in chosen.files], {}
        index = _read_index(folder / chosen.index)
        return [folder / name for name in sorted(set(index.values()))], index
    files = [path for path in listed if path.suffix == ".safetensors"]
    if len(files) == 1:
        return files, {}
    if files:
        raise CheckpointError(
            f"{folder}: {len(files)} safetensors files and no index; expected one file, or shards with an index"
        )
    raise CheckpointError(f"{folder}: {_no_weights(listed)}")


def _no_weights(listed: Iterable[Path]) -> str:
    """Why files of a component's folder are of no use."""
    for file in listed:
        if file.suffix in PICKLES:
            return (
                f"only pickled weights found ({file.name}), which can run code when loaded; "
                "expected .safetensors: convert them, or download the safetensors variant"
            )
        if file.suffix == ".gguf" and (instead := found_instead(file)) is not None:
            return f"{file.name} {instead}"
    return "no weights found; expected a .safetensors file"


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name -> shard, each of them there."""
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not index or not all(isinstance(shard, str) for shard in index.values()):
        raise CheckpointError(f"{path}: not a readable index; expected a 'weight_map' of tensors to files")
    for name in sorted(set(index.values())):
        shard = path.parent / name
        if shard.parent != path.parent or not shard.is_file():
            raise CheckpointError(f"{shard}: shard named in {path.name} is missing; download it again")
    return index


def _merged(folder: Path, files: Sequence[Path], index: Mapping[str, str]) -> dict[str, StoredTensor]:
    """The tensors of all files; of one that several hold, that of the file which the index names."""
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in read_header(file).items():
            earlier = tensors.setdefault(name, tensor)
            if earlier is tensor:
                continue
            if index.get(name) not in (earlier.file.name, file.name):
                raise CheckpointError(
                    f"{folder}: tensor {name!r} is in {earlier.file.name} and in {file.name}, and the index names "
                    "neither; download the shards again"
                )
            if index[name] == file.name:
                tensors[name] = tensor
    missing = sorted(set(index) - set(tensors))
    if missing:
        raise CheckpointError(
            f"{folder}: the index names {len(missing)} tensors that no shard holds, the first {missing[0]!r}; "
            "download the shards again"
        )
    return tensors
