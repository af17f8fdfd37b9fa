"""Outputs that stay on a GPU, and windows of them, which another engine is fed there."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from t2v_rt.engines.contract import DeviceArray
from t2v_rt.engines.specs import ALIGNMENT
from t2v_rt.engines.tensorrt.cuda import Cuda, DeviceBuffer
from t2v_rt.errors import EngineError


class Loan:
    """A buffer for as long as somebody needs what is in it; then it goes back to where the next call takes it from.

    Args:
        buffer: of the device.
        shelf: where it goes.
    """

    def __init__(self, buffer: DeviceBuffer, shelf: list[DeviceBuffer]) -> None:
        self.buffer = buffer
        weakref.finalize(self, shelf.append, buffer)


class GpuArray(DeviceArray):
    """An output on a GPU, or a window of it.

    Args:
        cuda: the GPU.
        loan: the output's buffer.
        dtype: of its values.
        shape: its sizes.
        strides: bytes from one value to the next along each dimension; None where all lie close together.
        offset: bytes from the buffer's beginning.
    """

    def __init__(
        self,
        cuda: Cuda,
        loan: Loan,
        dtype: np.dtype[Any],
        shape: Sequence[int],
        strides: Sequence[int] | None = None,
        offset: int = 0,
    ) -> None:
        self.cuda, self._loan = cuda, loan
        self._dtype, self._shape, self._offset = dtype, tuple(shape), offset
        below = itertools.accumulate(self._shape[:0:-1], int.__mul__, initial=dtype.itemsize)
        self._strides = tuple(below)[::-1] if strides is None else tuple(strides)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def address(self) -> int:
        """Of its first value."""
        return self._loan.buffer.address + self._offset

    @property
    def can_be_fed(self) -> bool:
        """Whether an engine can read it where it lies: its values lie close together, and begin where tensors do."""
        _, outer = self._runs()
        return not outer and self.address % ALIGNMENT == 0

    def __getitem__(self, window: slice | tuple[slice, ...]) -> Self:
        offset, shape, strides = self._offset, list(self._shape), self._strides
        for i, part in enumerate(window if isinstance(window, tuple) else (window,)):
            start, stop, step = part.indices(shape[i])
            if step != 1:
                raise EngineError(f"a window of step {step} was asked for; expected 1")
            offset, shape[i] = offset + start * strides[i], max(stop - start, 0)
        return type(self)(self.cuda, self._loan, self._dtype, shape, strides, offset)

    def copy_to(self, buffer: DeviceBuffer) -> None:
        """Queues a copy to another buffer, where values lie close together."""
        width, outer = self._runs()
        (rows, pitch), *rest = outer or [(1, width)]
        target = buffer.address
        # the outer dimensions from the first to the last, as the copy has them
        for places in itertools.product(*(range(count) for count, _ in reversed(rest))):
            steps = zip(places, reversed(rest), strict=True)
            source = self.address + sum(place * stride for place, (_, stride) in steps)
            self.cuda.copy_rows(source, pitch, target, width, rows)
            target += width * rows

    def _runs(self) -> tuple[int, list[tuple[int, int]]]:
        """Bytes that lie close together, and how they are repeated: times and stride, the innermost first."""
        width, outer = self._dtype.itemsize, list[tuple[int, int]]()
        for size, stride in zip(reversed(self._shape), reversed(self._strides), strict=True):
            if size == 1:
                continue
            if not outer and stride == width:
                width *= size
            elif outer and stride == outer[-1][0] * outer[-1][1]:
                outer[-1] = outer[-1][0] * size, outer[-1][1]
            else:
                outer.append((size, stride))
        return width, outer

    def to_host(self) -> NDArray[Any]:
        self.cuda.activate()
        whole = self.cuda.host_array((self._loan.buffer.nbytes,), np.dtype(np.uint8))
        self.cuda.download(self._loan.buffer, whole)
        self.cuda.synchronize()
        return np.ndarray(self._shape, self._dtype, whole, self._offset, self._strides).copy()
