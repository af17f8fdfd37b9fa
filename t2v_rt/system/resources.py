"""What this process may use of its machine: memory and processors, those of its container where that has fewer."""

from __future__ import annotations

import ctypes
import logging
import math
import os
import sys
from pathlib import Path
from typing import Any

from t2v_rt.system import cgroups

logger = logging.getLogger(__name__)


def usable_threads(asked: int | None) -> int | None:
    """Threads that pay: more than there are processors for wait for one another, and take many times as long.

    Args:
        asked: for; None for the library's own choice.

    Returns:
        What was asked for, or, with a warning, what this process may use. None where the library's choice is as good:
        it goes by the machine's cores, which this process may not have all of.
    """
    usable = usable_processors()
    if asked is None:
        return usable if usable < (os.cpu_count() or 1) else None
    if asked > usable:
        logger.warning("threads is %d, and this process may use %d processors: %d are used", asked, usable, usable)
    return min(asked, usable)


def peak_rss_bytes() -> int:
    """The most memory this process has held resident so far, in bytes."""
    if sys.platform == "win32":
        return _windows_memory()["PeakWorkingSetSize"]
    if sys.platform == "linux":
        # ru_maxrss is inherited from the process that started this one; VmHWM is this program's own
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_memory_bytes() -> int:
    """Memory that can be had without swapping, in bytes; a container's limit counts where it is lower.

    macOS has no such reading, for it shrinks other programs on demand: there it is all the memory of the machine.
    """
    if sys.platform == "win32":
        return _windows_available()
    if sys.platform == "darwin":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    room = cgroups.memory_room()
    return available if room is None else min(available, room)


def usable_processors() -> int:
    """Processors that this process may use: those of the machine, of its affinity, or a container's worth of time."""
    if sys.platform == "linux":
        allowed = len(os.sched_getaffinity(0))
        quota = cgroups.processor_quota()
        return allowed if quota is None else max(1, min(allowed, math.ceil(quota)))
    return os.cpu_count() or 1


def _windows_memory() -> dict[str, int]:
    class Counters(ctypes.Structure):
        _fields_ = [
            ("cb", ctypes.c_uint32),
            ("PageFaultCount", ctypes.c_uint32),
            *((name, ctypes.c_size_t) for name in ("PeakWorkingSetSize", "WorkingSetSize")),
            *((f"quota{i}", ctypes.c_size_t) for i in range(4)),
            *((name, ctypes.c_size_t) for name in ("PagefileUsage", "PeakPagefileUsage")),
        ]

    counters = Counters(cb=ctypes.sizeof(Counters))
    windll: Any = getattr(ctypes, "windll")  # noqa: B009  absent from the type stubs of other systems
    process = ctypes.c_void_p(windll.kernel32.GetCurrentProcess())
    if not windll.psapi.GetProcessMemoryInfo(process, ctypes.byref(counters), counters.cb):
        raise OSError("GetProcessMemoryInfo failed")
    return {name: int(getattr(counters, name)) for name in ("PeakWorkingSetSize", "WorkingSetSize")}


def _windows_available() -> int:
    class Status(ctypes.Structure):
        _fields_ = [
            ("dwLength", ctypes.c_uint32),
            ("dwMemoryLoad", ctypes.c_uint32),
            *((name, ctypes.c_uint64) for name in ("total", "available", "a", "b", "c", "d", "e")),
        ]

    status = Status(dwLength=ctypes.sizeof(Status))
    windll: Any = getattr(ctypes, "windll")  # noqa: B009  as above
    if not windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
        raise OSError("GlobalMemoryStatusEx failed")
    return int(status.available)
