"""The self-test of a bundle, the verify command, and the doctor."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path

import numpy as np
import pytest

from t2v_rt import BundleError, build_engines
from t2v_rt.cli import main
from t2v_rt.doctor import examine, find_gpus, read_gpus
from t2v_rt.engines.bundle import read_manifest, write_manifest
from t2v_rt.engines.manifest import MANIFEST_NAME
from t2v_rt.runtime import self_test
from t2v_rt.verify import verify
from tests.conftest import Tiny

CARD = "NVIDIA GeForce RTX 3060 Ti, 566.14, 8.6, 8192, 7011\n"


def sign_again(folder: Path) -> None:
    """Hashes a changed bundle into its manifest, as its builder would have."""
    manifest = read_manifest(folder)
    (folder / MANIFEST_NAME).unlink()
    write_manifest(folder, manifest)


def test_every_component_gives_its_reference(tiny: Tiny) -> None:
    report = verify(tiny.bundle)
    assert report["passed"]
    assert set(report["components"]) == {"text_encoder", "transformer", "vae_decoder"}


def test_half_precision_is_held_against_float32(narrow: Tiny, tmp_path: Path) -> None:
    bundle = build_engines(narrow.checkpoint, tmp_path / "half", precision="fp16")
    report = verify(bundle.folder)
    assert report["passed"]
    assert all(0 < item["error"] <= 1e-2 for item in report["components"].values())
    assert not (bundle.folder / "reference").exists()


def test_an_engine_that_computes_something_else_fails(
    narrow: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(narrow.bundle, folder)
    path = folder / self_test.FOLDER / "transformer.npz"
    with np.load(path) as stored:
        answers = {key: stored[key] * np.float32(1.01) for key in stored.files}
    np.savez(path, **answers)
    sign_again(folder)
    assert main(["verify", str(folder)]) == 1
    printed = capsys.readouterr()
    assert "transformer  FAILED" in printed.out
    assert printed.err.count("\n") == 1
    assert "does not give the answers of its reference" in printed.err


def test_a_bundle_without_answers_says_so(narrow: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(narrow.bundle, folder)
    shutil.rmtree(folder / self_test.FOLDER)
    sign_again(folder)
    with pytest.raises(BundleError, match="carries no self-test of text_encoder"):
        verify(folder)


def test_verify_prints_one_object(narrow: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(narrow.bundle), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["passed"] is True


def test_the_doctor_looks_at_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["backends"]["onnxruntime"]["usable"]
    assert report["libraries"]["numpy"] == np.__version__
    assert report["memory_bytes"] > 0
    assert set(report) == set(examine())
    for backend in report["backends"].values():
        assert backend["usable"] or (backend["why"] and backend["todo"])


def test_cards_are_read_from_the_driver() -> None:
    (card,) = read_gpus(CARD + "broken line\n")
    assert card["name"] == "NVIDIA GeForce RTX 3060 Ti"
    assert card["compute_capability"] == 8.6
    assert (card["memory_bytes"], card["free_bytes"]) == (8192 * 2**20, 7011 * 2**20)


@pytest.mark.skipif(os.name == "nt", reason="a shell script stands in for nvidia-smi")
@pytest.mark.parametrize(
    ("script", "message"),
    [("exit 9", "nvidia-smi failed"), ("true", "knows of no GPU"), (f"printf '{CARD.strip()}\\n'", "")],
)
def test_drivers_that_fail_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, message: str) -> None:
    command = tmp_path / "nvidia-smi"
    command.write_text(f"#!/bin/sh\n{script}\n")
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    gpus, problem = find_gpus()
    assert message in problem
    assert bool(gpus) == (not message)
