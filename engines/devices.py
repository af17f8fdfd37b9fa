"""The GPUs of this machine, as CUDA tells of them, and its errors in words; nothing is allocated here.

The package cuda-bindings brings the CUDA runtime with it; from the system it needs the NVIDIA driver only.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from t2v_rt.engines.gpu_support import explain_old_driver
from t2v_rt.errors import BackendError, EngineError, OutOfMemoryError
from t2v_rt.numbers import as_integer
from t2v_rt.system import forked

logger = logging.getLogger(__name__)
SUCCESS, OUT_OF_MEMORY, OLD_DRIVER, NO_DEVICE, ALREADY_IN_USE = 0, 2, 35, 100, 708  # of cudaError_t
# Of cudaError_t: after one of these, as its documents say, whatever the process asks of CUDA fails until it is started
# again.
FAULTS = frozenset({226, 700, 702, 710, 714, 715, 716, 717, 718, 719, 721, 810, 911})
BLOCKING_WAITS = 4  # device flag: who waits for the GPU sleeps; otherwise it keeps a core busy


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


def device_key(index: int) -> str:
    """A GPU's name among all that this process sees, whatever library works on it."""
    return f"cuda:{index}"


def check_index(device: object) -> int:
    """The index of a GPU, 0 for None; raises BackendError for what is none. `find_device` says whether it is there."""
    index = 0 if device is None else as_integer(device)
    if index is None or index < 0:
        raise BackendError(f"device is {device!r}; expected the index of a GPU, 0 or more")
    return index


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


def explain_fault(code: int, said: str) -> str:
    """What an error says from which CUDA does not recover, and what to do.

    Args:
        code: one of `FAULTS`.
        said: CUDA's own text for it.
    """
    return (
        f"the GPU faulted (CUDA error {code}, {said}), and whatever this process asks of it now fails; restart the "
        "program"
    )


