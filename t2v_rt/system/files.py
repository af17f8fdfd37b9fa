"""Files and folders: replaced whole or not at all, removed, locked and named, on Linux, Windows and macOS alike."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from t2v_rt.errors import InputError, RequestError
from t2v_rt.system.temporaries import ASIDE, NAME_KEPT, abandoned_siblings, temporary_sibling

__all__ = ["temporary_sibling"]

logger = logging.getLogger(__name__)
LOCK_SECONDS = 0.2  # a lock that its last holder has just removed is there at the next try
TRIES = 10  # on Windows a virus scanner or an indexer may hold a new file for a moment
PAUSE = 0.05  # seconds before the first retry, growing with each: 2.3 in all


def lasting_sibling(path: Path) -> Path:
    """A hidden name beside `path`, the same each time; nothing is created."""
    digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:8]  # long names may begin alike
    return path.parent / f".{path.name[:NAME_KEPT]}.{digest}.building"


def is_private(path: Path) -> bool:
    """Whether a file or folder is this user's and nobody else may write it; also where there is none.

    On Windows it has the rights of its folder, which in a user's own folders are the user's.
    """
    if not os.path.lexists(path) or sys.platform == "win32":
        return True
    status = path.lstat()
    others = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return status.st_uid == os.geteuid() and not others and not stat.S_ISLNK(status.st_mode)


@contextmanager
def locked(path: Path, reason: str) -> Iterator[None]:
    """Holds a lock that ends with this process, however that ends; for builds, whose extra brings what it takes.

    Args:
        path: of the lock file, which is removed afterwards.
        reason: what it means that another process, or thread, holds it.

    Raises:
        RequestError: it is held already.
        InputError: filelock is not installed.
    """
    try:
        from filelock import FileLock, Timeout
    except ImportError as exc:
        raise InputError(f"building engines needs the package {exc.name!r}; install t2v-rt[build]") from exc
    try:
        lock = FileLock(path).acquire(timeout=LOCK_SECONDS, poll_interval=LOCK_SECONDS / TRIES)
    except Timeout as exc:
        raise RequestError(f"{reason}; wait for it to end") from exc
    with lock:
        try:
            yield
        finally:
            # While it is held, nobody else can take it, and who has opened it already opens another. On Windows, where
            # an open file cannot be removed, filelock does it afterwards.
            if sys.platform != "win32":
                path.unlink(missing_ok=True)


@contextmanager
def writing(target: Path, *, private: bool = False) -> Iterator[BinaryIO]:
    """A file that takes the place of `target` when the block ends well, and else goes: whole or not at all.

    Args:
        target: its final name; an older file there stays untouched until then.
        private: whether only its owner may read it, see `create_private`.

    Yields:
        The file, opened for writing.

    Raises:
        OSError: the system refuses, also after short retries.
    """
    remove_abandoned(target)
    temporary = temporary_sibling(target)
    try:
        with create_private(temporary) if private else temporary.open("xb") as stream:
            yield stream
        replace_file(temporary, target)
    finally:
        remove_tree(temporary)


def remove_abandoned(target: Path) -> None:
    """Removes what killed processes left unfinished beside a target, and puts back what they had put aside from it."""
    for sibling, kind in abandoned_siblings(target):
        if kind == ASIDE and not os.path.lexists(target):
            _retry_rename(sibling, target)
        else:
            remove_tree(sibling)


def replace_file(temporary: Path, target: Path) -> None:
    """Puts a finished file in its place in one step, over an older one.

    Args:
        temporary: the finished file, on the same disk.
        target: its final name.

    Raises:
        OSError: the system refuses, also after short retries; the older file is then untouched.
    """
    _retry_rename(temporary, target)


def replace_directory(temporary: Path, target: Path) -> None:
    """Puts a finished folder in its place; an older one is moved aside first and put back if that fails.

    Args:
        temporary: the finished folder, on the same disk.
        target: its final name.

    Raises:
        OSError: the system refuses, also after short retries; both folders are then where they were.
    """
    replace_together([(temporary, target)])


def replace_together(pairs: Sequence[tuple[Path, Path]]) -> None:
    """Puts finished files or folders in their places, all of them or none.

    Args:
        pairs: (temporary, target) of each, in order.

    Raises:
        OSError: the system refuses, also after short retries; everything is then where it was.
    """
    moves: list[tuple[Path, Path]] = []  # (from, to), noted before each so that an interruption can be undone too
    asides = [temporary_sibling(target, ASIDE) for _, target in pairs]
    try:
        for (temporary, target), aside in zip(pairs, asides, strict=True):
            if os.path.lexists(target):
                moves.append((target, aside))
                _retry_rename(target, aside)
            moves.append((temporary, target))
            _retry_rename(temporary, target)
    except BaseException:
        for source, moved in reversed(moves):
            if os.path.lexists(moved) and not os.path.lexists(source):
                _retry_rename(moved, source)
        raise
    for aside in asides:
        remove_tree(aside)


def _retry_rename(source: Path, target: Path) -> None:
    for attempt in range(TRIES):
        try:
            source.replace(target)
            return
        except PermissionError:
            if attempt == TRIES - 1:
                raise
            time.sleep(PAUSE * (attempt + 1))


def remove_tree(path: Path) -> None:
    """Removes a file, or a folder with all it holds; nothing happens where there is none.

    It never raises, as it cleans up after other errors: what cannot be removed is logged.

    Args:
        path: a link is removed itself, never what it points to.
    """
    for attempt in range(TRIES):
        if not os.path.lexists(path):
            return
        try:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
            return
        except OSError as exc:
            if attempt == TRIES - 1:
                logger.warning("%s could not be removed: %s", path, exc)
                return
            _make_removable(path)
            time.sleep(PAUSE * attempt)


def _make_removable(path: Path) -> None:
    """Windows keeps files that are marked read-only, Linux what lies in folders that are."""
    for item in (path, *path.rglob("*")):
        with suppress(OSError):
            if not item.is_symlink():
                item.chmod(stat.S_IRWXU)


def create_private(path: Path) -> BinaryIO:
    """Creates a file that only its owner may read, and opens it for writing.

    On Windows a file has the rights of its folder, which in a user's own folders are the user's.

    Args:
        path: of the file.

    Raises:
        FileExistsError: something is there already.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    return os.fdopen(os.open(path, flags, stat.S_IRUSR | stat.S_IWUSR), "wb")


