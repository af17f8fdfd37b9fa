"""The self-test of a bundle, the verify command, and the doctor."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from t2v_rt import BundleError, EngineError, TextToVideoPipeline, build_engines
from t2v_rt.cli import main
from t2v_rt.commands.doctor import examine, find_gpus, read_gpus
from t2v_rt.commands.verify import verify
from t2v_rt.engines.bundle.manifest import Manifest
from t2v_rt.engines.bundle.store import open_bundle, read_manifest, write_manifest
from t2v_rt.engines.contract import Component
from t2v_rt.engines.onnxruntime.backend import OnnxRuntimeBackend
from t2v_rt.runtime import self_test
from t2v_rt.system.outputs import MANIFEST_NAME
from tests.conftest import Tiny

CARD = "NVIDIA GeForce RTX 3060 Ti, 566.14, 8.6, 8192, 7011\n"


def sign_again(folder: Path) -> None:
    """Hashes a changed bundle into its manifest, as its builder would have."""
    manifest = read_manifest(folder)
    (folder / MANIFEST_NAME).unlink()
    write_manifest(folder, manifest)


def spoil(path: Path) -> None:
    """Makes the answers of a component other ones than it gives."""
    with np.load(path) as stored:
        answers = {key: stored[key] * np.float32(1.01) for key in stored.files}
    np.savez(path, **answers)


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
    spoil(folder / self_test.FOLDER / "transformer.npz")
    sign_again(folder)
    assert main(["verify", str(folder)]) == 1
    printed = capsys.readouterr()
    assert "transformer  FAILED" in printed.out
    assert printed.err.count("\n") == 1
    assert "does not give the answers of its reference" in printed.err


class Card(OnnxRuntimeBackend):
    """The CPU under another name: a device that has to prove itself."""

    device = "card 1"


def test_the_first_use_on_a_device_is_tested_and_remembered(
    narrow: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tested: list[str] = []
    check = self_test.check

    def count(name: str, component: Iterable[Component], manifest: Manifest, folder: Path) -> self_test.Verdict:
        tested.append(name)
        return check(name, component, manifest, folder)

    monkeypatch.setattr(self_test, "check", count)
    for _ in range(2):
        TextToVideoPipeline(open_bundle(narrow.bundle), Card())("a red ball", seed=1)
        assert tested == ["text_encoder", "transformer", "vae_decoder"]
    monkeypatch.setattr(Card, "device", "card 2")
    TextToVideoPipeline(open_bundle(narrow.bundle), Card())("a red ball", seed=1)
    assert tested == ["text_encoder", "transformer", "vae_decoder"] * 2


def test_a_device_that_fails_its_test_is_refused_each_time(narrow: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(narrow.bundle, folder)
    spoil(folder / self_test.FOLDER / "text_encoder.npz")
    sign_again(folder)
    pipe = TextToVideoPipeline(open_bundle(folder), Card())
    for _ in range(2):
        with pytest.raises(EngineError, match="text_encoder computes something else on card 1 than its float32"):
            pipe("a red ball", seed=1)


def test_a_device_is_used_untested_where_there_are_no_answers(
    narrow: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(narrow.bundle, folder)
    shutil.rmtree(folder / self_test.FOLDER)
    sign_again(folder)
    TextToVideoPipeline(open_bundle(folder), Card())("a red ball", seed=1)
    assert "text_encoder was not tested on card 1" in caplog.text


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
