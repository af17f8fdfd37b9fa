"""What may be written to: decided here for every output of every command, before any work.

Only a regular file, or a folder that the caller knows as its own, is ever replaced. A symbolic link is written through:
what it points to is replaced, beside which the temporary file lies.
"""

from __future__ import annotations

import os
import stat
import sys
import unicodedata
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path

from t2v_rt.errors import RequestError
from t2v_rt.system.files import check_writable_parent

KINDS = {
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a folder",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}
MANIFEST_NAME = "bundle.json"  # a folder with it is a bundle
RESERVED = frozenset(["con", "prn", "aux", "nul", *(f"{port}{i}" for port in ("com", "lpt") for i in range(1, 10))])


def check_file(path: str | Path, suffix: str, what: str) -> Path:
    """Checks that a file can be written.

    Args:
        path: of the file; one that is there will be replaced.
        suffix: that its content has, such as `.png`.
        what: it is, named in errors, such as "a contact sheet".

    Returns:
        The absolute path that is to be written: of a link, its target.

    Raises:
        RequestError: another suffix, something there that is no regular file or must not be written, or a folder in
            which nothing can be created.
    """
    text = os.fspath(path)
    if Path(text).suffix.lower() != suffix or text.endswith(tuple(filter(None, (os.sep, os.altsep)))):
        raise RequestError(f"{text!r} is not the name of {what}; give one that ends in {suffix}")
    return check_place(path, stat.S_IFREG, f"{what} to be replaced")


def check_place(path: str | Path, kind: int, expected: str) -> Path:
    """Checks that a file or folder can be written, whatever its name.

    Args:
        path: of it.
        kind: `stat.S_IFREG` for a file, `stat.S_IFDIR` for a folder.
        expected: what may be there already, named in errors.

    Returns:
        As `check_file`.

    Raises:
        RequestError: as `check_file`.
    """
    text = os.fspath(path)
    _check_name(text)
    try:
        target = Path(os.path.realpath(text))
    except (OSError, ValueError) as exc:
        raise RequestError(f"{text!r} cannot be the name of a file ({exc}); choose another") from exc
    if os.path.lexists(text) and not os.path.exists(text):
        raise RequestError(
            f"{text} is a link to {target}, which is not there; create that, or give a path without link"
        )
    check_writable_parent(target)
    if not os.path.lexists(target):
        return target
    if kind == stat.S_IFREG and target.suffix.lower() != Path(text).suffix.lower():
        raise RequestError(f"{text} is a link to {target}, whose name ends otherwise; give the path itself")
    found = stat.S_IFMT(target.stat().st_mode)
    named = text if target.name == Path(text).name else f"{text}, a link to {target},"
    if found != kind:
        raise RequestError(f"{named} is {KINDS.get(found, 'no file')} and not {expected}; choose another name")
    if _is_mounted(target):
        raise RequestError(
            f"{named} is mounted there by itself and cannot be replaced; mount its folder, or write inside"
        )
    if kind == stat.S_IFREG and not os.access(target, os.W_OK):
        raise RequestError(f"{named} is write-protected; choose another name, or allow it to be written")
    return target


def check_apart(outputs: Mapping[str, Path], inputs: Mapping[str, str | Path | None]) -> None:
    """Refuses outputs of one command that would overwrite one another, or what the command reads.

    Args:
        outputs: name -> path that is to be written, as `check_file` returned it.
        inputs: name -> file or folder that is read; None for one that is not given.

    Raises:
        RequestError: two outputs are one file, on this disk or on one that takes upper and lower case, or two spellings
            of a letter, for the same; one lies inside another; one is an input, holds one, or lies in a bundle that is
            one.
    """
    for (name, path), (other_name, other) in combinations(outputs.items(), 2):
        if _same(path, other):
            raise RequestError(f"{name} and {other_name} are the same file, {path}; give each a name of its own")
        for (outer_name, outer), (inner_name, inner) in (
            ((name, path), (other_name, other)),
            ((other_name, other), (name, path)),
        ):
            if any(_same(outer, parent) for parent in inner.parents):
                raise RequestError(f"{inner_name} lies in {outer_name}, the folder {outer}; choose a place outside it")
    for given, source in inputs.items():
        if source is None or not os.path.exists(source):
            continue
        read = Path(os.path.realpath(source))
        for name, path in outputs.items():
            if any(_same(path, place) for place in (read, *read.parents)):
                raise RequestError(f"{name} would replace {read}, which {given} reads; choose another name")
            if any(_same(read, parent) for parent in path.parents) and (read / MANIFEST_NAME).is_file():
                raise RequestError(
                    f"{name} lies in the bundle {read}, which a build replaces; choose a place outside it"
                )


def _check_name(text: str) -> None:
    name = Path(text).name
    if text == "-":
        raise RequestError("'-' is not the name of an output, and none goes to standard output; give a name")
    if name in ("", ".."):
        raise RequestError(f"{text!r} is no name of its own; give one, such as out.mp4")
    if name != name.strip():
        raise RequestError(f"{text!r} begins or ends with white space; leave it out of the name")
    if sys.platform == "win32" and (name.partition(".")[0].strip().lower() in RESERVED or name.endswith(".")):
        raise RequestError(f"{text!r} cannot be the name of a file on Windows; choose another")


def _is_mounted(path: Path) -> bool:
    """Whether a file or folder is a place where something is mounted; a container's single files may be."""
    if os.path.ismount(path):
        return True
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:  # another system than Linux
        return False
    escaped = str(path)
    for character in "\\ \t\n":
        escaped = escaped.replace(character, f"\\{ord(character):03o}")
    return any(line.split()[4] == escaped for line in lines)


def _same(one: Path, other: Path) -> bool:
    """Whether two paths are, or would be, one file; the paths' folders exist."""
    try:
        if os.path.samefile(one, other):
            return True
    except OSError:  # one of them is not there
        pass
    try:
        return _folded(one.name) == _folded(other.name) and os.path.samefile(one.parent, other.parent)
    except OSError:
        return False


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
