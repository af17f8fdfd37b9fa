"""Weights of graphs in a raw file of their own: one tensor in memory at a time, whatever the model's size."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from t2v_rt.export.floats import narrowed
from t2v_rt.export.quantize import Quantization
from t2v_rt.export.tensors import STORED_BYTES, CheckpointWeights, Transform

ALIGNMENT = 4096  # tensors start on page boundaries, so that a backend can map them from the file


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
            dtype: to store it in: `float32`, `float16` or `bfloat16`.

        Returns:
            Its place.

        Raises:
            CheckpointError: as `CheckpointWeights.read`, or a value is beyond the dtype's range.
        """
        array = source.read(name, shape)
        values = transform(array) if transform else array
        return self._append(name, _as_stored(values, dtype, source.label(name)), dtype, values.shape)

    def add_quantized(
        self, name: str, source: CheckpointWeights, shape: tuple[int, int], scheme: Quantization, scale_dtype: str
    ) -> None:
        """Appends the parts of a quantized matrix of the checkpoint as `name.part`.

        Args:
            name: in the checkpoint.
            source: the checkpoint's tensors.
            shape: in the checkpoint (outputs, inputs), checked.
            scheme: of its parts.
            scale_dtype: of DequantizeLinear's scales.
        """
        outline, label = scheme.outline(shape[1], shape[0], scale_dtype), source.label(name)
        for part, values in scheme.split(source.read(name, shape)).items():
            dtype, stored_shape = outline[part]
            self._append(f"{name}.{part}", _as_stored(values, dtype, label), dtype, stored_shape)

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


def _as_stored(values: NDArray[Any], dtype: str, label: str) -> NDArray[Any]:
    """Contiguous, floating-point values in the dtype; packed integers as they are."""
    array: NDArray[Any] = np.ascontiguousarray(values)
    if array.dtype != np.float32 or dtype == "float32":
        return array
    return narrowed(array, dtype, label)


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
        """Notes the sizes of the parts of a matrix."""
        source.check(name, shape)
        for part, (dtype, stored) in scheme.outline(shape[1], shape[0], scale_dtype).items():
            length = prod(stored) // 2 if dtype == "int4" else prod(stored) * STORED_BYTES[dtype]
            self.places[f"{name}.{part}"] = WeightPlace(0, length, dtype, stored)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return
