"""Users without a home directory, and caches that cannot be used: everything works, and why is told once."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from t2v_rt import TextToVideoPipeline
from t2v_rt.engines.bundle.store import Stamps
from t2v_rt.engines.bundle.trust import built_here, remember_built
from t2v_rt.system import user_cache
from t2v_rt.system.user_cache import UserCache, cache_folder
from tests.conftest import Tiny

linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the cache is found by other variables")


@pytest.fixture(autouse=True)
def nothing_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_cache, "_told", set())


def _no_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 3_999_999)  # no user has it


def _relative_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", "relative")


def _a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "t2v-rt").touch()


def _below_a_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "file"))


def _others_may_write(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "t2v-rt").mkdir()
    (folder / "t2v-rt").chmod(0o777)


def _another_users(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "t2v-rt").mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: 3_999_999)


def _nothing_can_be_made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/cache")  # where the administrator can make nothing either


def _full(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("t2v_rt.system.files.create_private", refuse)


CASES: dict[str, tuple[Callable[[Path, pytest.MonkeyPatch], None], str]] = {
    "no home": (_no_home, "this user has no home directory"),
    "a relative home": (_relative_home, "this user has no home directory"),
    "a file": (_a_file, "is not a folder"),
    "below a file": (_below_a_file, "cannot be read (Not a directory)"),
    "others may write": (_others_may_write, "another user's, or others may write to it"),
    "another user's": (_another_users, "another user's, or others may write to it"),
    "nothing can be made": (_nothing_can_be_made, "nothing can be kept in /proc/cache/t2v-rt"),
    "a full disk": (_full, "(No space left on device)"),
}


@linux
@pytest.mark.parametrize("name", list(CASES))
def test_it_goes_on_without_a_cache_and_says_so_once(
    narrow: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    spoil, reason = CASES[name]
    spoil(tmp_path, monkeypatch)
    for _ in range(2):
        pipe = TextToVideoPipeline.from_pretrained(narrow.bundle)
        assert pipe.encode_prompt(["a red ball"]).any()
    (line,) = [record.getMessage() for record in caplog.records]
    assert reason in line
    assert "going on without a cache; set XDG_CACHE_HOME" in line
    assert not [path for path in tmp_path.rglob("*") if path.name not in ("t2v-rt", "file") and path.is_file()]


@linux
def test_what_others_could_have_written_is_not_believed(
    narrow: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    remember_built(narrow.bundle)
    stamps = Stamps(tmp_path)
    stamps.note("t2v-rt", "a hash")
    stamps.save()
    assert built_here(narrow.bundle)
    assert Stamps(tmp_path)._known
    (tmp_path / "t2v-rt").chmod(0o770)
    assert not built_here(narrow.bundle)
    assert not Stamps(tmp_path)._known


def test_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        "WIN_PD_OVERRIDE_LOCAL_APPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME", str(tmp_path / "a" / "b")
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    entries = UserCache("kind")
    assert entries.get("x") is None
    assert not entries.has("x")
    umask = os.umask(0o002)  # of systems where each user has a group of his own
    try:
        assert entries.put("x", b"one")
    finally:
        os.umask(umask)
    assert entries.put("x", b"two")
    assert entries.get("x") == b"two"
    assert entries.has("x")
    root, folder, path = cache_folder(), entries.folder, entries.path("x")
    assert root is not None
    assert folder is not None
    assert path is not None
    if os.name == "posix":
        assert [stat.S_IMODE(place.stat().st_mode) for place in (root, folder, path)] == [0o700, 0o700, 0o600]
    entries.touch("none")
    entries.put("y", b"12")
    os.utime(path, (1, 1))
    entries.prune(4)
    assert entries.get("x") is None
    assert entries.get("y") == b"12"
