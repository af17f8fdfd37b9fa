"""What killed runs leave behind goes with the next run; what a living one works on stays."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from t2v_rt.runtime.array_file import save_arrays
from t2v_rt.runtime.video import open_writer
from t2v_rt.system import temporaries
from t2v_rt.system.files import remove_abandoned
from t2v_rt.system.temporaries import ASIDE, UNFINISHED, is_running, temporary_sibling

LONG = "n" * 60
ELSEWHERE = 4_000_000_000  # no system gives out such process numbers
KILLED = """
import os, signal, sys
from t2v_rt.runtime.video import open_writer
import numpy as np
writer = open_writer(sys.argv[1], fps=8, width=16, height=16, num_frames=2, metadata={})
writer.__enter__()
writer.write(np.zeros((16, 16, 3), np.uint8))
print("writing", flush=True)
sys.stdin.read()
os.kill(os.getpid(), signal.SIGKILL)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(path: Path) -> None:
    with open_writer(path, fps=8, width=16, height=16, num_frames=1, metadata={}) as writer:
        writer.write(np.zeros((16, 16, 3), np.uint8))


def made_by(
    process: int, target: Path, monkeypatch: pytest.MonkeyPatch, kind: str = UNFINISHED, *, here: str | None = None
) -> Path:
    """What a process of that number would have left beside a target."""
    with monkeypatch.context() as patch:
        patch.setattr(temporaries, "_own", "0" * 8)
        patch.setattr(os, "getpid", lambda: process)
        if here is not None:
            patch.setattr(temporaries, "_here", lambda: here)
        path = temporary_sibling(target, kind)
    path.write_text(f"of {process}")
    return path


@pytest.mark.skipif(os.name != "posix", reason="sends SIGKILL")
@pytest.mark.parametrize("name", ["a.mp4", "frames"])
def test_a_killed_run_is_cleaned_up_after_by_the_next_and_no_sooner(tmp_path: Path, name: str) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / name)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        (left,) = names(tmp_path)
        write(tmp_path / name)  # another process writes the same name meanwhile
        assert left in names(tmp_path)
        process.communicate()
    assert process.returncode == -9
    assert left in names(tmp_path)
    write(tmp_path / name)
    assert names(tmp_path) == sorted({name, *(["frames.json"] if name == "frames" else [])})


def test_whose_process_has_ended_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.npz", f"{LONG}.npz"):
        target = tmp_path / name
        dead = made_by(ELSEWHERE, target, monkeypatch)
        alive = made_by(os.getppid(), target, monkeypatch)
        earlier = made_by(os.getpid(), target, monkeypatch)  # the same number again, as in a container it always is
        own = temporary_sibling(target)
        own.touch()
        remove_abandoned(target)
        assert names(tmp_path) == sorted((alive.name, own.name))
        assert not dead.exists()
        assert not earlier.exists()
        save_arrays(target, "latents", {"latents": np.zeros(3)}, {})
        assert names(tmp_path) == sorted((alive.name, own.name, name))
        for path in (alive, own, target):
            path.unlink()


def test_what_is_from_elsewhere_goes_only_after_a_long_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a.npz"
    new, old = (made_by(ELSEWHERE, target, monkeypatch, here="another container") for _ in range(2))
    aside = made_by(ELSEWHERE, target, monkeypatch, ASIDE, here="another container")
    for path in (old, aside):
        os.utime(path, (1, 1))
    remove_abandoned(target)
    assert names(tmp_path) == sorted((new.name, aside.name))


def test_only_what_belongs_to_the_target_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = [made_by(ELSEWHERE, tmp_path / name, monkeypatch) for name in ("b.npz", "a.npz.x", f"{LONG}1", f"{LONG}2")]
    for name in (".a.npz.tmp", ".a.npz.12-0.tmp", "a.npz.00000000.4000000000-000000000.tmp", ".a.npz.0.1-2.old"):
        kept.append(tmp_path / name)
        kept[-1].touch()
    for target in ("a.npz", LONG, "x" * 50):
        remove_abandoned(tmp_path / target)
    assert names(tmp_path) == sorted(path.name for path in kept)


def test_what_was_put_aside_comes_back_where_nothing_took_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "frames"
    made_by(ELSEWHERE, target, monkeypatch, ASIDE)
    remove_abandoned(target)
    assert names(tmp_path) == ["frames"]
    assert target.read_text() == f"of {ELSEWHERE}"
    made_by(ELSEWHERE, target, monkeypatch, ASIDE)
    target.write_text("new")
    remove_abandoned(target)
    assert names(tmp_path) == ["frames"]
    assert target.read_text() == "new"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only the administrator gives files away")
def test_what_is_another_users_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = made_by(ELSEWHERE, tmp_path / "a", monkeypatch)
    os.chown(theirs, 12345, 12345)
    remove_abandoned(tmp_path / "a")
    assert names(tmp_path) == [theirs.name]


def test_processes() -> None:
    assert is_running(os.getpid())
    assert is_running(os.getppid())
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    assert not is_running(process.pid)
    assert not is_running(ELSEWHERE)
