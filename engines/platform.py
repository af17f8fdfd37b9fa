"""What differs between Linux, Windows and macOS: replacing files and folders, memory readings, the user's cache."""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from t2v_rt.errors import RequestError

RENAME_TRIES = 10  # on Windows a virus scanner or an indexer may hold a new file for a moment
RENAME_PAUSE = 0.05  # seconds before the first retry, growing with each


def temporary_sibling(path: Path) -> Path:
    """A hidden name beside `path` that nothing else uses; nothing is created."""
    return path.parent / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"


def replace_file(temporary: Path, target: Path) -> None:
    """Puts a finished file in its place in one step, over an older one."""
    _retry_rename(temporary, target)


def replace_directory(temporary: Path, target: Path) -> None:
    """Puts a finished folder in its place; an older one is moved aside first and put back if that fails."""
    if not target.exists():
        _retry_rename(temporary, target)
        return
    aside = temporary_sibling(target)
    _retry_rename(target, aside)
    try:
        _retry_rename(temporary, target)
    except BaseException:
        _retry_rename(aside, target)
        raise
    remove_tree(aside)


def _retry_rename(source: Path, target: Path) -> None:
    for attempt in range(RENAME_TRIES):
        try:
            source.replace(target)
            return
        except PermissionError:
            if attempt == RENAME_TRIES - 1:
                raise
            time.sleep(RENAME_PAUSE * (attempt + 1))


def remove_tree(path: Path) -> None:
    """Removes a file or a folder with all it holds; nothing happens where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def check_writable_parent(path: Path) -> None:
    """Refuses a path in whose folder nothing can be created.

    A file is really created and removed: permission bits do not tell for an administrator or on a read-only disk.

    Raises:
        RequestError: the folder is missing, is a file, or cannot be written.
    """
    parent = path.absolute().parent
    if not parent.is_dir():
        raise RequestError(f"{path}: the folder {parent} does not exist; create it first")
    probe = temporary_sibling(parent / "probe")
    try:
        probe.touch()
        probe.unlink()
    except OSError as exc:
        raise RequestError(f"{path}: the folder {parent} is not writable ({exc.strerror}); choose another") from exc


def cache_dir() -> Path:
    """The user's folder for what can be made again: hashes that were checked, compiled kernels."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA")
        root = Path(base) if base else Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        root = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME")
        root = Path(base) if base else Path.home() / ".cache"
    return root / "t2v-rt"


def free_disk_bytes(path: Path) -> int:
    """Free bytes on the disk of a folder."""
    return shutil.disk_usage(path).free


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
    """Memory that can be had without swapping, in bytes; a container's limit counts where it is lower."""
    if sys.platform == "win32":
        return _windows_available()
    if sys.platform == "darwin":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    fields = dict(
        line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines() if ":" in line
    )
    available = int(fields["MemAvailable"].split()[0]) * 1024
    limit = _cgroup_headroom()
    return available if limit is None else min(available, limit)


def _cgroup_headroom() -> int | None:
    """Bytes this process's memory control group still allows, or None where there is no limit."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        used = (group / "memory.current").read_text(encoding="ascii").strip()
    except OSError:
        return None
    return None if limit == "max" else max(0, int(limit) - int(used))


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
    windll.psapi.GetProcessMemoryInfo(process, ctypes.byref(counters), counters.cb)
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
    windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
    return int(status.available)
