"""Two results side by side: whether each stage became slower, and by more than chance and this machine explain.

A verdict needs three things: the medians of the runs are apart by more than `FLOOR`, by more than three times their
joint standard error, and by more than a share of the whole call that somebody would notice. Where the machine itself
was slower meanwhile, as the yardstick that was taken beside each round tells, that difference counts as chance too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from t2v_rt.benchmarks.bench import KIND, SCHEMA
from t2v_rt.benchmarks.peers import OURS
from t2v_rt.benchmarks.timing import median_error
from t2v_rt.errors import RequestError

FLOOR = 0.08  # of a time: FastVideo's gate for latencies
MEMORY_FLOOR = 0.05  # of a peak: FastVideo's gate for memory
ERRORS = 3.0  # standard errors: one false alarm in some hundred stages
NOTICED = 0.01  # of the whole run: less is no verdict, however sure
MEMORY_NOTICED = 16 << 20  # bytes: what an allocator's arenas come and go by
SAME, SLOWER, FASTER, SMALL = "same", "slower", "faster", "too small to tell"
MORE, LESS = "more", "less"
WORSE = (SLOWER, MORE)


def compare(before: Mapping[str, Any], after: Mapping[str, Any], name: str = OURS) -> dict[str, Any]:
    """Judges each stage that both results have.

    Args:
        before: a report of `bench`.
        after: another one, of the build that is to be judged.
        name: of the runner in both.

    Returns:
        `rows`: workload, stage, medians of both, `ratio`, the `threshold` it had to pass, `verdict`; `frames`:
        workload -> whether the frames are the same bytes; `worse`: the rows that are; `notes`.

    Raises:
        RequestError: one of them is no such report, or they have no workload of the same size in common.
    """
    for report in (before, after):
        if report.get("kind") != KIND or report.get("schema") != SCHEMA:
            raise RequestError(f"a result is of kind {report.get('kind')!r}; give two files that t2v-rt bench wrote")
    pairs = {
        workload: (before["workloads"][workload], after["workloads"][workload])
        for workload in before["workloads"]
        if workload in after["workloads"]
    }
    same = {workload: pair for workload, pair in pairs.items() if _setting(pair[0]) == _setting(pair[1])}
    if not same:
        raise RequestError("the results have no workload of the same size and steps in common; measure both alike")
    rows: list[dict[str, Any]] = []
    for workload, (old, new) in same.items():
        rows += _times(workload, old, new, name) + _memory(workload, old, new, name)
    return {
        "rows": rows,
        "frames": {
            workload: old["frames_sha256"] == new["frames_sha256"]
            for workload, (old, new) in same.items()
            if "frames_sha256" in old
        },
        "worse": [row for row in rows if row["verdict"] in WORSE],
        "notes": _notes(before, after, [name for name in pairs if name not in same]),
    }


def _setting(workload: Mapping[str, Any]) -> tuple[Any, ...]:
    names = ("kind", "height", "width", "num_frames", "num_inference_steps", "guidance_scale")
    return tuple(workload.get(name) for name in names)


def _notes(before: Mapping[str, Any], after: Mapping[str, Any], unlike: Sequence[str]) -> list[str]:
    notes = [f"{name} was measured at two sizes and is not compared" for name in unlike]
    for key in ("cpu", "usable_cores", "packages"):
        if before["machine"].get(key) != after["machine"].get(key):
            notes.append(f"the machines differ in {key}")
    return notes


def _times(workload: str, old: Mapping[str, Any], new: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    stages = [side["runners"][name]["stages"] for side in (old, new)]
    whole = median(run[0] for run in stages[0]["run"]["runs"])
    drift = _drift(old["yardstick"], new["yardstick"])
    rows = []
    for stage in stages[0]:
        if stage in stages[1]:
            old_runs, new_runs = ([_in_run(run) for run in side[stage]["runs"] if run] for side in stages)
            verdict = judge(old_runs, new_runs, drift, NOTICED * whole)
            rows.append({"workload": workload, "stage": stage, "unit": "s", **verdict})
    return rows


def _in_run(times: Sequence[float]) -> float:
    """Seconds of a run in a stage that came several times: their number of medians, so that one hiccup does not count.

    What a hiccup costs is in the stages that come once, such as all steps together.
    """
    return len(times) * median(times)


def judge(before: Sequence[float], after: Sequence[float], drift: float, noticed: float) -> dict[str, Any]:
    """The verdict on a stage.

    Args:
        before: seconds of a run in it, of each run.
        after: the same of the other build.
        drift: by how much the machine itself was another one, as a share.
        noticed: seconds of a difference that matters.
    """
    old, new = median(before), median(after)
    error = math.hypot(median_error(before), median_error(after))
    threshold = max(FLOOR, ERRORS * error, drift)
    relation = new / old if old else 1.0
    if abs(new - old) < noticed:
        verdict = SMALL if max(relation, 1 / max(relation, 1e-9)) > 1 + threshold else SAME
    else:
        verdict = SLOWER if relation > 1 + threshold else FASTER if relation < 1 / (1 + threshold) else SAME
    return {"before": old, "after": new, "ratio": relation, "threshold": threshold, "verdict": verdict}


def _drift(old: Sequence[float], new: Sequence[float]) -> float:
    """By how much the yardsticks differ."""
    medians = sorted((median(old), median(new)))
    return medians[1] / medians[0] - 1


def _memory(workload: str, old: Mapping[str, Any], new: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    before, after = (side["runners"][name]["memory"]["peak_bytes"] for side in (old, new))
    relation, apart = after / before, abs(after - before) > MEMORY_NOTICED
    verdict = MORE if apart and relation > 1 + MEMORY_FLOOR else LESS if apart and relation < 1 - MEMORY_FLOOR else SAME
    row = {"before": before, "after": after, "ratio": relation, "threshold": MEMORY_FLOOR, "verdict": verdict}
    return [{"workload": workload, "stage": "peak memory", "unit": "bytes", **row}]


def describe(report: Mapping[str, Any]) -> list[str]:
    """The verdicts as a table for a person."""
    lines = [f"{'workload':22}{'stage':18}{'before':>12}{'after':>12}{'ratio':>8}{'needs':>8}  verdict"]
    for row in report["rows"]:
        values = [_value(row[side], row["unit"]) for side in ("before", "after")]
        lines.append(
            f"{row['workload']:22}{row['stage']:18}{values[0]:>12}{values[1]:>12}{row['ratio']:8.3f}"
            f"{1 + row['threshold']:8.3f}  {row['verdict']}"
        )
    lines += [f"{name}: frames are {'the same bytes' if same else 'not the same bytes'}" for name, same in
              report["frames"].items()]  # fmt: skip
    return [*lines, *report["notes"]]


def _value(value: float, unit: str) -> str:
    return f"{value / 1e6:.1f} MB" if unit == "bytes" else f"{value * 1e3:.2f} ms"
