"""The CUDA calls of the runtime, through cuda-bindings: a GPU's stream, memory, copies.

All memory is given back when the last reference to it goes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from t2v_rt.engines.devices import FAULTS, call, device_key, failure, find_device, load_cuda, use_device
from t2v_rt.errors import EngineError
from t2v_rt.system import forked

NON_BLOCKING = 1  # a stream that does not wait for the default one
PLAIN = 0  # flags of pinned memory


class Buffer(Protocol):
    """Memory on a GPU."""

    @property
    def address(self) -> int:
        """On the device."""
        ...

    @property
    def nbytes(self) -> int:
        """Its size."""
        ...


class Cuda:
    """One GPU, and a stream on it in which everything happens in order.

    Args:
        extra: of t2v-rt that holds cuda-bindings.
        index: of the GPU.

    Raises:
        BackendError: no package, no driver, too old a driver, no GPU, or none of that index.
        EngineError: the GPU cannot be used, as after a fault of it.
    """

    def __init__(self, extra: str, index: int = 0) -> None:
        self._rt = load_cuda(extra)
        self._index = index
        self._allocated: dict[int, int] = {}  # address -> bytes
        self.info = find_device(self._rt, extra, index)
        use_device(self._rt, index)
        self.stream = int(self._call(self._rt.cudaStreamCreateWithFlags, NON_BLOCKING))
        self._stream_end = weakref.finalize(self, self._rt.cudaStreamDestroy, self.stream)
        forked.watch(self)

    def after_fork(self) -> None:
        """Leaves the stream to the parent; see `t2v_rt.system.forked`."""
        self._stream_end.detach()

    @property
    def key(self) -> str:
        """The GPU's name among all that this process sees."""
        return device_key(self._index)

    def activate(self) -> None:
        """Makes this GPU the calling thread's."""
        self._call(self._rt.cudaSetDevice, self._index)

    def synchronize(self) -> None:
        """Waits until all that was queued is done."""
        self._call(self._rt.cudaStreamSynchronize, self.stream)

    def fault(self) -> EngineError | None:
        """What made the GPU unusable for this process, if it is; waits for what was queued."""
        code, *_ = self._rt.cudaStreamSynchronize(self.stream)
        return failure(self._rt, code, "cudaStreamSynchronize") if int(code) in FAULTS else None

    # -- memory ------------------------------------------------------------------------------------------------------

    def free_bytes(self) -> int:
        """What the GPU has free now, whoever holds the rest."""
        self.activate()
        free, _ = self._call(self._rt.cudaMemGetInfo)
        return int(free)

    @property
    def buffer_bytes(self) -> int:
        """What is allocated here; a library's own memory, as of weights, is not in it."""
        return sum(list(self._allocated.values()))

    def allocate(self, nbytes: int) -> DeviceBuffer:
        """Memory on the GPU, not cleared; raises OutOfMemoryError."""
        address = int(self._call(self._rt.cudaMalloc, max(nbytes, 1), what=f"{nbytes / 1e6:.0f} MB on the GPU"))
        self._allocated[address] = nbytes
        return DeviceBuffer(address, nbytes, partial(_free, self._rt.cudaFree, self._allocated))

    def host_array(self, shape: Sequence[int], dtype: np.dtype[Any]) -> NDArray[Any]:
        """An array in pinned host memory, from and to which copies run at full speed; raises OutOfMemoryError."""
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        what = f"{nbytes / 1e6:.0f} MB of pinned host memory"
        address = int(self._call(self._rt.cudaHostAlloc, max(nbytes, 1), PLAIN, what=what))
        return np.asarray(_PinnedMemory(address, tuple(shape), dtype, self._rt.cudaFreeHost))

    def zero(self, buffer: Buffer) -> None:
        """Queues clearing a buffer."""
        self._call(self._rt.cudaMemsetAsync, buffer.address, 0, buffer.nbytes, self.stream)

    def upload(self, array: NDArray[Any], buffer: Buffer) -> None:
        """Queues a copy of a pinned array to the GPU."""
        kind = self._rt.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call(self._rt.cudaMemcpyAsync, buffer.address, array.ctypes.data, array.nbytes, kind, self.stream)

    def download(self, buffer: Buffer, array: NDArray[Any]) -> None:
        """Queues a copy from the GPU to a pinned array."""
        kind = self._rt.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call(self._rt.cudaMemcpyAsync, array.ctypes.data, buffer.address, array.nbytes, kind, self.stream)

    def copy(self, source: Buffer, target: Buffer, nbytes: int) -> None:
        """Queues a copy on the GPU."""
        kind = self._rt.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call(self._rt.cudaMemcpyAsync, target.address, source.address, nbytes, kind, self.stream)

    def copy_rows(self, source: int, pitch: int, target: int, width: int, rows: int) -> None:
        """Queues a copy on the GPU of rows that are apart to where they lie close together.

        Args:
            source: address of the first row.
            pitch: bytes from one row to the next.
            target: address of the copy.
            width: bytes of a row.
            rows: their number.
        """
        kind = self._rt.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._call(self._rt.cudaMemcpy2DAsync, target, width, source, pitch, width, rows, kind, self.stream)

    def _call(self, function: Callable[..., tuple[Any, ...]], *arguments: Any, what: str = "") -> Any:
        return call(self._rt, function, *arguments, what=what)


def _free(free: Callable[[int], object], allocated: dict[int, int], address: int) -> None:
    """Gives memory back."""
    allocated.pop(address, None)
    free(address)


class DeviceBuffer:
    """Memory on a GPU, given back with the last reference.

    Args:
        address: on the device.
        nbytes: its size.
        free: takes the address.
    """

    def __init__(self, address: int, nbytes: int, free: Callable[[int], object]) -> None:
        self.address, self.nbytes = address, nbytes
        self._end = weakref.finalize(self, free, address)
        forked.watch(self)

    def after_fork(self) -> None:
        """Leaves the memory to the parent; see `t2v_rt.system.forked`."""
        self._end.detach()


class _PinnedMemory:
    """Pinned host memory as NumPy takes it; arrays on it keep it alive."""

    def __init__(
        self, address: int, shape: tuple[int, ...], dtype: np.dtype[Any], free: Callable[[int], object]
    ) -> None:
        self.__array_interface__ = {"data": (address, False), "shape": shape, "typestr": dtype.str, "version": 3}
        self._end = weakref.finalize(self, free, address)
        forked.watch(self)

    def after_fork(self) -> None:
        """Leaves the memory to the parent; see `t2v_rt.system.forked`."""
        self._end.detach()
