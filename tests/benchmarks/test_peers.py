"""OpenVINO on a bundle's graphs keeps the engine contract, and gives what t2v-rt gives; who is missing says so."""

from __future__ import annotations

import shutil
from dataclasses import replace
from importlib import util
from pathlib import Path

import numpy as np
import pytest

from t2v_rt.benchmarks.peers import stable_diffusion_cpp
from t2v_rt.benchmarks.peers.openvino_graphs import OPENVINO
from t2v_rt.benchmarks.peers.ours import OURS, RUNNERS
from t2v_rt.benchmarks.workloads import Job, relative_error
from t2v_rt.engines.bundle.store import read_manifest, write_manifest
from t2v_rt.system.outputs import MANIFEST_NAME
from tests.conftest import Tiny


def job(tiny: Tiny, kind: str, checkpoint: bool = True) -> Job:
    return Job(
        kind=kind,
        bundle=str(tiny.bundle),
        checkpoint=str(tiny.checkpoint) if checkpoint else None,
        height=32,
        width=48,
        num_frames=9,
        num_inference_steps=2,
        guidance_scale=4.0,
        prompt="a red ball",
        negative_prompt="a dog",
    )


@pytest.mark.parametrize("kind", RUNNERS)
def test_a_run_gives_the_same_again(narrow: Tiny, kind: str) -> None:
    runner = OURS.open(job(narrow, kind))
    results = []
    for _ in range(2):
        runner.prepare()
        results.append(runner.run())
    assert np.array_equal(results[0], results[1])
    assert results[0].dtype == np.float32
    assert runner.facts()["engine_calls"]
    runner.close()


@pytest.mark.skipif(util.find_spec("openvino") is None, reason="needs openvino")
@pytest.mark.parametrize("kind", RUNNERS)
def test_openvino_gives_what_our_engines_give(tiny: Tiny, kind: str) -> None:
    results = []
    for peer in (OURS, OPENVINO):
        assert peer.missing(job(tiny, kind)) == ""
        runner = peer.open(job(tiny, kind))
        for _ in range(2):
            runner.prepare()
            result = runner.run()
        results.append(result)
    assert relative_error(results[1], results[0]) < 1e-4


def test_openvino_says_why_it_is_missing(narrow: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    assert OPENVINO.missing(job(narrow, "call")) == "the package openvino is not installed; install it"
    monkeypatch.setattr(util, "find_spec", lambda name: object())
    shutil.copytree(narrow.bundle, tmp_path / "plans")
    manifest = replace(read_manifest(tmp_path / "plans"), backend="tensorrt-rtx", files={})
    (tmp_path / "plans" / MANIFEST_NAME).unlink()
    write_manifest(tmp_path / "plans", manifest)
    asked = replace(job(narrow, "call"), bundle=str(tmp_path / "plans"))
    assert "the bundle is of tensorrt-rtx; build one of onnxruntime" in OPENVINO.missing(asked)


def test_single_files_are_found_by_their_names(narrow: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(util, "find_spec", lambda name: object())
    asked = replace(job(narrow, "call"), checkpoint=str(tmp_path))
    for name in ("wan2.1_t2v_1.3B_fp16.safetensors", "umt5-xxl-encoder-Q8_0.gguf", "notes.txt"):
        (tmp_path / name).touch()
    assert stable_diffusion_cpp.PEER.missing(asked).endswith("with wan_2.1_vae*")
    (tmp_path / "wan_2.1_vae.safetensors").touch()
    assert stable_diffusion_cpp.PEER.missing(asked) == ""
    assert set(stable_diffusion_cpp.networks(str(tmp_path))) == {"diffusion_model_path", "t5xxl_path", "vae_path"}
