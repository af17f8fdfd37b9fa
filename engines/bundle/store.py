"""Bundles on disk: written whole or not at all, and checked before anything in them is used."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from t2v_rt.engines.bundle.manifest import FileEntry, Manifest, from_plain
from t2v_rt.errors import BundleError
from t2v_rt.system.outputs import MANIFEST_NAME, check_place
from t2v_rt.system.user_cache import UserCache

CHUNK = 1 << 20


@dataclass(frozen=True)
class Identity:
    """What tells one file from another without reading it."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, path: str) -> Identity | None:
        """That of a file, of what it points to where it is a link; None where there is none."""
        try:
            status = os.stat(path)  # of some files at each stage of a call, and a Path costs more
        except OSError:
            return None
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder, its checked manifest, and which files were checked.

    Files are read when they are needed, which may be long after the opening, and are held against what was opened each
    time. One that is another file by then is hashed again: equal content will do, as after an identical build.
    """

    folder: Path
    manifest: Manifest
    _opened: dict[str, Identity | None] = field(default_factory=dict, compare=False, repr=False)

    def __reduce__(self) -> tuple[Callable[[Path, str], Bundle], tuple[Path, str]]:
        return reopen_bundle, (self.folder, self.manifest.bundle_id)

    def component_files(self, name: str) -> tuple[str, ...]:
        """The files of a component, its self-test's answers too."""
        return tuple(path for path in self.manifest.files if path.startswith((f"{name}/", f"self_test/{name}.")))

    def note(self, path: str) -> None:
        """Notes which file is there; to be called before its content is checked."""
        self._opened[path] = Identity.of(os.path.join(self.folder, path))

    def check(self, paths: Sequence[str]) -> None:
        """Refuses files that are not those that were opened, before they are read.

        Args:
            paths: inside the bundle.

        Raises:
            BundleError: one is gone, or its content is another.
        """
        for path in paths:
            known, found = self._opened.get(path), Identity.of(os.path.join(self.folder, path))
            if found is not None and found == known:
                continue
            try:
                check_file(self, path)
            except (BundleError, OSError) as exc:
                raise BundleError(
                    f"{self.folder}: {path} is not the file that was opened; the bundle was replaced or removed since "
                    "it was opened; open it again"
                ) from exc
            self._opened[path] = found

    def check_loaded(self, paths: Sequence[str]) -> None:
        """Refuses files that were changed in place; loaded engines may have mapped them.

        A file that was replaced or removed as a whole stays what it was for those who have mapped it.

        Args:
            paths: inside the bundle.

        Raises:
            BundleError: the content of one is another.
        """
        for path in paths:
            known, found = self._opened.get(path), Identity.of(os.path.join(self.folder, path))
            replaced = known is not None and found is not None and known.inode != found.inode
            if found is not None and not replaced:
                self.check([path])

    @contextmanager
    def held(self, paths: Sequence[str]) -> Iterator[None]:
        """Refuses files that are not those that were opened, before they are read in the block, and after it.

        Raises:
            BundleError: one is gone, or its content is another.
        """
        self.check(paths)
        try:
            yield
        finally:  # also where reading failed, for this says why
            self.check(paths)


def open_bundle(folder: str | Path) -> Bundle:
    """Opens a bundle and checks every file against the manifest.

    Hashing is done once per file: a stamp in the user's cache (path, size, times) makes later openings quick.

    Args:
        folder: the directory that build-engines wrote.

    Returns:
        The opened bundle.

    Raises:
        BundleError: no bundle there, a damaged, edited or newer manifest, a path that leaves the bundle, or a file that
            is missing or not the one that was built.
    """
    folder = Path(folder).absolute()  # what is opened stays the same when the process goes elsewhere
    bundle = Bundle(folder, read_manifest(folder))
    stamps = Stamps(folder)
    for path in bundle.manifest.files:
        bundle.note(path)
        check_file(bundle, path, stamps)
    stamps.save()
    return bundle


def reopen_bundle(folder: Path, bundle_id: str) -> Bundle:
    """Opens a bundle that was opened before, perhaps by another process.

    Raises:
        BundleError: it cannot be opened, or is another one by now.
    """
    bundle = open_bundle(folder)
    if bundle.manifest.bundle_id != bundle_id:
        raise BundleError(
            f"{folder} is bundle {bundle.manifest.bundle_id} now, and was {bundle_id}; it was replaced: open it anew "
            "with from_pretrained"
        )
    return bundle


def check_manifest(bundle: Bundle) -> None:
    """Refuses a bundle whose manifest is not the one that was opened; raises BundleError."""
    reopened = read_manifest(bundle.folder)
    if reopened.bundle_id != bundle.manifest.bundle_id:
        raise BundleError(f"{bundle.folder} was replaced since it was opened; open it again")


def check_file(bundle: Bundle, path: str, stamps: Stamps | None = None) -> FileEntry:
    """Checks one file of a bundle against the manifest.

    Args:
        bundle: whose file it is.
        path: inside it.
        stamps: of the bundle; None for those of the user's cache.

    Returns:
        What the manifest says of the file.

    Raises:
        BundleError: it is missing, leaves the bundle, or is not the one that was built.
    """
    folder, entry, file = bundle.folder, bundle.manifest.files[path], bundle.folder / path
    if not file.is_file():
        raise BundleError(f"{folder}: {path} is missing; build the bundle again")
    if not _stays(folder.resolve(), file.resolve()):
        raise BundleError(f"{folder}: {path} is a link that leaves the bundle; do not use a bundle like this")
    if file.stat().st_size != entry.bytes or (stamps or Stamps(folder)).sha256(path) != entry.sha256:
        raise BundleError(f"{folder}: {path} is not the file that was built (its hash differs); build it again")
    return entry


