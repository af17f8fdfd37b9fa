"""Memory of a command and of all processes it starts, and disk of the folder it writes, sampled while it runs."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from t2v_rt.errors import RequestError

INTERVAL = 0.25  # seconds between samples: a large tensor takes as long


def measure(command: Sequence[str], folder: Path) -> dict[str, Any]:
    """Runs a command to its end.

    Args:
        command: and its arguments.
        folder: whose files are counted.

    Returns:
        `seconds`; the most that was seen at once of `peak_rss_bytes` (resident memory of all processes, file pages they
        map included), `peak_anonymous_bytes` (what the system cannot drop; elsewhere than on Linux, what is a
        process's alone) and `peak_disk_bytes`.

    Raises:
        RequestError: the command failed.
    """
    start, peaks = time.perf_counter(), [0, 0, 0]
    process = subprocess.Popen(command)
    root = psutil.Process(process.pid)
    ended = False
    while not ended:
        ended = process.poll() is not None  # what it left behind is counted once more
        sample = (*tree_memory(root), _disk(folder))
        peaks = [max(pair) for pair in zip(peaks, sample, strict=True)]
        if not ended:
            time.sleep(INTERVAL)
    if process.returncode:
        raise RequestError(f"{' '.join(command)} ended with exit code {process.returncode}")
    names = ("peak_rss_bytes", "peak_anonymous_bytes", "peak_disk_bytes")
    return {"seconds": time.perf_counter() - start, **dict(zip(names, peaks, strict=True))}


def tree_memory(process: psutil.Process) -> tuple[int, int]:
    """Resident and anonymous bytes of a process and its descendants; those that end meanwhile count nothing."""
    resident = anonymous = 0
    with suppress(psutil.NoSuchProcess):
        for member in (process, *process.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                if psutil.LINUX:
                    info = member.memory_info()
                    own = info.rss - info.shared
                else:  # which has no reading of that
                    info = member.memory_full_info()
                    own = info.uss
                resident, anonymous = resident + info.rss, anonymous + own
    return resident, anonymous


def _disk(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):  # which passes over folders that are gone meanwhile
        for name in names:
            with suppress(OSError):
                total += Path(place, name).stat().st_size
    return total
