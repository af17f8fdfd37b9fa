"""A GPU, and what all engines on it share.

Kernels that TensorRT for RTX compiles at the first use are kept in the user's cache.
"""

from __future__ import annotations

import hashlib
import logging
import re
import threading
import weakref
from typing import Any

from t2v_rt.engines.backend_info import backend_info
from t2v_rt.engines.bundle.profiles import PlanSpec
from t2v_rt.engines.tensorrt.cuda import Cuda
from t2v_rt.engines.tensorrt.libraries import Library
from t2v_rt.engines.tensorrt.working_memory import WorkingMemory
from t2v_rt.errors import EngineError, OutOfMemoryError
from t2v_rt.system import forked
from t2v_rt.system.user_cache import UserCache

logger = logging.getLogger(__name__)
OUT_OF_MEMORY = re.compile(r"out ?of ?memory|MemoryAllocation", re.IGNORECASE)  # as the libraries and CUDA say it


def make_log(trt: Any) -> Any:
    """A logger for the library that keeps its errors."""

    class RuntimeLog(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []  # of the call that is on its way

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(msg)
            else:
                logger.debug("%s", msg)

        def take(self) -> list[str]:
            """The errors since it was last asked, each on one line."""
            errors, self.errors = self.errors, []
            return [" ".join(error.split())[:300] for error in errors]

    return RuntimeLog()


class Gpu:
    """A GPU with what all engines on it share: the library's runtime, a lock, what they work in; made by `open_gpu`.

    Args:
        library: that runs the plans.
        index: of the GPU.
    """

    def __init__(self, library: Library, index: int) -> None:
        self._library = library
        self.cuda = Cuda(backend_info(library.backend).extra, index)
        self.lock = threading.RLock()
        self.log = make_log(library.trt)
        self.runtime = library.trt.Runtime(self.log)
        self.runtime.engine_host_code_allowed = False
        self.memory = WorkingMemory(self.cuda.allocate, self.lock)
        self._fault_told = False
        forked.watch(self)

    def after_fork(self) -> None:
        """Leaves the library's runtime to the parent; see `t2v_rt.system.forked`."""
        forked.abandon(self.runtime, self.log)
        self.lock = threading.RLock()

    @property
    def identity(self) -> str:
        """GPU, driver and library: whatever may change what an engine computes."""
        info = self.cuda.info
        return f"{info.name}, CUDA driver {info.driver}, {self._library.backend} {self._library.version}"

    def begin(self) -> None:
        """Makes the GPU the calling thread's, which has the lock, and forgets trouble that was overcome before."""
        self.cuda.activate()
        self.log.take()

    def settle(self) -> None:
        """Waits until nothing is in use that is to be let go of; what is wrong with the GPU is told once, not raised.

        Letting go must always work: after a fault that is all that is left to do.
        """
        try:
            self.cuda.activate()
            self.cuda.synchronize()
        except EngineError as exc:
            if not self._fault_told:
                logger.warning("what was on the GPU is let go of all the same: %s", exc)
            self._fault_told = True

    def create_context(self, engine: Any, spec: PlanSpec, kernels: bytes | None, graphs: bool) -> tuple[Any, Any]:
        """A context that works in memory it is given, and the cache of its kernels; see `Library.create_context`."""
        return self._library.create_context(engine, spec, kernels, graphs)

    def failure(self, what: str) -> EngineError:
        """The error of a call that the library said no to, with its reason.

        The library tells of one trouble in several lines, the cause not always first: where one of them is about
        memory, that is the reason; otherwise the first is.
        """
        said = self.log.take()
        if (fault := self.cuda.fault()) is not None:
            return EngineError(f"{what}: {fault}")
        shortages = [line for line in said if OUT_OF_MEMORY.search(line)]
        reason = (shortages or said or ["it gave no reason"])[0]
        kind = OutOfMemoryError if shortages else EngineError
        return kind(f"{what}: {self._library.backend} failed: {reason}")


_gpus: weakref.WeakValueDictionary[tuple[Library, int], Gpu] = weakref.WeakValueDictionary()


def open_gpu(library: Library, index: int = 0) -> Gpu:
    """A GPU, the same for all of this process that use it through one library, for as long as anybody does.

    Args:
        library: that runs the plans.
        index: of the GPU.

    Raises:
        BackendError: no driver, too old a driver, no such GPU, or it is that of the process that this one was forked
            from.
        EngineError: the GPU cannot be used, as after a fault of it.
    """
    forked.claim_gpu()
    with forked.loading:
        gpu = _gpus.get((library, index))
        if gpu is None:
            gpu = _gpus[library, index] = Gpu(library, index)
        else:
            gpu.cuda.activate()  # fails after a fault, as making it would
        return gpu


class KernelCache:
    """Kernels that were compiled for one plan on one GPU, kept in the user's cache; without it the first call is slow.

    Args:
        key: of the plan, the GPU, its driver and the library.
    """

    def __init__(self, key: str) -> None:
        self._name = f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.bin"
        self._cache = UserCache("kernels")

    def read(self) -> bytes | None:
        """What was kept, or None."""
        return self._cache.get(self._name)

    def write(self, content: bytes) -> None:
        """Keeps kernels."""
        self._cache.put(self._name, content)
