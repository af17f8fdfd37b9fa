"""Names of what is not finished yet, or about to go; and which of them nobody will finish any more.

They lie beside their target, and carry its key, the process that made them, and where that process is: in a container
or on another machine that has the same disk, the same number means another process.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import platform as python_platform
import re
import secrets
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

NAME_KEPT = 40  # characters of a name that its siblings repeat; names end at 255 bytes
UNFINISHED, ASIDE = "tmp", "old"
FOREIGN_SECONDS = 7 * 86_400.0  # untouched for so long, what another machine began is not going on: no video takes that

_own, _numbers = secrets.token_hex(4), itertools.count()
_begun: deque[Path] = deque(maxlen=64)  # named in this process last; a command writes fewer at a time


def temporary_sibling(path: Path, kind: str = UNFINISHED) -> Path:
    """A hidden name beside `path` that nothing else uses; nothing is created.

    Args:
        path: of the target.
        kind: `UNFINISHED`, or `ASIDE` for the old target while the new one takes its place.
    """
    process = f"{os.getpid()}-{_own}{next(_numbers)}"
    sibling = path.parent / f".{path.name[:NAME_KEPT]}.{_key(path)}.{process}.{kind}"
    if kind == UNFINISHED:
        _begun.append(sibling)
    return sibling


def remove_unfinished() -> None:
    """Removes what this process has begun and not finished, as far as it can: for one that ends right after it."""
    for sibling in list(_begun):
        if sibling.is_dir() and not sibling.is_symlink():
            shutil.rmtree(sibling, ignore_errors=True)
        else:
            with suppress(OSError):  # finished, never begun, or open on a system that keeps it then
                sibling.unlink()


def abandoned_siblings(path: Path) -> Iterator[tuple[Path, str]]:
    """Temporary siblings of a target, with their kind, whose process has ended; only those that are the user's own.

    Where that cannot be known, because the process is or was on another machine or in another container, nothing that
    was touched within a week is among them, and nothing that was put aside.
    """
    pattern = re.compile(
        rf"\.{re.escape(path.name[:NAME_KEPT])}\.([0-9a-f]{{8}})\.(\d+)-([0-9a-f]{{8}})\d+\.({UNFINISHED}|{ASIDE})"
    )
    for name in sorted(os.listdir(path.parent)):
        found = pattern.fullmatch(name)
        if found is None:
            continue
        key, process, token, kind = found.groups()
        sibling = path.parent / name
        with suppress(OSError):  # gone meanwhile
            status = sibling.lstat()
            if sys.platform != "win32" and status.st_uid != os.geteuid():
                continue
            if key != _key(path):
                ended = kind == UNFINISHED and time.time() - status.st_mtime > FOREIGN_SECONDS
            elif int(process) == os.getpid():
                ended = token != _own  # of an earlier process with this number, as all have it in some containers
            else:
                ended = not is_running(int(process))
            if ended:
                yield sibling, kind


def is_running(process: int) -> bool:
    """Whether there is a process of that number here; it may be another one than it was."""
    if sys.platform == "win32":
        import psutil

        return bool(psutil.pid_exists(process))
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _key(path: Path) -> str:
    """Of a target's whole name, for long ones may begin alike, and of where this process is."""
    return hashlib.sha256(os.fsencode(path.name) + b"\0" + _here().encode()).hexdigest()[:8]


@cache
def _here() -> str:
    """Another text wherever the same process number may be another process that runs at the same time."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    return python_platform.node()