def _stays(folder: Path, file: Path) -> bool:
    """Whether a file is in a bundle's folder or, where that is a snapshot of huggingface_hub's cache, one of its blobs.

    Those of a repository lie in `blobs` beside its `snapshots`, or in a store that the repositories of a cache share.
    """
    if file.is_relative_to(folder):
        return True
    repository = next((place.parent for place in (folder, *folder.parents) if place.name == "snapshots"), None)
    if repository is None:
        return False
    own, shared = ((place / "blobs").resolve() for place in (repository, repository.parent))
    return file.parent == own or (file.parent.parent == shared and file.name.startswith(file.parent.name))


def read_manifest(folder: Path) -> Manifest:
    """Reads and checks `bundle.json` alone; raises BundleError where it is missing, damaged, edited or newer."""
    path = folder / MANIFEST_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(f"{folder}: no {MANIFEST_NAME} there; expected a bundle written by build-engines") from None
    except (OSError, ValueError) as exc:
        raise BundleError(f"{path} cannot be read ({exc}); build the bundle again") from exc
    return Manifest.from_json(content)


def check_bundle_place(path: str | Path) -> Path:
    """Checks that a bundle can be written to a folder, without a look at what an older bundle there holds.

    Returns:
        The path that is to be written, see `check_place`.

    Raises:
        RequestError: it cannot be written.
        BundleError: something other than a bundle is there.
    """
    target = check_place(path, stat.S_IFDIR, "a bundle")
    if target.is_dir() and not (target / MANIFEST_NAME).is_file() and any(target.iterdir()):
        raise BundleError(f"{path} exists and is not a bundle; give another output folder, or remove it")
    return target


def check_replaceable(folder: Path) -> None:
    """Refuses a folder that holds anything but an older bundle: it would be lost with it.

    Raises:
        BundleError: it has files that its manifest does not name, or a manifest that cannot be read.
    """
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    try:
        known = {MANIFEST_NAME, *json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))["files"]}
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise BundleError(f"{folder} has no {MANIFEST_NAME} that can be read; remove it, or choose another") from exc
    for file in sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()):
        if file.relative_to(folder).as_posix() not in known:
            raise BundleError(f"{folder} holds {file.name}, which is not of the bundle and would be lost; move it away")


def write_manifest(folder: Path, manifest: Manifest, known: Mapping[str, FileEntry] | None = None) -> Manifest:
    """Writes the manifest with the size and hash of every file of the folder.

    Args:
        folder: of the bundle.
        manifest: without files.
        known: path -> size and hash of files that were hashed already.

    Returns:
        The manifest as written.
    """
    files: dict[str, FileEntry] = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        path = file.relative_to(folder).as_posix()
        files[path] = (known or {}).get(path) or FileEntry(hash_file(file), file.stat().st_size)
    complete = replace(manifest, files=files)
    text = json.dumps(complete.to_json(), indent=1, ensure_ascii=False)
    (folder / MANIFEST_NAME).write_text(text + "\n", encoding="utf-8", newline="\n")
    return complete


def hash_file(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """The sha256 of a file, as hexadecimal text; `progress` is called with the bytes of each chunk."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
            if progress is not None:
                progress(len(chunk))
    return digest.hexdigest()


class Stamp(NamedTuple):
    """The hash of a file, and what it was then."""

    size: int
    mtime_ns: int
    ctime_ns: int
    sha256: str

    @classmethod
    def of(cls, file: Path, digest: str) -> Stamp:
        """That of a file that is there."""
        status = file.stat()
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, digest)


class Stamps:
    """Hashes of a folder's files, remembered in the user's cache for as long as size and times stay the same.

    Args:
        folder: whose files are hashed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._name = f"{hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]}.json"
        self._cache = UserCache("hashes")
        self._known = self._load()
        self._new: dict[str, Stamp] = {}

    def _load(self) -> dict[str, Stamp]:
        try:
            return from_plain(json.loads(self._cache.get(self._name) or b"{}"), dict[str, Stamp])
        except ValueError:
            return {}  # an unreadable stamp: everything is hashed

    def sha256(self, path: str) -> str:
        """The sha256 of a file of the folder, from the stamp where size and times still agree."""
        file, known = self._folder / path, self._known.get(path)
        if known is None or known != Stamp.of(file, known.sha256):
            before = Stamp.of(file, "")  # not after it: a change in between would be taken for what was hashed
            known = before._replace(sha256=hash_file(file))
        self._new[path] = known
        return known.sha256

    def note(self, path: str, digest: str) -> None:
        """Takes over the hash of a file that this process has just written."""
        self._new[path] = Stamp.of(self._folder / path, digest)

    def save(self) -> None:
        """Writes the stamp; a cache that cannot be written only costs the next opening its time."""
        if self._new == self._known:
            return
        self._cache.put(self._name, json.dumps(self._new).encode())
