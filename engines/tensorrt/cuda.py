"""The CUDA calls of the runtime, through cuda-bindings: device, stream, memory, copies.

The package brings the CUDA runtime with it; from the system it needs the NVIDIA driver only. All memory is given back
when the last reference to it goes.
"""

from __future__ import annotations

import importlib
import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from t2v_rt.errors import BackendError, EngineError, OutOfMemoryError
from t2v_rt.system import forked

logger = logging.getLogger(__name__)
SUCCESS, OUT_OF_MEMORY, OLD_DRIVER, NO_DEVICE = 0, 2, 35, 100  # of cudaError_t
NON_BLOCKING = 1  # a stream that does not wait for the default one
PLAIN = 0  # flags of pinned memory


@dataclass(frozen=True)
class DeviceInfo:
    """A GPU.

    Args:
        name: as its driver tells it.
        capability: compute capability, major and minor.
        driver: newest CUDA version that the driver supports, as 13050 for 13.5.
        memory_bytes: in all.
    """

    name: str
    capability: tuple[int, int]
    driver: int
    memory_bytes: int

    @property
    def target(self) -> str:
        """As GPUs are named to build for, such as `sm89`."""
        return f"sm{self.capability[0]}{self.capability[1]}"


def load_cuda(extra: str) -> Any:
    """The module of CUDA's runtime calls.

    Args:
        extra: of t2v-rt, named where the package is missing.

    Raises:
        BackendError: cuda-bindings is not installed or cannot be loaded.
    """
    try:
        return importlib.import_module("cuda.bindings.runtime")
    except (ImportError, OSError) as exc:
        reason = " ".join(str(exc).split())
        raise BackendError(
            f"running on a GPU needs the package 'cuda-bindings' ({reason}); install t2v-rt[{extra}]"
        ) from exc


def explain_no_device(code: int, driver: int, runtime: int) -> str:
    """Why there is no GPU to use, and what to do.

    Args:
        code: what counting the GPUs gave.
        driver: CUDA version of the driver, as 13050 for 13.5; 0 where there is no driver.
        runtime: CUDA version of cuda-bindings, as 13050 for 13.5.
    """
    if driver == 0:
        return "no NVIDIA driver is installed; run this on a machine with a GPU, or build the bundle for onnxruntime"
    if code == OLD_DRIVER:
        return (
            f"the NVIDIA driver supports CUDA {_version(driver)}, cuda-bindings is of CUDA {_version(runtime)}; update "
            f"the driver, or install cuda-bindings<{driver // 1000 + 1}"
        )
    if code in (SUCCESS, NO_DEVICE):
        return "the NVIDIA driver knows of no GPU; run this on a machine with one, or build the bundle for onnxruntime"
    return f"the NVIDIA driver gave CUDA error {code}; t2v-rt doctor tells more"


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def find_device(runtime: Any, index: int = 0) -> DeviceInfo:
    """Asks CUDA for a GPU; nothing is allocated on it.

    Args:
        runtime: of `load_cuda`.
        index: of the GPU.

    Raises:
        BackendError: no driver, too old a driver, or no GPU.
        EngineError: CUDA does not tell of it.
    """
    code, count = runtime.cudaGetDeviceCount()
    if int(code) != SUCCESS or not count:
        versions = (runtime.cudaDriverGetVersion()[1], runtime.cudaRuntimeGetVersion()[1])
        raise BackendError(explain_no_device(int(code), *(version or 0 for version in versions)))
    properties = call(runtime, runtime.cudaGetDeviceProperties, index)
    return DeviceInfo(
        bytes(properties.name).split(b"\0")[0].decode(errors="replace"),
        (int(properties.major), int(properties.minor)),
        int(call(runtime, runtime.cudaDriverGetVersion)),
        int(properties.totalGlobalMem),
    )


def card_bytes(extra: str) -> int | None:
    """Memory of the GPU in all, for a library that works on it and does not tell; None, and why once, if unknown.

    Args:
        extra: of t2v-rt that holds cuda-bindings.

    Raises:
        BackendError: the GPU is that of the process that this one was forked from.
    """
    forked.claim_gpu()
    try:
        return find_device(load_cuda(extra)).memory_bytes
    except (BackendError, EngineError) as exc:
        _tell_unknown(str(exc))
        return None


@cache
def _tell_unknown(reason: str) -> None:
    """Warns, once for each reason."""
    logger.warning("the GPU's memory is not known, requests are held against a vram_budget only: %s", reason)


def call(runtime: Any, function: Callable[..., tuple[Any, ...]], *arguments: Any, what: str = "") -> Any:
    """Calls CUDA and returns what it gave besides the error code.

    Args:
        runtime: of `load_cuda`.
        function: of it.
        arguments: its own.
        what: is asked for, named where memory runs out.

    Raises:
        OutOfMemoryError: there was not enough memory.
        EngineError: any other error.
    """
    code, *values = function(*arguments)
    if int(code) == OUT_OF_MEMORY:
        raise OutOfMemoryError(f"the GPU is out of memory{f': {what} were asked for' if what else ''}")
    if int(code) != SUCCESS:
        text = runtime.cudaGetErrorString(code)[1]
        said = text.decode(errors="replace") if isinstance(text, bytes) else str(text)
        raise EngineError(f"{function.__name__} failed: CUDA error {int(code)}, {said}")
    return values[0] if len(values) == 1 else tuple(values)


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
        BackendError: no package, no driver, too old a driver, or no GPU.
    """

    def __init__(self, extra: str, index: int = 0) -> None:
        self._rt = load_cuda(extra)
        self._index = index
        self.info = find_device(self._rt, index)
        self.activate()
        self.stream = int(self._call(self._rt.cudaStreamCreateWithFlags, NON_BLOCKING))
        self._stream_end = weakref.finalize(self, self._rt.cudaStreamDestroy, self.stream)
        forked.watch(self)

    def after_fork(self) -> None:
        """Leaves the stream to the parent; see `t2v_rt.system.forked`."""
        self._stream_end.detach()

    def activate(self) -> None:
        """Makes this GPU the calling thread's."""
        self._call(self._rt.cudaSetDevice, self._index)

    def synchronize(self) -> None:
        """Waits until all that was queued is done."""
        self._call(self._rt.cudaStreamSynchronize, self.stream)

    # -- memory ------------------------------------------------------------------------------------------------------

    def allocate(self, nbytes: int) -> DeviceBuffer:
        """Memory on the GPU, not cleared; raises OutOfMemoryError."""
        address = int(self._call(self._rt.cudaMalloc, max(nbytes, 1), what=f"{nbytes / 1e6:.0f} MB on the GPU"))
        return DeviceBuffer(address, nbytes, self._rt.cudaFree)

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
