"""`t2v-rt inspect --kernels`: what a card will get, as a person and a program are told."""

from __future__ import annotations

import json
from typing import Any

import pytest

from t2v_rt.cli import main
from t2v_rt.commands.inspect import describe, inspect_bundle
from t2v_rt.engines.bundle.store import Bundle
from tests.conftest import Tiny

ROUNDING = 512  # bytes: the builder's log has up to two units of 256 more for programs of a few kilobytes


def test_a_bundle_without_plans_says_so(narrow: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(narrow.bundle), "--kernels"]) == 0
    assert "kernels    there are no plans to read, the engines are ONNX graphs" in capsys.readouterr().out
    assert main(["inspect", str(narrow.bundle), "--kernels", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kernels"] == {}
    assert main(["inspect", str(narrow.bundle)]) == 0
    assert "kernels" not in capsys.readouterr().out


@pytest.mark.slow
def test_each_plan_tells_of_itself(plans: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    report = inspect_bundle(plans.folder, kernels=True)
    graphs = {graph.path: graph for spec in plans.manifest.components.values() for graph in spec.graphs.values()}
    assert set(report["kernels"]) == set(graphs)
    for path, graph in graphs.items():
        assert graph.plan is not None
        for program, profile in zip(report["kernels"][path]["programs"], graph.plan.profiles, strict=True):
            assert tuple(program["targets"]) == plans.manifest.targets
            own = [r["bytes"] for r in program["regions"] if (r["owner"], r["place"]) == ("user", "accelerator")]
            assert 0 <= profile.context_bytes - sum(own) <= ROUNDING
    assert main(["inspect", str(plans.folder), "--kernels", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kernels"].keys() == graphs.keys()
    assert main(["inspect", str(plans.folder), "--kernels"]) == 0
    text = capsys.readouterr().out
    for line in (
        "engines    tensorrt-rtx, fp16, family wan, attention built to add up in fp32",
        "    attention  4 of 4 fused, adds up in float32",
        "    attention  2 not fused, scores are in memory",
        "    program  for sm80, sm86, sm89, sm120",
        "      attention  2 fused, 12 queries, as many keys; sums: scores fp32, values fp32",
        "      attention  2 fused, 12 queries, 512 keys; sums: scores fp32, values fp32",
        "      attention  2 not fused, scores are in memory",
    ):
        assert line in text.splitlines()


@pytest.mark.slow
def test_what_a_plan_does_not_say_is_not_guessed(plans: Bundle) -> None:
    report = inspect_bundle(plans.folder, kernels=True)
    silent: dict[str, Any] = dict.fromkeys(("targets", "regions", "launches", "sources", "fused", "unfused"))
    report["kernels"]["transformer/model.plan"] = {"programs": []}
    report["kernels"]["vae_decoder/tail.plan"] = {"programs": [silent]}
    attention = report["components"]["transformer"]["graphs"]["model"]["plan"]["attention"]
    attention.update(fused=None, accumulation=None)
    lines = describe(report)
    assert "    attention  4, whether they are fused is not told by this plan" in lines
    assert "    kernels  not told by this plan" in lines
    start = lines.index("    program  for not told by this plan")
    assert lines[start + 1 : start + 4] == [
        f"      {subject}  not told by this plan" for subject in ("kernels", "regions", "attention")
    ]
