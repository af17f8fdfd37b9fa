"""Bundles on disk: written whole or not at all, and checked before anything in them is used."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from t2v_rt.engines import platform
from t2v_rt.engines.manifest import MANIFEST_NAME, FileEntry, Manifest
from t2v_rt.errors import BundleError

logger = logging.getLogger(__name__)
CHUNK = 1 << 20


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder and its checked manifest."""

    folder: Path
    manifest: Manifest


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
    folder = Path(folder)
    bundle = Bundle(folder, read_manifest(folder))
    stamps = Stamps(folder)
    for path in bundle.manifest.files:
        check_file(bundle, path, stamps)
    stamps.save()
    return bundle


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


class Stamps:
    """Hashes of a folder's files, remembered in the user's cache for as long as size and times stay the same.

    Args:
        folder: whose files are hashed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:32]
        self._file = platform.cache_dir() / "hashes" / f"{name}.json"
        self._known: Mapping[str, object] = self._load()
        self._new: dict[str, list[object]] = {}

    def _load(self) -> Mapping[str, object]:
        try:
            content = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}  # no stamp yet, or an unreadable one: everything is hashed
        return content if isinstance(content, dict) else {}

    def sha256(self, path: str) -> str:
        """The sha256 of a file of the folder, from the stamp where size and times still agree."""
        file = self._folder / path
        status = file.stat()
        times = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
        known = self._known.get(path)
        digest = known[3] if isinstance(known, list) and len(known) == 4 and known[:3] == times else hash_file(file)
        self._new[path] = [*times, digest]
        return str(digest)

    def note(self, path: str, digest: str) -> None:
        """Takes over the hash of a file that this process has just written."""
        status = (self._folder / path).stat()
        self._new[path] = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, digest]

    def save(self) -> None:
        """Writes the stamp; a cache that cannot be written only costs the next opening its time."""
        if self._new == self._known:
            return
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            temporary = platform.temporary_sibling(self._file)
            temporary.write_text(json.dumps(self._new), encoding="utf-8")
            platform.replace_file(temporary, self._file)
        except OSError as exc:
            logger.info("hashes are not remembered: %s", exc)
