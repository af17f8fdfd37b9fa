"""CUDA's calls on host memory, for tests, as strict as their documents; stands in for `cuda.bindings.runtime`."""

from __future__ import annotations

import threading
from collections import Counter
from functools import wraps
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import numpy as np
from numpy.typing import NDArray

SUCCESS, OUT_OF_MEMORY, INVALID, INVALID_PITCH, NO_SUCH_DEVICE = 0, 2, 1, 12, 101
ALIGNMENT = 256  # of addresses, in bytes, that tensors and workspaces need, and that fresh memory has
STREAM = 7  # of the first device; the others' follow
BLOCKING = 4  # cudaDeviceScheduleBlockingSync
NEVER_FAULT = ("cudaGetErrorString", "cudaDriverGetVersion", "cudaRuntimeGetVersion")
DIRT = 255  # of fresh memory, a NaN in every float


class HostCuda:
    """The calls of `cuda.bindings.runtime` that are used; every address must lie in memory that is allocated.

    A thread's calls go to the device that it has made its own; memory and streams are one device's.

    Args:
        capacity: of each device, in bytes.
        devices: how many there are.
    """

    def __init__(self, capacity: int, devices: int = 1) -> None:
        self.capacity, self.peak, self.devices = capacity, 0, devices
        self.fault = 0  # the code of one that CUDA does not recover from; then all that does anything gives it
        self.flags: dict[int, int] = {}  # of devices that were in use when they were set
        self._thread = threading.local()
        self._device_of: dict[int, int] = {}  # address -> device
        self.taken = 0  # times that device memory was taken
        self.moved: Counter[str] = Counter()  # bytes to the device (`hd`), from it (`dh`) and on it (`dd`)
        kinds = {"cudaMemcpyHostToDevice": "hd", "cudaMemcpyDeviceToHost": "dh", "cudaMemcpyDeviceToDevice": "dd"}
        self.cudaMemcpyKind = SimpleNamespace(**kinds)
        self._memory: dict[str, dict[int, NDArray[np.uint8]]] = {"d": {}, "h": {}}

    def __getattribute__(self, name: str) -> Any:
        found = object.__getattribute__(self, name)
        if not name.startswith("cuda") or name in NEVER_FAULT or not callable(found):
            return found
        results = len(get_args(get_type_hints(found)["return"])) - 1

        @wraps(found)
        def call(*arguments: Any) -> Any:
            return (self.fault, *[None] * results) if self.fault else found(*arguments)

        return call

    @property
    def current(self) -> int:
        """The device of the calling thread."""
        return getattr(self._thread, "device", 0)

    def used(self, where: str = "d", device: int | None = None) -> int:
        """Bytes that are allocated on the devices, or one of them (`d`), or pinned on the host (`h`)."""
        blocks = self._memory[where].items()
        return sum(len(block) for address, block in blocks if device in {None, self._device_of.get(address)})

    def view(self, where: str, address: int, nbytes: int) -> NDArray[np.uint8]:
        """The bytes at an address."""
        for start, block in self._memory[where].items():
            if start <= address and address + nbytes <= start + len(block):
                return block[address - start : address - start + nbytes]
        raise AssertionError(f"{nbytes} bytes at {address:#x} are not allocated")

    def _allocate(self, where: str, nbytes: int) -> tuple[int, int | None]:
        if where == "d" and self.used("d", self.current) + nbytes > self.capacity:
            return OUT_OF_MEMORY, None
        assert self.flags.get(self.current) == BLOCKING, "whoever waits for this device keeps a core busy"
        memory = np.full(nbytes + ALIGNMENT, DIRT, np.uint8)
        address = -(-memory.ctypes.data // ALIGNMENT) * ALIGNMENT
        self._memory[where][address] = memory[address - memory.ctypes.data :][:nbytes]
        if where == "d":
            self._device_of[address] = self.current
        self.peak = max(self.peak, self.used())
        return SUCCESS, address

    def cudaMalloc(self, nbytes: int) -> tuple[int, int | None]:  # noqa: N802
        self.taken += 1
        return self._allocate("d", nbytes)

    def cudaHostAlloc(self, nbytes: int, flags: int) -> tuple[int, int | None]:  # noqa: N802
        return self._allocate("h", nbytes)

    def cudaFree(self, address: int) -> tuple[int]:  # noqa: N802
        del self._memory["d"][address], self._device_of[address]
        return (SUCCESS,)

    def cudaFreeHost(self, address: int) -> tuple[int]:  # noqa: N802
        del self._memory["h"][address]
        return (SUCCESS,)

    def cudaMemcpyAsync(self, target: int, source: int, nbytes: int, kind: str, stream: int) -> tuple[int]:  # noqa: N802
        self.check_stream(stream)
        self.moved[kind] += nbytes
        self.view(kind[1], target, nbytes)[:] = self.view(kind[0], source, nbytes)
        return (SUCCESS,)

    def cudaMemcpy2DAsync(  # noqa: N802
        self, target: int, target_pitch: int, source: int, pitch: int, width: int, rows: int, kind: str, stream: int
    ) -> tuple[int]:
        self.check_stream(stream)
        if width > min(target_pitch, pitch):
            return (INVALID_PITCH,)
        self.moved[kind] += width * rows
        given, taken = (
            self.view(where, address, step * (rows - 1) + width)
            for where, address, step in ((kind[0], source, pitch), (kind[1], target, target_pitch))
        )
        assert not np.shares_memory(given, taken)
        for i in range(rows):
            taken[i * target_pitch :][:width] = given[i * pitch :][:width]
        return (SUCCESS,)

    def cudaMemsetAsync(self, address: int, value: int, nbytes: int, stream: int) -> tuple[int]:  # noqa: N802
        self.check_stream(stream)
        self.view("d", address, nbytes)[:] = value
        return (SUCCESS,)

    def cudaGetDeviceCount(self) -> tuple[int, int]:  # noqa: N802
        return SUCCESS, self.devices

    def cudaSetDevice(self, index: int) -> tuple[int]:  # noqa: N802
        if not 0 <= index < self.devices:
            return (NO_SUCH_DEVICE,)
        self._thread.device = index
        return (SUCCESS,)

    def cudaSetDeviceFlags(self, flags: int) -> tuple[int]:  # noqa: N802
        self.flags[self.current] = flags
        return (SUCCESS,)

    def cudaGetDeviceProperties(self, index: int) -> tuple[int, Any]:  # noqa: N802
        name = b"host\0" if self.devices == 1 else f"host {index}\0".encode()
        return SUCCESS, SimpleNamespace(name=name, major=8, minor=6, totalGlobalMem=self.capacity)

    def cudaMemGetInfo(self) -> tuple[int, int, int]:  # noqa: N802
        return SUCCESS, self.capacity - self.used("d", self.current), self.capacity

    def cudaDriverGetVersion(self) -> tuple[int, int]:  # noqa: N802
        return SUCCESS, 13000

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[int, int]:  # noqa: N802
        return SUCCESS, STREAM + self.current

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:  # noqa: N802
        return (SUCCESS if 0 <= stream - STREAM < self.devices else INVALID,)

    def cudaStreamDestroy(self, stream: int) -> tuple[int]:  # noqa: N802
        return (SUCCESS,)

    def check_stream(self, stream: int) -> None:
        """A thread may queue work on a stream of its own device only."""
        assert stream == STREAM + self.current

    def cudaGetErrorString(self, code: int) -> tuple[int, bytes]:  # noqa: N802
        return SUCCESS, b"an error"