def explain_no_device(code: int, driver: int, runtime: int, extra: str) -> str:
    """Why there is no GPU to use, and what to do.

    Args:
        code: what counting the GPUs gave.
        driver: CUDA version of the driver, as 13050 for 13.5; 0 where there is no driver.
        runtime: CUDA version of cuda-bindings, as 13050 for 13.5.
        extra: of t2v-rt that brings cuda-bindings.
    """
    if driver == 0:
        return "no NVIDIA driver is installed; run this on a machine with a GPU, or build the bundle for onnxruntime"
    if code == OLD_DRIVER:
        needs = f"cuda-bindings is of CUDA {version_text(runtime)}"
        return explain_old_driver(f"CUDA {version_text(driver)}", needs, runtime // 1000, extra)
    if code in (SUCCESS, NO_DEVICE):
        return "the NVIDIA driver knows of no GPU; run this on a machine with one, or build the bundle for onnxruntime"
    return f"the NVIDIA driver gave CUDA error {code}; t2v-rt doctor tells more"


def version_text(number: int) -> str:
    """A CUDA version as people write it: 13.5 for 13050."""
    return f"{number // 1000}.{number % 1000 // 10}"


def find_device(runtime: Any, extra: str, index: int = 0) -> DeviceInfo:
    """Asks CUDA for a GPU; nothing is allocated on it.

    Args:
        runtime: of `load_cuda`.
        extra: of t2v-rt that brings it.
        index: of the GPU.

    Raises:
        BackendError: no driver, too old a driver, no GPU, or none of that index.
        EngineError: CUDA does not tell of it.
    """
    code, count = runtime.cudaGetDeviceCount()
    if int(code) in FAULTS:
        raise failure(runtime, code, "cudaGetDeviceCount")
    if int(code) != SUCCESS or not count:
        driver, own = runtime.cudaDriverGetVersion()[1] or 0, runtime.cudaRuntimeGetVersion()[1] or 0
        raise BackendError(explain_no_device(int(code), driver, own, extra))
    if index >= count:
        names = (_name(call(runtime, runtime.cudaGetDeviceProperties, i)) for i in range(count))
        known = ", ".join(f"{i} ({name})" for i, name in enumerate(names))
        raise BackendError(f"there is no GPU {index}; expected {known}")
    properties = call(runtime, runtime.cudaGetDeviceProperties, index)
    return DeviceInfo(
        _name(properties),
        (int(properties.major), int(properties.minor)),
        int(call(runtime, runtime.cudaDriverGetVersion)),
        int(properties.totalGlobalMem),
    )


def find_devices(extra: str) -> list[DeviceInfo]:
    """All GPUs of this machine, nothing allocated on them; none where there is none, or nothing that tells of them.

    Args:
        extra: of t2v-rt that holds cuda-bindings.
    """
    try:
        runtime = load_cuda(extra)
        code, count = runtime.cudaGetDeviceCount()
        return [find_device(runtime, extra, index) for index in range(count if int(code) == SUCCESS else 0)]
    except (BackendError, EngineError) as exc:
        logger.debug("no GPU is told of: %s", exc)
        return []


def _name(properties: Any) -> str:
    return bytes(properties.name).split(b"\0")[0].decode(errors="replace")


def card_bytes(extra: str, index: int) -> tuple[int | None, int | None]:
    """Memory of a GPU, for a library that works on it and does not tell; None, and why once, where it is unknown.

    Args:
        extra: of t2v-rt that holds cuda-bindings.
        index: of the GPU.

    Returns:
        (free now, in all).

    Raises:
        BackendError: the GPU is that of the process that this one was forked from.
    """
    forked.claim_gpu()
    try:
        runtime = load_cuda(extra)
        total = find_device(runtime, extra, index).memory_bytes
        use_device(runtime, index)
        free, _ = call(runtime, runtime.cudaMemGetInfo)
        return int(free), total
    except (BackendError, EngineError) as exc:
        _tell_unknown(str(exc))
        return None, None


@cache
def _tell_unknown(reason: str) -> None:
    """Warns, once for each reason."""
    logger.warning("the GPU's memory is not known, requests are held against a vram_budget only: %s", reason)


def use_device(runtime: Any, index: int) -> None:
    """Makes a GPU the calling thread's, and has those who wait for it sleep: a call lasts seconds.

    Args:
        runtime: of `load_cuda`.
        index: of the GPU.

    Raises:
        OutOfMemoryError: others have filled it.
        EngineError: CUDA does not take it.
    """
    try:
        call(runtime, runtime.cudaSetDevice, index)
    except OutOfMemoryError as exc:
        raise OutOfMemoryError(
            "the GPU has no room for another program; close others that use it, which nvidia-smi lists"
        ) from exc
    (code,) = runtime.cudaSetDeviceFlags(BLOCKING_WAITS)
    if int(code) == ALREADY_IN_USE:  # by a library of this process that chose how it waits; so then do we
        logger.debug("the GPU is in use in this process already: waiting for it keeps a core busy")
    elif int(code) != SUCCESS:
        raise failure(runtime, code, "cudaSetDeviceFlags")


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
    if int(code) != SUCCESS:
        raise failure(runtime, code, function.__name__, what)
    return values[0] if len(values) == 1 else tuple(values)


def failure(runtime: Any, code: Any, name: str, what: str = "") -> EngineError:
    """The error of a call of CUDA.

    Args:
        runtime: of `load_cuda`.
        code: that the call gave.
        name: of the call.
        what: was asked for, named where memory runs out.
    """
    if int(code) == OUT_OF_MEMORY:
        return OutOfMemoryError(f"the GPU is out of memory{f': {what} were asked for' if what else ''}")
    text = runtime.cudaGetErrorString(code)[1]
    said = text.decode(errors="replace") if isinstance(text, bytes) else str(text)
    if int(code) in FAULTS:
        return EngineError(explain_fault(int(code), said))
    return EngineError(f"{name} failed: CUDA error {int(code)}, {said}")
