"""Builds that are ended and go on: what stays, what is trusted of it, and who may build."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from t2v_rt import CheckpointError, RequestError, build_engines
from t2v_rt.build.work_folder import CONTINUES, WorkFolder, open_work_folder
from t2v_rt.cli import main
from t2v_rt.commands.bars import Bars
from t2v_rt.system.files import lasting_sibling
from tests.conftest import Tiny
from tests.support.processes import start_and_meet

DISK = """
import resource, signal, sys
from t2v_rt.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
sys.exit(main(sys.argv[2:]))
"""


class Stop:
    """Ends a build when it begins a step; keeps the steps it saw."""

    def __init__(self, at: str = "", error: BaseException | None = None) -> None:
        self.at, self.error, self.steps = at, error or KeyboardInterrupt(), []  # type: ignore[var-annotated]

    def __call__(self, step: str, done: int, total: int) -> None:
        self.steps.append(step)
        if step == self.at:
            raise self.error


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def data(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "bundle.json"}


def ended(narrow: Tiny, output: Path, at: str = "vae_decoder") -> Path:
    """Begins a build and ends it; returns its work folder."""
    with pytest.raises(KeyboardInterrupt) as caught:
        build_engines(narrow.checkpoint, output, progress=Stop(at))
    assert caught.value.__notes__ == [CONTINUES]
    assert not output.exists()
    work = lasting_sibling(output)
    assert hidden(output.parent) == [work.name]
    return work


@pytest.mark.parametrize(("at", "finished"), [("self_test", 1), ("transformer", 1), ("vae_decoder", 2), ("hash", 4)])
def test_finished_parts_are_not_made_again(narrow: Tiny, tmp_path: Path, at: str, finished: int) -> None:
    work = ended(narrow, tmp_path / "b", at)
    kept = {path.relative_to(work / "bundle"): path.stat().st_mtime_ns for path in (work / "bundle").rglob("*.data")}
    assert len(kept) == finished  # the files of weights, the embedding's last
    bundle = build_engines(narrow.checkpoint, tmp_path / "b")
    for path, time_ns in kept.items():
        assert (bundle.folder / path).stat().st_mtime_ns == time_ns
    assert bundle.manifest.bundle_id == build_engines(narrow.checkpoint, tmp_path / "whole").manifest.bundle_id
    assert data(bundle.folder) == data(tmp_path / "whole")
    assert not hidden(tmp_path)


def test_what_was_changed_meanwhile_is_made_again(narrow: Tiny, tmp_path: Path) -> None:
    work = ended(narrow, tmp_path / "b")
    weights = work / "bundle" / "transformer" / "weights.data"
    changed = bytearray(weights.read_bytes())
    changed[100] ^= 1
    weights.write_bytes(changed)
    (work / "bundle" / "vae_decoder").mkdir(exist_ok=True)
    (work / "bundle" / "vae_decoder" / "weights.data").write_bytes(b"half-written")
    (work / "bundle" / "stray").write_text("of nobody")
    bundle = build_engines(narrow.checkpoint, tmp_path / "b")
    assert data(bundle.folder) == data(narrow.bundle)


def test_parts_of_another_build_are_of_no_use(narrow: Tiny, tmp_path: Path) -> None:
    work = ended(narrow, tmp_path / "b")
    halves = build_engines(narrow.checkpoint, tmp_path / "b", precision="fp16")
    assert halves.manifest.precision == "fp16"
    assert data(halves.folder) != data(narrow.bundle)
    assert not work.exists()
    ended(narrow, tmp_path / "c")
    seen = Stop()
    build_engines(narrow.checkpoint, tmp_path / "c", force=True, progress=seen)
    assert not hidden(tmp_path)


def test_damaged_notes_are_of_no_use(narrow: Tiny, tmp_path: Path) -> None:
    work = ended(narrow, tmp_path / "b")
    notes = sorted((work / "parts").iterdir())
    names = ["self_test.text_encoder", "self_test.transformer", "text_encoder.blocks_0", "transformer.model"]
    assert [note.name for note in notes] == [f"{name}.json" for name in names]
    notes[2].write_text("{")
    notes[3].write_text("[]")
    assert data(build_engines(narrow.checkpoint, tmp_path / "b").folder) == data(narrow.bundle)


@pytest.mark.skipif(os.name != "posix", reason="rights of files are Unix's")
def test_a_work_folder_that_others_can_write_is_not_built_upon(tmp_path: Path) -> None:
    for spoil in ("open", "link"):
        target = tmp_path / spoil
        place = lasting_sibling(target)
        WorkFolder(place, "same").part("a", lambda: {})
        assert WorkFolder(place, "same").clean()
        if spoil == "open":
            place.chmod(0o777)
        else:
            place.rename(tmp_path / "elsewhere")
            place.symlink_to(tmp_path / "elsewhere")
        assert not WorkFolder(place, "same").clean()
    assert (tmp_path / "elsewhere").is_dir()  # a link is removed, not what it names


def test_two_builds_of_one_output(narrow: Tiny, tmp_path: Path) -> None:
    with open_work_folder(tmp_path / "b", "another") as other:
        (other.bundle / "file").write_text("theirs")
        with pytest.raises(RequestError, match="is being built by another process; wait for it"):
            build_engines(narrow.checkpoint, tmp_path / "b")
        assert (other.bundle / "file").is_file()
        build_engines(narrow.checkpoint, tmp_path / "c")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "c"]


@pytest.mark.skipif(os.name != "posix", reason="sends SIGKILL")
def test_a_killed_build_goes_on(narrow: Tiny, tmp_path: Path) -> None:
    command = ["build-engines", str(narrow.checkpoint), "--output", str(tmp_path / "b")]
    with start_and_meet(*command, at="transformer") as process:
        process.kill()
    assert process.returncode == -signal.SIGKILL
    notes = lasting_sibling(tmp_path / "b") / "parts"
    assert not (tmp_path / "b").exists()
    first = (notes / "text_encoder.blocks_0.json").stat().st_mtime_ns
    seen: list[int] = []

    def watch(step: str, done: int, total: int) -> None:
        if step == "hash":
            seen.append((notes / "text_encoder.blocks_0.json").stat().st_mtime_ns)

    assert data(build_engines(narrow.checkpoint, tmp_path / "b", progress=watch).folder) == data(narrow.bundle)
    assert seen == [first]
    assert not hidden(tmp_path)


def test_the_command_says_that_it_goes_on(
    narrow: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: Bars, stage: str, done: int, total: int, *, detail: str = "") -> None:
        if detail == "transformer":
            raise KeyboardInterrupt

    monkeypatch.setattr(Bars, "update", interrupt)
    assert main(["build-engines", str(narrow.checkpoint), "--output", str(tmp_path / "b")]) == 130
    assert capsys.readouterr().err == f"t2v-rt: interrupted; {CONTINUES}\n"


def test_a_checkpoint_at_fault_leaves_nothing(narrow: Tiny, tmp_path: Path) -> None:
    stop = Stop("vae_decoder", CheckpointError("a damaged tensor"))
    with pytest.raises(CheckpointError, match="a damaged tensor"):
        build_engines(narrow.checkpoint, tmp_path / "b", progress=stop)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="limits of a process are Unix's")
@pytest.mark.parametrize(
    ("backend", "limit"), [("onnxruntime", 100_000), pytest.param("tensorrt-rtx", 3_000_000, marks=pytest.mark.slow)]
)
def test_a_full_disk(narrow: Tiny, tmp_path: Path, backend: str, limit: int) -> None:
    """Files end at a limit in bytes that the text encoder's stay below; of the plans, the denoiser's is beyond it."""
    if backend == "tensorrt-rtx":
        pytest.importorskip("tensorrt_rtx", reason="needs t2v-rt[tensorrt-rtx]")
    checkpoint = narrow.checkpoint
    command = ["build-engines", str(checkpoint), "--output", str(tmp_path / "b"), "--backend", backend]
    done = subprocess.run(
        [sys.executable, "-c", DISK, str(limit), *command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1
    assert "the disk is full" in lines[0]
    assert not (tmp_path / "b").exists()
    build_engines(checkpoint, tmp_path / "b", backend=backend)
    assert not hidden(tmp_path)
