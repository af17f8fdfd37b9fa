"""The user's cache: what can be made again, kept in private files. Where there is none, it is made again each time."""

from __future__ import annotations

import logging
import os
import stat
import sys
from contextlib import suppress
from pathlib import Path

from t2v_rt.system.files import is_private, writing

logger = logging.getLogger(__name__)
PRIVATE = stat.S_IRWXU
ADVICE = "set XDG_CACHE_HOME to a folder of your own" if sys.platform == "linux" else "make it a folder of your own"

_told: set[str] = set()  # what was said already: once a process is enough


def cache_folder() -> Path | None:
    """The user's folder for what can be made again; None where this user has none, which is told once.

    Nobody else may own it or write to it: what it says is believed. It need not exist.
    """
    folder = _place()
    reason = "this user has no home directory" if folder is None else _objection(folder)
    if reason:
        _tell(reason)
        return None
    return folder


class UserCache:
    """Entries of one kind; reading and writing never fail, they only find and keep nothing.

    Args:
        kind: name of their folder in the cache.
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind

    @property
    def folder(self) -> Path | None:
        """Where the entries are; None without a cache."""
        root = cache_folder()
        return None if root is None else root / self._kind

    def path(self, name: str) -> Path | None:
        """Where an entry is, or would be; None without a cache."""
        folder = self.folder
        return None if folder is None else folder / name

    def has(self, name: str) -> bool:
        """Whether there is an entry."""
        path = self.path(name)
        return path is not None and path.is_file()

    def get(self, name: str) -> bytes | None:
        """An entry's content, or None."""
        path = self.path(name)
        try:
            return None if path is None else path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as exc:
            logger.info("%s is not used: %s", path, exc)
            return None

    def touch(self, name: str) -> None:
        """Makes an entry the one used last."""
        path = self.path(name)
        if path is not None:
            with suppress(OSError):
                os.utime(path)

    def put(self, name: str, content: bytes) -> bool:
        """Keeps an entry, whole or not at all; returns whether it is kept. Why not is told once."""
        path = self.path(name)
        if path is None:
            return False
        try:
            path.parent.parent.parent.mkdir(parents=True, exist_ok=True)
            for folder in (path.parent.parent, path.parent):
                folder.mkdir(mode=PRIVATE, exist_ok=True)
            with writing(path, private=True) as stream:
                stream.write(content)
        except OSError as exc:
            _tell(f"nothing can be kept in {path.parent.parent} ({exc.strerror or exc})")
            return False
        return True

    def prune(self, most_bytes: int) -> None:
        """Removes the entries used longest ago until the rest take no more than `most_bytes`."""
        folder = self.folder
        if folder is None:
            return
        with suppress(OSError):
            found = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
            entries = sorted((entry.stat().st_mtime_ns, entry.stat().st_size, entry) for entry in found)
            total = sum(size for _, size, _ in entries)
            for _, size, entry in entries:
                if total <= most_bytes:
                    break
                entry.unlink(missing_ok=True)
                total -= size


def _place() -> Path | None:
    from platformdirs import user_cache_path  # here, as importing the pipeline should not pay for it

    given = [os.environ.get("XDG_CACHE_HOME", ""), os.environ.get("HOME", os.sep)]
    if sys.platform != "win32" and not any(map(os.path.isabs, given)):  # else the home of another than HOME were taken
        return None
    try:
        place = user_cache_path("t2v-rt", appauthor=False, opinion=False)
    except (RuntimeError, KeyError, OSError):  # neither a variable nor an entry among the users says it
        return None
    return place if place.is_absolute() else None


def _objection(folder: Path) -> str:
    """Why a folder is no cache, or nothing."""
    try:
        if not stat.S_ISDIR(folder.stat().st_mode):
            return f"{folder} is not a folder"
        if not is_private(folder.resolve()):
            return f"{folder} is another user's, or others may write to it"
    except FileNotFoundError:  # it is made when something is kept
        return ""
    except OSError as exc:  # above it is a file, or a folder that may not be read
        return f"{folder} cannot be read ({exc.strerror})"
    return ""


def _tell(reason: str) -> None:
    if reason not in _told:
        _told.add(reason)
        logger.warning("%s: going on without a cache; %s to have one", reason, ADVICE)
