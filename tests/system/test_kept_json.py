"""What is kept as JSON and read back: a value of another type than was written is of no use, and is not believed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from t2v_rt import RequestError
from t2v_rt.build.work_folder import WorkFolder
from t2v_rt.cli import main
from t2v_rt.engines.bundle.store import Stamps, read_manifest
from t2v_rt.runtime.array_file import save_arrays
from t2v_rt.runtime.prompts.file import load_prompt
from tests.conftest import Tiny

Change = Callable[[dict[str, Any]], object]
SIZE = {"height": 32, "width": 32, "num_frames": 5}


# -- stamps of hashes --


@pytest.fixture
def stamped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A folder with a file, and the stamp that says another hash of it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").write_bytes(b"content")
    stamps = Stamps(folder)
    stamps.note("file", "noted")
    stamps.save()
    (stamp,) = (tmp_path / "cache" / "t2v-rt" / "hashes").iterdir()
    return folder, stamp


def test_a_stamp_is_believed_as_long_as_size_and_times_agree(stamped: tuple[Path, Path]) -> None:
    folder, stamp = stamped
    before = stamp.read_bytes()
    stamps = Stamps(folder)
    assert stamps.sha256("file") == "noted"
    stamps.save()
    assert stamp.read_bytes() == before
    (folder / "file").write_bytes(b"another content")
    assert len(Stamps(folder).sha256("file")) == 64


@pytest.mark.parametrize(
    "change",
    [
        lambda stamp: stamp["file"].append(1),
        lambda stamp: stamp["file"].pop(),
        lambda stamp: stamp["file"].__setitem__(0, str(stamp["file"][0])),
        lambda stamp: stamp["file"].__setitem__(1, float(stamp["file"][1])),
        lambda stamp: stamp["file"].__setitem__(3, 12),
        lambda stamp: stamp["file"].__setitem__(3, None),
        lambda stamp: stamp.__setitem__("file", "noted"),
        lambda stamp: stamp.__setitem__("other", None),
    ],
)
def test_a_stamp_of_other_types_is_not(stamped: tuple[Path, Path], change: Change) -> None:
    folder, stamp = stamped
    content = json.loads(stamp.read_text())
    change(content)
    stamp.write_text(json.dumps(content))
    assert len(Stamps(folder).sha256("file")) == 64


# -- notes of a build --


def finished(place: Path) -> WorkFolder:
    work = WorkFolder(place, "a build")

    def make() -> dict[str, int]:
        (work.bundle / "file").write_bytes(b"content")
        return {"made": 1}

    work.part("a part", make)
    return work


def test_a_finished_part_is_found_again(tmp_path: Path) -> None:
    finished(tmp_path / "work")
    again = WorkFolder(tmp_path / "work", "a build")
    assert again.part("a part", lambda: pytest.fail("made again")) == {"made": 1}
    assert again.finished_bytes == len(b"content")


@pytest.mark.parametrize(
    "change",
    [
        lambda note: note.__setitem__("name", 5),
        lambda note: note.__setitem__("name", "another part"),
        lambda note: note.__setitem__("fingerprint", None),
        lambda note: note.__setitem__("result", ["made"]),
        lambda note: note.pop("result"),
        lambda note: note["files"]["file"].__setitem__("bytes", "7"),
        lambda note: note["files"]["file"].pop("sha256"),
    ],
)
def test_a_note_of_other_types_vouches_for_nothing(tmp_path: Path, change: Change) -> None:
    work = finished(tmp_path / "work")
    note = work.place / "parts" / "a part.json"
    content = json.loads(note.read_text())
    change(content)
    note.write_text(json.dumps(content))
    again = WorkFolder(tmp_path / "work", "a build")
    assert again.finished_bytes == 0
    assert again.part("a part", lambda: {"made": 2}) == {"made": 2}
    assert not (again.bundle / "file").exists()


# -- files of arrays --


@pytest.mark.parametrize("settings", [{"prompt": 5}, {"negative_prompt": None}, {"encoder_id": ["x"]}])
def test_texts_of_a_prompt_file_that_are_no_texts_are_refused(
    narrow: Tiny, tmp_path: Path, settings: dict[str, Any]
) -> None:
    manifest = read_manifest(narrow.bundle)
    array = np.zeros((1, manifest.model.text.dim), np.float32)
    told = {"encoder_id": manifest.encoder_id, "prompt": "a ball", "negative_prompt": "", **settings}
    arrays = {"prompt_embeds": array, "negative_prompt_embeds": array}
    save_arrays(tmp_path / "p.npz", "prompt embeddings", arrays, told)
    (name,) = settings
    with pytest.raises(RequestError, match=rf"no prompt embeddings can be read \(Expected `str`.+{name}`\); make them"):
        load_prompt(tmp_path / "p.npz", manifest)


@pytest.mark.parametrize("settings", [{"height": "32"}, {"width": 32.5}, {"num_frames": None}, {"height": [32]}])
def test_sizes_of_latents_that_are_no_numbers_are_refused(
    narrow: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any]
) -> None:
    manifest = read_manifest(narrow.bundle)
    latents = np.zeros(manifest.model.latent_shape(1, 32, 32, 5), np.float32)
    save_arrays(tmp_path / "l.npz", "latents", {"latents": latents}, {**SIZE, **settings})
    command = ["generate", "--engines", str(narrow.bundle), "--from-latents", str(tmp_path / "l.npz")]
    assert main([*command, "--output", str(tmp_path / "out.npy")]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert "are not this model's" in printed
    assert not (tmp_path / "out.npy").exists()
