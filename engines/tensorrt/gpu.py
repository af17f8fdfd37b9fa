"""A GPU, and what all engines on it share.

Kernels that TensorRT for RTX compiles at the first use are kept in the user's cache.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from typing import Any

from t2v_rt.engines.backend_info import backend_info
from t2v_rt.engines.tensorrt.cuda import Cuda
from t2v_rt.engines.tensorrt.libraries import Library
from t2v_rt.engines.tensorrt.working_memory import WorkingMemory
from t2v_rt.errors import EngineError, OutOfMemoryError
from t2v_rt.system import forked
from t2v_rt.system.user_cache import UserCache

logger = logging.getLogger(__name__)


def make_log(trt: Any) -> Any:
    """A logger for the library that keeps its errors."""

    class RuntimeLog(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(msg)
            else:
                logger.debug("%s", msg)

        def take(self) -> str:
            """The first error since it was last asked."""
            errors, self.errors = self.errors, []
            return " ".join(errors[0].split())[:300] if errors else "it gave no reason"

    return RuntimeLog()


class Gpu:
    """A GPU with what all engines on it share: the library's runtime, a lock, what they work in.

    Args:
        library: that runs the plans.
    """

    def __init__(self, library: Library) -> None:
        forked.claim_gpu()
        self._library = library
        self.cuda = Cuda(backend_info(library.backend).extra)
        self.lock = threading.RLock()
        self.log = make_log(library.trt)
        self.runtime = library.trt.Runtime(self.log)
        self.runtime.engine_host_code_allowed = False
        self.memory = WorkingMemory(self.cuda.allocate, self.lock)
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

    def create_context(self, engine: Any, kernels: bytes | None, graphs: bool) -> tuple[Any, Any]:
        """A context that works in memory it is given, and the cache of its kernels; see `Library.create_context`."""
        return self._library.create_context(engine, kernels, graphs)

    def failure(self, what: str) -> EngineError:
        """The error of a call that the library said no to, with its reason."""
        reason = self.log.take()
        kind = OutOfMemoryError if "out of memory" in reason.lower() or "OutOfMemory" in reason else EngineError
        return kind(f"{what}: {self._library.backend} failed: {reason}")


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
