"""The work folder of a build: finished parts stay in it, so that a build that was ended goes on where it was.

It lies beside the output under a name of its own. Each finished part has a note there, with the build's fingerprint and
the hash of every file; what no note vouches for is removed before the work goes on. One build at a time has it.
"""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t2v_rt.engines.bundle.manifest import FileEntry, from_plain, to_plain
from t2v_rt.engines.bundle.store import check_bundle_place, check_replaceable, hash_file
from t2v_rt.errors import CheckpointError, RequestError
from t2v_rt.system.files import (
    is_private,
    lasting_sibling,
    locked,
    remove_abandoned,
    remove_tree,
    replace_directory,
    writing,
)

logger = logging.getLogger(__name__)
CONTINUES = "finished parts are kept, the same command goes on from there"
FULL = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))
Result = Mapping[str, Any]


@dataclass(frozen=True)
class Note:
    """What is kept of a finished part.

    Args:
        fingerprint: of the build.
        name: of the part.
        files: its own, by their paths in the bundle.
        result: what there is to say of it, as JSON.
    """

    fingerprint: str
    name: str
    files: Mapping[str, FileEntry]
    result: Result


class WorkFolder:
    """A work folder that this process has locked.

    Args:
        place: the folder; made where it is not there.
        fingerprint: of the build; parts of another are removed.
    """

    def __init__(self, place: Path, fingerprint: str) -> None:
        self.place, self._fingerprint = place, fingerprint
        self.bundle, self.scratch, self._notes = place / "bundle", place / "scratch", place / "parts"
        self._parts: dict[str, Result] = {}
        self.files: dict[str, FileEntry] = {}
        if not is_private(place):  # what another could have written is not built upon
            remove_tree(place)
        place.mkdir(mode=0o700, exist_ok=True)
        for folder in (self.bundle, self._notes):
            folder.mkdir(exist_ok=True)
        for note in sorted(self._notes.iterdir()):
            self._take(note)
        self.clean()

    @property
    def finished_bytes(self) -> int:
        """Bytes of the files of all finished parts."""
        return sum(entry.bytes for entry in self.files.values())

    def part(self, name: str, make: Callable[[], Result]) -> Result:
        """A part of the bundle, made now or found finished.

        Args:
            name: of the part.
            make: writes its files into `bundle`, new ones only, and returns what there is to say of it, as JSON. It
                may use `scratch`, which is empty and is emptied again.

        Returns:
            What `make` returned, now or then.
        """
        if name in self._parts:
            return self._parts[name]
        self.scratch.mkdir()
        result = make()
        remove_tree(self.scratch)
        files = {path: _entry(self.bundle / path) for path in self._listed() if path not in self.files}
        note = to_plain(Note(self._fingerprint, name, files, result))
        with writing(self._notes / f"{name}.json") as stream:
            stream.write(json.dumps(note).encode())
        self.files.update(files)
        self._parts[name] = result
        return result

    def clean(self) -> bool:
        """Removes what belongs to no finished part; returns whether there is one."""
        remove_tree(self.scratch)
        for path in self._listed():
            if path not in self.files:
                remove_tree(self.bundle / path)
        for folder in sorted((path for path in self.bundle.rglob("*") if path.is_dir()), reverse=True):
            if not any(folder.iterdir()):
                folder.rmdir()
        return bool(self._parts)

    def _listed(self) -> list[str]:
        return sorted(path.relative_to(self.bundle).as_posix() for path in self.bundle.rglob("*") if path.is_file())

    def _take(self, file: Path) -> None:
        """Takes over a part of an earlier build if it is one of this, to the last byte."""
        try:
            note = from_plain(json.loads(file.read_bytes()), Note)
            same = note.fingerprint == self._fingerprint and file.name == f"{note.name}.json"
            if same and all(_entry(self.bundle / path) == entry for path, entry in note.files.items()):
                self._parts[note.name] = note.result
                self.files.update(note.files)
                return
        except (OSError, ValueError) as exc:
            logger.info("%s is of no use: %s", file, exc)
        remove_tree(file)


def _entry(file: Path) -> FileEntry:
    return FileEntry(hash_file(file), file.stat().st_size)


@contextmanager
def open_work_folder(target: Path, fingerprint: str, *, fresh: bool = False) -> Iterator[WorkFolder]:
    """The work folder of a bundle; what is in its `bundle` takes the place of `target` when the block ends well.

    After an error or an interruption, finished parts stay for the next build of this fingerprint; nothing stays where
    none is finished, or where the checkpoint is at fault.

    Args:
        target: where the bundle is to be; an older one there stays untouched until the new one is complete.
        fingerprint: of all that goes into the build.
        fresh: whether parts of an earlier build are removed.

    Raises:
        RequestError: the parent folder is missing or not writable, the disk is full, or the same output is being built.
        BundleError: something other than a bundle is there already, or something beside its files.
    """
    target = check_bundle_place(target)
    check_replaceable(target)
    remove_abandoned(target)
    place = lasting_sibling(target)
    with locked(place.with_name(f"{place.name}.lock"), f"{target} is being built by another process"):
        if fresh:
            remove_tree(place)
        work = WorkFolder(place, fingerprint)
        try:
            yield work
            replace_directory(work.bundle, target)
        except BaseException as exc:
            kept = work.clean() and not isinstance(exc, CheckpointError)
            if not kept:
                remove_tree(place)
            if isinstance(exc, OSError) and exc.errno in FULL:
                raise RequestError(
                    f"{target}: the disk is full ({exc.strerror}); make room" + (f"; {CONTINUES}" if kept else "")
                ) from exc
            if kept:
                exc.add_note(CONTINUES)
            raise
        remove_tree(place)
