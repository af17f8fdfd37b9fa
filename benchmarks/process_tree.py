"""Memory of a command and of all processes it starts, and disk of the folder it writes, sampled while it runs."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from t2v_rt.errors import RequestError

INTERVAL = 0.25  # seconds between samples: a large tensor takes as long


def measure(command: Sequence[str], folder: Path) -> dict[str, Any]:
    """Runs a command to its end.

    Args:
        command: and its arguments.
        folder: whose files are counted.

    Returns:
        `seconds`; the most that was seen at once of `peak_rss_bytes` (resident memory of all processes, file pages they
        map included), `peak_anonymous_bytes` (what the system cannot drop) and `peak_disk_bytes`.

    Raises:
        RequestError: there is no /proc here, or the command failed.
    """
    if not Path("/proc/self/status").is_file():
        raise RequestError("memory of a process tree is read from /proc; run this on Linux")
    start, peaks = time.perf_counter(), [0, 0, 0]
    process = subprocess.Popen(command)
    while process.poll() is None:
        sample = (*_memory(process.pid), _disk(folder))
        peaks = [max(pair) for pair in zip(peaks, sample, strict=True)]
        time.sleep(INTERVAL)
    if process.returncode:
        raise RequestError(f"{' '.join(command)} ended with exit code {process.returncode}")
    names = ("peak_rss_bytes", "peak_anonymous_bytes", "peak_disk_bytes")
    return {"seconds": time.perf_counter() - start, **dict(zip(names, peaks, strict=True))}


def _memory(pid: int) -> tuple[int, int]:
    """Resident and anonymous bytes of a process and its descendants; those that end meanwhile count nothing."""
    resident = anonymous = 0
    try:
        for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmRSS:"):
                resident = int(line.split()[1]) * 1024
            elif line.startswith("RssAnon:"):
                anonymous = int(line.split()[1]) * 1024
        children = [
            int(child)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text(encoding="utf-8").split()
        ]
    except OSError:
        return resident, anonymous
    for child in children:
        more = _memory(child)
        resident, anonymous = resident + more[0], anonymous + more[1]
    return resident, anonymous


def _disk(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):  # which passes over folders that are gone meanwhile
        for name in names:
            with suppress(OSError):
                total += Path(place, name).stat().st_size
    return total