def check_writable_parent(path: Path) -> None:
    """Refuses a path in whose folder nothing can be created.

    A file is really created and removed: permission bits do not tell for an administrator or on a read-only disk.

    Args:
        path: of what is to be written; it need not exist.

    Raises:
        RequestError: the folder is missing, is a file, or cannot be written, or the name itself is impossible.
    """
    parent = path.absolute().parent
    try:
        if not parent.is_dir():
            reason = " (a file has that name)" if parent.exists() else ""
            raise RequestError(f"{path}: the folder {parent} does not exist{reason}; create it first")
        probe = temporary_sibling(parent / "probe")
        try:
            probe.touch(exist_ok=False)
        finally:
            probe.unlink(missing_ok=True)
    except OSError as exc:
        raise RequestError(f"{path}: the folder {parent} is not writable ({exc.strerror}); choose another") from exc
    try:
        path.lstat()
    except FileNotFoundError:
        return
    except (OSError, ValueError) as exc:  # a name that is too long, or has characters that no name may have
        raise RequestError(f"{str(path)!r} cannot be the name of a file ({exc}); choose another") from exc


def native_name(path: Path) -> str:
    """A path as native libraries take it, in UTF-8, also where the locale made escapes of its bytes.

    Raises:
        RequestError: its bytes are not UTF-8.
    """
    try:
        return os.fsencode(path).decode()
    except UnicodeDecodeError as exc:
        raise RequestError(f"{path} is not UTF-8, and engines are not loaded from such a place; rename it") from exc


def is_terminal(stream: object) -> bool:
    """Whether a stream shows what is written to a person; not where there is none, or it cannot say."""
    try:
        return bool(stream.isatty())  # type: ignore[attr-defined]
    except (AttributeError, ValueError, OSError):  # no stream, none of Python's own, or a closed one
        return False


def free_disk_bytes(path: Path) -> int:
    """Free bytes on the disk of a file or folder, or of the nearest folder above it that exists already."""
    place = path.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free
