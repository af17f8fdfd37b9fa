"""What the control groups of a container, version 1 or 2, still allow this process: memory, processors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

MOUNTED, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")  # the groups, and which of them are this process's


def memory_room(root: Path = MOUNTED, own: Path = OWN) -> int | None:
    """Bytes that this process's groups still allow, or None without a limit.

    Args:
        root: where the groups are mounted.
        own: the file that names this process's groups.
    """
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }
    rooms = (_memory_room(group, *names[version]) for version, group in _groups(root, own, "memory"))
    return min((room for room in rooms if room is not None), default=None)


def processor_quota(root: Path = MOUNTED, own: Path = OWN) -> float | None:
    """Processors' worth of time that this process's groups allow, or None without a limit."""
    read = {1: _quota_of_version_1, 2: _quota_of_version_2}
    quotas = (read[version](group) for version, group in _groups(root, own, "cpu"))
    return min((quota for quota in quotas if quota is not None), default=None)


def _groups(root: Path, own: Path, controller: str) -> Iterator[tuple[int, Path]]:
    """Version and folder of this process's groups, each with all that it lies in."""
    try:
        lines = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for _, controllers, name in (line.split(":", 2) for line in lines):
        if controllers == "":
            version, bases = 2, {root}
        elif controller in controllers.split(","):
            version, bases = 1, {root / controller, root / controllers}  # "cpu" is a link to "cpu,cpuacct" on most
        else:
            continue
        # A container may see its own group mounted at the root, so the root counts as well as every group below it.
        parts = [part for part in PurePosixPath(name).parts if part not in ("/", "..")]
        for base in bases:
            yield from ((version, base.joinpath(*parts[:depth])) for depth in range(len(parts) + 1))


def _memory_room(group: Path, limit_name: str, used_name: str, cache_name: str) -> int | None:
    try:
        limit = (group / limit_name).read_text(encoding="ascii").strip()
        if limit == "max":
            return None
        used = int((group / used_name).read_text(encoding="ascii"))
        counters = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
        # file pages that were not touched lately count as used, yet they are given up on demand
        return max(0, int(limit) - used + int(counters.get(cache_name, 0)))
    except (OSError, ValueError):
        return None


def _quota_of_version_1(group: Path) -> float | None:
    try:
        quota = int((group / "cpu.cfs_quota_us").read_text(encoding="ascii"))
        return quota / int((group / "cpu.cfs_period_us").read_text(encoding="ascii")) if quota > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _quota_of_version_2(group: Path) -> float | None:
    try:
        quota, period = (group / "cpu.max").read_text(encoding="ascii").split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None
