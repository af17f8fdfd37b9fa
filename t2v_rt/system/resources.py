"""What this process may use of its machine: memory and processors, those of its container where that has fewer."""

from __future__ import annotations

import logging
import math
import os
import sys
from pathlib import Path

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
        import psutil  # here and below: on Linux, nothing of it is needed to make a video

        return int(psutil.Process().memory_info().peak_wset)
    if sys.platform == "linux":
        # ru_maxrss is inherited from the process that started this one; VmHWM is this program's own
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_memory_bytes() -> int:
    """Memory that can be had without swapping, in bytes; a container's limit counts where it is lower."""
    if sys.platform != "linux":
        import psutil

        return int(psutil.virtual_memory().available)
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
