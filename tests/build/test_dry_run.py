"""Estimates before a build: the plan that the bundle would have, and what building takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from t2v_rt import CheckpointError, build_engines
from t2v_rt.benchmarks.make_checkpoint import changed, make_checkpoint
from t2v_rt.benchmarks.plan_contexts import CHANGES
from t2v_rt.benchmarks.wan_tensors import CONFIGS
from t2v_rt.build.dry_run import dry_run
from t2v_rt.build.options import BuildOptions
from t2v_rt.cli import main
from t2v_rt.commands.plan import plan
from t2v_rt.engines.bundle.profiles import Range
from t2v_rt.export.config import CheckpointConfigs
from t2v_rt.export.wan.family import FAMILY
from tests.conftest import Tiny

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
RULE_TOLERANCE = 0.1  # what the rules of thumb claim
TOO_MUCH, TOO_LITTLE = 0.45, 0.125  # what they claim of plans for one GPU, and of ranges
SMALL = 40e6  # bytes, below which workspaces that do not grow with the video outweigh the rest
DISK_SLACK = 1.6  # of a tiny bundle, whose plans are mostly code


def test_the_rules_meet_what_builders_told() -> None:
    """Measured by benchmarks/plan_contexts.py."""
    networks = changed(CONFIGS, CHANGES)
    configs = FAMILY.read_configs(CheckpointConfigs("", {"_class_name": "WanPipeline"}, networks, {}, {}))
    rows = json.loads((RESULTS / "plan_contexts.json").read_text())["contexts"]
    assert {row["component"] for row in rows} == set(FAMILY.networks)
    held = 0
    for row in rows:
        sizes = {name: Range(**bounds) for name, bounds in row["sizes"].items()}
        ranges = {row["component"]: {row["role"]: [sizes]}}
        form = configs.graph_options(ranges, float32_matmul=True)[row["component"]][row["role"]]
        rule = configs.context(row["component"], row["role"], sizes, form)
        ranged = any(not sizes[symbol].fixed for symbol in sizes if symbol != "length")
        if row["context_bytes"] <= SMALL:
            continue
        if len(row["gpus"]) > 1 and not ranged:
            assert rule == pytest.approx(row["context_bytes"], rel=RULE_TOLERANCE), row
            held += 1
        else:
            assert 1 - TOO_LITTLE <= rule / row["context_bytes"] <= 1 + TOO_MUCH, row
    assert held > 10


def test_a_range_is_told_beside_a_list_of_its_ends(narrow: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs t2v-rt[tensorrt-rtx]")
    options = BuildOptions(narrow.checkpoint, backend="tensorrt-rtx", height="32:64", width="32:64", num_frames="5:9")
    report = dry_run(options)
    small, large = report["listed_profiles"]
    assert (small["video"], large["video"]) == ("32x32, 5 frames", "64x64, 9 frames")
    assert small["context_bytes"]["denoise"] < large["context_bytes"]["denoise"]
    assert large["context_bytes"]["denoise"] < report["profiles"][0]["context_bytes"]["denoise"]
    command = ["build-engines", str(narrow.checkpoint), "--backend", "tensorrt-rtx", "--dry-run"]
    assert main([*command, "--height", "32:64", "--width", "32:64", "--num-frames", "5:9"]) == 0
    assert capsys.readouterr().out.count("as a list, profile") == 2
    assert "listed_profiles" not in dry_run(
        BuildOptions(narrow.checkpoint, backend="tensorrt-rtx", height=64, width=64)
    )


def test_graphs_plan_as_they_will(narrow: Tiny) -> None:
    report = dry_run(BuildOptions(narrow.checkpoint))
    built = plan(narrow.bundle)
    for key in ("peak_bytes", "stages", "vae_tiles", "height", "width", "num_frames", "backend"):
        assert report[key] == built[key]
    size = sum(file.stat().st_size for file in narrow.bundle.rglob("*") if file.is_file())
    assert size <= report["disk_bytes"]
    assert report["estimated"]


@pytest.mark.slow  # builds plans
def test_plans_are_near(narrow: Tiny, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs t2v-rt[tensorrt-rtx]")
    report = dry_run(BuildOptions(narrow.checkpoint, backend="tensorrt-rtx"), tmp_path / "b")
    assert not list(tmp_path.iterdir())
    build_engines(narrow.checkpoint, tmp_path / "b", backend="tensorrt-rtx")
    built = plan(tmp_path / "b")
    assert report["vae_tiles"] == built["vae_tiles"]
    for guessed, told in zip(report["stages"], built["stages"], strict=True):
        assert guessed["state_bytes"] == told["state_bytes"]
        assert guessed["io_bytes"] == told["io_bytes"]
    size = sum(file.stat().st_size for file in (tmp_path / "b").rglob("*") if file.is_file())
    assert size <= report["disk_bytes"]


@pytest.mark.slow
def test_true_size_from_headers_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two layers of the true widths; nothing of their weights is read."""
    make_checkpoint(tmp_path / "wan", changed(CONFIGS, ["transformer.num_layers=2"]))
    command = ["build-engines", str(tmp_path / "wan"), "--dry-run", "--json", "--vram-budget", "8GiB"]
    assert main(command) == 0
    report = json.loads(capsys.readouterr().out)
    weights = sum(stage["weights_bytes"] for stage in report["stages"])
    assert weights < report["disk_bytes"] < 1.1 * weights
    assert report["memory_bytes"] < 1e9
    assert main(command[:-3]) == 0
    text = capsys.readouterr().out
    assert "an estimate; nothing was built" in text
    assert "to build" in text
    assert [path.name for path in tmp_path.iterdir()] == ["wan"]


def test_bad_input(narrow: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build-engines", str(narrow.checkpoint)]) == 2
    assert "--output is missing" in capsys.readouterr().err
    with pytest.raises(
        CheckpointError, match="nothing is downloaded for an estimate, and it is not in the hub's cache"
    ):
        dry_run(BuildOptions("some-owner/never-downloaded"))
