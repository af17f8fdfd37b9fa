"""What differs between systems: files and folders that take their place whole, memory readings, the cache."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from t2v_rt.benchmarks.process_tree import measure, tree_memory
from t2v_rt.errors import RequestError
from t2v_rt.system import cgroups, files, resources
from t2v_rt.system.resources import available_memory_bytes
from t2v_rt.system.user_cache import cache_folder

READING_TOLERANCE = 0.2  # of a peak: what the system's own counting may be late by


def folder(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "file").write_text(text)
    return path


def names(path: Path) -> list[str]:
    return sorted(item.name for item in path.iterdir())


def test_temporary_siblings_are_hidden_beside_and_unlike(tmp_path: Path) -> None:
    target = tmp_path / "out.mp4"
    first, second = files.temporary_sibling(target), files.temporary_sibling(target)
    assert first != second
    assert first.parent == second.parent == tmp_path
    assert first.name.startswith(".out.mp4.")
    files.temporary_sibling(tmp_path / ("长" * 85)).touch()  # 255 bytes, the longest name there can be


def test_a_file_takes_its_place(tmp_path: Path) -> None:
    for text in ("one", "two"):
        (tmp_path / "new").write_text(text)
        files.replace_file(tmp_path / "new", tmp_path / "file")
        assert (tmp_path / "file").read_text() == text
    assert names(tmp_path) == ["file"]


def test_a_folder_takes_its_place(tmp_path: Path) -> None:
    for text in ("one", "two"):
        files.replace_directory(folder(tmp_path / "new", text), tmp_path / "folder")
        assert (tmp_path / "folder/file").read_text() == text
    assert names(tmp_path) == ["folder"]


class Renames:
    """Stands in for Path.replace and fails at chosen calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failing: dict[int, type[BaseException]]) -> None:
        self.calls = 0
        self.failing = failing
        self.replace = Path.replace
        monkeypatch.setattr(Path, "replace", lambda *paths: self(*paths))  # noqa: PLW0108  objects do not bind
        monkeypatch.setattr(files, "PAUSE", 0.0)

    def __call__(self, source: Path, target: Path) -> Path:
        self.calls += 1
        if self.calls in self.failing:
            raise self.failing[self.calls]
        return self.replace(source, target)


def test_a_file_held_for_a_moment_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "new").write_text("new")
    renames = Renames(monkeypatch, {1: PermissionError, 2: PermissionError})
    files.replace_file(tmp_path / "new", tmp_path / "file")
    assert renames.calls == 3
    assert names(tmp_path) == ["file"]


def test_a_file_held_for_good_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "new").write_text("new")
    Renames(monkeypatch, dict.fromkeys(range(1, 100), PermissionError))
    with pytest.raises(PermissionError):
        files.replace_file(tmp_path / "new", tmp_path / "file")
    assert names(tmp_path) == ["new"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("call", [1, 2])
def test_an_old_folder_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int, error: type[BaseException]
) -> None:
    old, new = folder(tmp_path / "old", "old"), folder(tmp_path / "new", "new")
    Renames(monkeypatch, {call: error})
    with pytest.raises(error):
        files.replace_directory(new, old)
    assert (old / "file").read_text() == "old"
    assert names(tmp_path) == ["new", "old"]


@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_all_take_their_places_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    pairs = [(tmp_path / f"new-{name}", tmp_path / name) for name in ("a", "b")]
    for temporary, target in pairs:
        temporary.write_text("new")
        target.write_text("old")
    before = names(tmp_path)
    with monkeypatch.context() as patch:
        Renames(patch, {call: OSError})
        with pytest.raises(OSError):
            files.replace_together(pairs)
    assert names(tmp_path) == before
    assert {target.read_text() for _, target in pairs} == {"old"}
    files.replace_together(pairs)
    assert names(tmp_path) == ["a", "b"]
    assert {target.read_text() for _, target in pairs} == {"new"}


def test_trees_are_removed(tmp_path: Path) -> None:
    kept = folder(tmp_path / "kept", "kept")
    tree = folder(tmp_path / "tree", "gone")
    (tree / "file").chmod(0o400)
    folder(tree / "deeper", "gone").chmod(0o500)
    files.remove_tree(tree)
    files.remove_tree(tree)
    files.remove_tree(kept / "file" / "below a file")
    (tmp_path / "file").touch()
    files.remove_tree(tmp_path / "file")
    if sys.platform != "win32":
        (tmp_path / "link").symlink_to(kept)
        files.remove_tree(tmp_path / "link")
    assert names(tmp_path) == ["kept"]
    assert names(kept) == ["file"]


def test_what_cannot_be_removed_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError("in use")

    monkeypatch.setattr(files, "PAUSE", 0.0)
    monkeypatch.setattr("shutil.rmtree", refuse)
    files.remove_tree(folder(tmp_path / "held", "held"))
    assert "could not be removed: in use" in caplog.text


