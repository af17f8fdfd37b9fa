"""Locks of builds: one holder at a time, an error in one line for the others, nothing left behind."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from t2v_rt.errors import InputError, RequestError
from t2v_rt.system import files
from t2v_rt.system.files import locked

HOLDER = """
import sys
from pathlib import Path
from t2v_rt.system.files import locked
with locked(Path(sys.argv[1]), "it is held"):
    print("held", flush=True)
    sys.stdin.read()
"""
# Reads and writes again under the lock, which every turn makes and removes: an overlap would lose a count.
COUNTER = """
import sys
from pathlib import Path
from t2v_rt.errors import RequestError
from t2v_rt.system.files import locked
lock, counter, turns = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
while turns:
    try:
        with locked(lock, "it is held"):
            count = int(counter.read_text())
            counter.write_text(str(count + 1))
            turns -= 1
    except RequestError:
        pass
"""
PROCESSES, TURNS = 3, 60


def test_another_process_is_refused_until_the_holder_ends_however_it_ends(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdin is not None
    assert holder.stdout is not None
    assert holder.stdout.readline().strip() == b"held"
    with pytest.raises(RequestError, match=r"^it is held; wait for it to end$"), locked(lock, "it is held"):
        raise AssertionError("two have it")
    assert lock.exists()
    holder.kill()
    holder.communicate()
    with locked(lock, "it is held"):
        assert lock.exists()
    assert not list(tmp_path.iterdir())


def test_another_thread_is_refused_too(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"

    def take() -> str:
        try:
            with locked(lock, "it is held"):
                return "taken"
        except RequestError as exc:
            return str(exc)

    with ThreadPoolExecutor(1) as pool:
        with locked(lock, "it is held"):
            assert pool.submit(take).result() == "it is held; wait for it to end"
        assert pool.submit(take).result() == "taken"
    assert not list(tmp_path.iterdir())


def test_it_is_given_back_after_an_error(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), locked(tmp_path / ".lock", "it is held"):
            raise KeyboardInterrupt
        assert not list(tmp_path.iterdir())


def test_no_two_have_it_at_a_time_though_each_removes_its_file(tmp_path: Path) -> None:
    counter = tmp_path / "counter"
    counter.write_text("0")
    command = [sys.executable, "-c", COUNTER, str(tmp_path / ".lock"), str(counter), str(TURNS)]
    counting = [subprocess.Popen(command) for _ in range(PROCESSES)]
    assert [process.wait() for process in counting] == [0] * PROCESSES
    assert int(counter.read_text()) == PROCESSES * TURNS
    assert [path.name for path in tmp_path.iterdir()] == ["counter"]


def test_without_the_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "filelock", None)
    with (
        pytest.raises(InputError, match=r"needs the package 'filelock'; install t2v-rt\[build\]"),
        locked(tmp_path / ".lock", "it is held"),
    ):
        raise AssertionError("it needs filelock")


# -- files that take their place whole --


@pytest.mark.parametrize("private", [False, True])
def test_a_file_takes_its_place_when_the_block_ends_well(tmp_path: Path, private: bool) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")
    with pytest.raises(TypeError), files.writing(target, private=private) as stream:
        stream.writelines([b"ne", None])  # type: ignore[list-item]
    assert target.read_bytes() == b"old"
    with files.writing(target, private=private) as stream:
        stream.write(b"new")
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    if sys.platform != "win32":
        assert bool(target.stat().st_mode & 0o077) != private
