"""The real command on a tiny bundle: what it measures and writes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from t2v_rt import TextToVideoPipeline
from t2v_rt.cli import main
from t2v_rt.engines.bundle.store import open_bundle
from t2v_rt.runtime.noise import Generator
from tests.conftest import Tiny

pytestmark = pytest.mark.slow  # it starts a dozen processes
RUNS, STEPS = 2, 3
SIZE = ["--height", "16", "--width", "16", "--num-frames", "9", "--num-inference-steps", str(STEPS)]


@pytest.fixture(scope="module")
def folder(narrow: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one measurement wrote."""
    target = tmp_path_factory.mktemp("bench") / "report"
    command = ["bench", str(narrow.bundle), "--runs", str(RUNS), "--warmup", "1", *SIZE, "--output", str(target)]
    command += [
        "--workload",
        "call",
        "--workload",
        "vae-chunk",
        "--peer",
        "stable-diffusion.cpp",
        "--peer",
        "diffusers",
    ]
    assert main(command) == 0
    return target


@pytest.fixture
def report(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "bench.json").read_text(encoding="utf-8"))
    return content


def test_each_stage_of_each_run_is_told(report: dict[str, Any]) -> None:
    call = report["workloads"]["call"]
    stages = call["runners"]["t2v-rt"]["stages"]
    counts = {name: stage["count"] for name, stage in stages.items()}
    steps, chunks = RUNS * STEPS, RUNS * 2
    assert {
        name: counts[name] for name in ("call", "encode", "denoise", "decode", "file", "tokenize")
    } == dict.fromkeys(("call", "encode", "denoise", "decode", "file", "tokenize"), RUNS)
    assert {counts[name] for name in counts if name.startswith("step")} == {steps}
    assert counts["decode next"] == chunks
    assert set(report["counted"]) == set(counts) - {"run"}
    for run in range(RUNS):
        inside = sum(sum(stages[name]["runs"][run]) for name in ("encode", "denoise", "decode"))
        (whole,) = stages["call"]["runs"][run]
        assert inside <= whole
        engines = sum(sum(stages[name]["runs"][run]) for name in ("encode engines", "step engines", "decode engines"))
        assert stages["outside"]["runs"][run] == [pytest.approx(whole - engines)]
    assert "load" not in stages
    assert call["runners"]["t2v-rt"]["first"]["stages"]["load"] > 0


def test_what_is_measured_is_the_call_that_a_program_makes(report: dict[str, Any], narrow: Tiny) -> None:
    call = report["workloads"]["call"]
    pipe = TextToVideoPipeline.from_pretrained(narrow.bundle)
    latents = Generator(0).randn(pipe.manifest.model.latent_shape(1, 16, 16, 9))
    out = pipe(report["settings"]["prompt"], latents=latents, num_inference_steps=STEPS, output_type="uint8", seed=0)
    assert call["frames_sha256"] == hashlib.sha256(out.frames[0].tobytes()).hexdigest()
    assert call["plan"]["peak_bytes"] > 0
    assert call["num_inference_steps"] == STEPS


def test_what_stands_beside_the_times_is_there(report: dict[str, Any], narrow: Tiny) -> None:
    assert report["machine"]["cores"] >= 1
    assert report["bundle"]["id"] == open_bundle(narrow.bundle).manifest.bundle_id
    for workload in report["workloads"].values():
        ours = workload["runners"]["t2v-rt"]
        assert ours["memory"]["peak_bytes"] >= ours["memory"]["first_bytes"] > ours["memory"]["before_bytes"] > 0
        assert ours["allocations"]["most_bytes"] >= ours["allocations"]["result_bytes"] > 0
        assert {row["component"] for row in workload["bounds"]["rows"]} >= {"vae_decoder"}
        assert all(row["limit_seconds"] > 0 for row in workload["bounds"]["rows"])
        assert min(workload["rates"][when]["matmul_gflops"] for when in ("before", "after")) > 0


def test_each_peer_that_is_missing_says_why_and_what_to_do(report: dict[str, Any]) -> None:
    runners = report["workloads"]["call"]["runners"]
    assert "install" in runners["diffusers"]["missing"] or "--checkpoint" in runners["diffusers"]["missing"]
    chunk = report["workloads"]["vae-chunk"]["runners"]
    assert "whole videos only" in chunk["stable-diffusion.cpp"]["missing"]
    assert report["workloads"]["call"]["ratios"] == {}


def test_the_page_shows_its_plots_and_a_result_is_no_worse_than_itself(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (folder / "bench.md").read_text(encoding="utf-8")
    plots = sorted(path.name for path in folder.glob("*.svg"))
    assert plots == [f"call-{kind}.svg" for kind in ("memory", "stages", "steps")] + [
        "vae-chunk-memory.svg",
        "vae-chunk-stages.svg",
    ]
    assert all(f"({name})" in page for name in plots)
    assert "What each stage counts" in page
    result = str(folder / "bench.json")
    assert main(["bench", "compare", result, result]) == 0
    assert "same" in capsys.readouterr().out