def test_parents_that_cannot_be_written(tmp_path: Path) -> None:
    files.check_writable_parent(tmp_path / "out")
    assert not names(tmp_path)
    (tmp_path / "file").touch()
    refused = [(tmp_path / "none/out", "none does not exist"), (tmp_path / "file/out", "a file has that name")]
    refused += [(tmp_path / ("n" * 300), "cannot be the name"), (tmp_path / "a\0b", "cannot be the name")]
    if sys.platform == "linux":  # a file system where nothing can be created, whoever asks
        refused.append((Path("/proc/out"), "not writable"))
    for path, message in refused:
        with pytest.raises(RequestError, match=message) as caught:
            files.check_writable_parent(path)
        assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["file"]


def test_the_cache_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variable = {"win32": "WIN_PD_OVERRIDE_LOCAL_APPDATA", "darwin": "HOME"}.get(sys.platform, "XDG_CACHE_HOME")
    monkeypatch.setenv(variable, str(tmp_path))
    folder = cache_folder()
    assert folder is not None
    assert folder.is_relative_to(tmp_path)
    assert folder.name == "t2v-rt"
    if sys.platform == "linux":
        monkeypatch.setenv("HOME", str(tmp_path))
        for value in ("", "relative"):
            monkeypatch.setenv(variable, value)
            assert cache_folder() == tmp_path / ".cache/t2v-rt"


# In a process of its own: what other tests took would count.
PEAKS = """
import sys
import numpy as np
from t2v_rt.system.resources import peak_rss_bytes
print(peak_rss_bytes())
array = np.ones(int(sys.argv[1]), np.uint8)
print(peak_rss_bytes())
del array
print(peak_rss_bytes())
"""


def test_the_peak_of_memory_grows_and_stays() -> None:
    size = 300_000_000
    done = subprocess.run([sys.executable, "-c", PEAKS, str(size)], capture_output=True, text=True, check=True)
    before, peak, after = map(int, done.stdout.split())
    assert 0 < before < peak
    assert peak >= size * (1 - READING_TOLERANCE)
    assert after >= peak * (1 - READING_TOLERANCE)  # Linux counts in batches per core


def test_what_is_free(tmp_path: Path) -> None:
    assert files.free_disk_bytes(tmp_path / "not/there/yet") > 0
    assert available_memory_bytes() > 0


def test_memory_groups(tmp_path: Path) -> None:
    root, own = tmp_path / "cgroup", tmp_path / "own"

    def group(path: str, limit: str, used: int, cache: int, version: int = 2) -> None:
        place = root / path
        place.mkdir(parents=True, exist_ok=True)
        files = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        (place / files[0]).write_text(f"{limit}\n")
        (place / files[1]).write_text(f"{used}\n")
        (place / "memory.stat").write_text(f"anon 1\n{'' if version == 2 else 'total_'}inactive_file {cache}\n")

    def room(text: str) -> int | None:
        own.write_text(text)
        return cgroups.memory_room(root, own)

    assert cgroups.memory_room(root, own) is None  # another kind of system
    assert room("0::/\n") is None
    group("a/b", "max", 10, 0)
    assert room("0::/a/b\n") is None
    group("a", "1000", 300, 100)
    assert room("0::/a/b\n") == 800  # a limit further up counts, and pages that are given up on demand do not
    group("a/b", "500", 600, 0)
    assert room("0::/a/b\n") == 0
    assert room("0::/../other\n") is None
    group("memory", "700", 100, 0, version=1)  # a container's own group, mounted as the root
    assert room("5:cpu:/x\n4:memory,hugetlb:/docker/abc\n0::/\n") == 600


@pytest.mark.skipif(sys.platform != "linux", reason="holds the reading of other systems against Linux's own")
def test_other_systems_are_asked_through_psutil(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "memory_room", lambda: None)
    expected = available_memory_bytes()
    monkeypatch.setattr(resources, "sys", SimpleNamespace(platform="darwin"))
    assert available_memory_bytes() == pytest.approx(expected, rel=READING_TOLERANCE)


# Holds memory, and has a child that holds as much; both until they are told to end.
HOLDERS = """
import subprocess, sys
import numpy as np
array = np.ones(int(sys.argv[1]), np.uint8)
if len(sys.argv) > 2:
    subprocess.run([sys.executable, "-c", sys.argv[2], sys.argv[1]], check=True)
else:
    print("held", flush=True)
    sys.stdin.read()
"""


def test_memory_of_a_process_tree_counts_those_it_starts() -> None:
    size, pipe = 100_000_000, subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", HOLDERS, str(size), HOLDERS], stdin=pipe, stdout=pipe)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == b"held"
        resident, anonymous = tree_memory(psutil.Process(process.pid))
        process.communicate()
    assert anonymous >= 2 * size * (1 - READING_TOLERANCE)
    assert resident >= anonymous
    with suppress(psutil.NoSuchProcess):  # it has ended
        assert tree_memory(psutil.Process(process.pid)) == (0, 0)


def test_a_command_and_its_folder_are_measured(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    found = measure([sys.executable, "-c", ""], tmp_path)
    assert found["peak_rss_bytes"] >= found["peak_anonymous_bytes"]
    assert found["peak_disk_bytes"] == 5
    with pytest.raises(RequestError, match="ended with exit code 3"):
        measure([sys.executable, "-c", "raise SystemExit(3)"], tmp_path)
