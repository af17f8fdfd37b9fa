"""Verdicts on two results: what is the same is not called slower, what is slower is, and noise is told from both."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from t2v_rt.benchmarks.compare import FASTER, MORE, SAME, SLOWER, SMALL, compare, judge
from t2v_rt.cli import main
from t2v_rt.errors import RequestError

# seconds of ten steady runs, as they were recorded on two cores with nothing else on them
STEADY = [0.490, 0.487, 0.494, 0.489, 0.492, 0.488, 0.495, 0.490, 0.486, 0.491]
NOISY = [0.49, 0.71, 0.44, 0.93, 0.52, 0.47, 0.84, 0.61, 0.45, 0.77]  # and with others on them


def report(call: list[float], scale: float = 1.0, yardstick: float = 0.015) -> dict[str, Any]:
    """A result whose steps take half of each call, and whose tokenizer takes next to nothing."""
    stages = {
        "run": [[seconds] for seconds in call],
        "step": [[scale * seconds / 40] * 20 for seconds in call],
        "tokenize": [[0.0002 * (1 + i % 3)] for i in range(len(call))],
    }
    workload = {
        "kind": "call",
        "height": 64,
        "width": 64,
        "num_frames": 17,
        "num_inference_steps": 20,
        "guidance_scale": 5.0,
        "frames_sha256": "3c54",
        "yardstick": [yardstick] * len(call),
        "runners": {
            "t2v-rt": {
                "stages": {name: {"runs": runs} for name, runs in stages.items()},
                "memory": {"peak_bytes": 150_000_000},
            }
        },
    }
    return {"kind": "t2v-rt bench", "schema": 1, "machine": {"cpu": "some"}, "workloads": {"call": workload}}


def verdicts(before: dict[str, Any], after: dict[str, Any]) -> dict[str, str]:
    return {row["stage"]: row["verdict"] for row in compare(before, after)["rows"]}


def test_an_equal_build_is_not_caught() -> None:
    again = [0.489, 0.493, 0.488, 0.496, 0.490, 0.491, 0.487, 0.492, 0.494, 0.489]
    assert verdicts(report(STEADY), report(again)) == dict.fromkeys(("run", "step", "tokenize", "peak memory"), SAME)


def test_a_slowed_build_is_caught_and_a_quicker_one_told() -> None:
    slowed = report([1.12 * seconds for seconds in STEADY])
    assert verdicts(report(STEADY), slowed)["run"] == SLOWER
    assert verdicts(slowed, report(STEADY))["run"] == FASTER


def test_one_slow_stage_is_caught_though_the_call_is_within_the_gate() -> None:
    found = verdicts(report(STEADY), report(STEADY, scale=1.12))
    assert (found["run"], found["step"]) == (SAME, SLOWER)


def test_a_hiccup_in_one_step_of_a_run_is_no_slower_step() -> None:
    after = report(STEADY)
    for run in after["workloads"]["call"]["runners"]["t2v-rt"]["stages"]["step"]["runs"]:
        run[3] += 0.2
    assert verdicts(report(STEADY), after)["step"] == SAME


def test_what_is_within_the_gate_of_eight_per_cent_is_the_same() -> None:
    assert verdicts(report(STEADY), report([1.07 * seconds for seconds in STEADY]))["run"] == SAME


def test_noise_raises_what_a_verdict_needs() -> None:
    slower = [1.12 * seconds for seconds in NOISY]
    assert verdicts(report(NOISY), report(slower))["run"] == SAME
    assert verdicts(report(NOISY), report([4 * seconds for seconds in NOISY]))["run"] == SLOWER


def test_a_machine_that_was_slower_itself_is_no_slower_build() -> None:
    slowed = [1.3 * seconds for seconds in STEADY]
    assert verdicts(report(STEADY), report(slowed, yardstick=1.35 * 0.015))["run"] == SAME
    assert verdicts(report(STEADY), report(slowed))["run"] == SLOWER


def test_what_nobody_notices_in_the_call_is_no_verdict() -> None:
    assert judge([0.0002] * 5, [0.0004] * 5, 0.0, 0.005)["verdict"] == SMALL
    assert judge([0.2] * 5, [0.4] * 5, 0.0, 0.005)["verdict"] == SLOWER


def test_more_memory_is_worse_and_a_few_megabytes_are_not() -> None:
    after = report(STEADY)
    memory = after["workloads"]["call"]["runners"]["t2v-rt"]["memory"]
    memory["peak_bytes"] = 160_000_000
    assert verdicts(report(STEADY), after)["peak memory"] == SAME
    memory["peak_bytes"] = 190_000_000
    assert verdicts(report(STEADY), after)["peak memory"] == MORE


def test_the_command_ends_with_1_where_it_is_slower_and_0_where_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / name for name in ("old.json", "same.json", "slow.json")]
    for file, scale in zip(files, (1.0, 1.01, 1.5), strict=True):
        file.write_text(json.dumps(report([scale * seconds for seconds in STEADY])), encoding="utf-8")
    old, same, slow = map(str, files)
    assert main(["bench", "compare", old, same]) == 0
    assert "frames are the same bytes" in capsys.readouterr().out
    assert main(["bench", "compare", old, slow, "--json"]) == 1
    printed = capsys.readouterr()
    told = json.loads(printed.out)
    assert {row["stage"] for row in told["worse"]} == {"run", "step"}
    assert printed.err.count("\n") == 1
    assert "1.50 times as much" in printed.err


def test_results_that_cannot_be_compared_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = copy.deepcopy(report(STEADY))
    other["workloads"]["call"]["num_frames"] = 33
    with pytest.raises(RequestError, match="no workload of the same size"):
        compare(report(STEADY), other)
    with pytest.raises(RequestError, match="give two files that t2v-rt bench wrote"):
        compare({"kind": "else"}, other)
    file = tmp_path / "old.json"
    file.write_text("[]", encoding="utf-8")
    for words in (["compare"], ["compare", str(file)], ["compare", str(file), str(file)], ["a", "b"]):
        assert main(["bench", *words]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert main(["bench", "compare", str(file), str(file), "--runs", "3"]) == 2
    assert "--runs" in capsys.readouterr().err
