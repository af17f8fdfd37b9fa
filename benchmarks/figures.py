"""The plots of a measurement, as SVG."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from t2v_rt.benchmarks.peers import OURS
from t2v_rt.plots import as_svg, new_figure

WIDTH, BAR, AROUND = 7.0, 0.32, 1.3  # inches: of a picture, of a bar, of all else
KINDS = ("stages", "steps", "peers", "memory")
SINGLE = ("run", "open", "tokenize", "load")  # stages that are no part of the call's own bars


def pictures(name: str, workload: Mapping[str, Any]) -> Iterator[tuple[str, bytes]]:
    """The plots that a workload has something for: their kind, and the SVG."""
    stages = workload["runners"][OURS]["stages"]
    shown = {stage: values for stage, values in stages.items() if stage not in SINGLE}
    if len(shown) > 1:
        yield "stages", _stages(f"{name}: stages", shown)
    if len(stages.get("step", {"runs": [[]]})["runs"][0]) > 1:
        yield "steps", _steps(f"{name}: steps", stages)
    runners = {runner: item for runner, item in workload["runners"].items() if "stages" in item}
    if len(runners) > 1:
        yield "peers", _peers(f"{name}: who takes how long", runners)
    yield "memory", _memory(f"{name}: memory at most", runners, workload["plan"])


def _stages(title: str, stages: Mapping[str, Any]) -> bytes:
    values = {stage: [item[key] * 1e3 for key in ("min", "p50", "max")] for stage, item in stages.items()}
    return _ranges(title, values, "ms: median, and from the least to the most")


def _peers(title: str, runners: Mapping[str, Any]) -> bytes:
    values = {name: [item["stages"]["run"][key] for key in ("min", "p50", "max")] for name, item in runners.items()}
    return _ranges(title, values, "seconds: median, and from the least to the most")


def _ranges(title: str, values: Mapping[str, Sequence[float]], label: str) -> bytes:
    """A bar for each name, as long as the middle value, with a whisker from the first to the last."""
    figure = new_figure(WIDTH, BAR * len(values) + AROUND)
    axes = figure.subplots()
    middles = [middle for _, middle, _ in values.values()]
    around = [[m - low for low, m, _ in values.values()], [high - m for _, m, high in values.values()]]
    axes.barh(list(values), middles, xerr=around, color="#1f6fb4", ecolor="#444444", capsize=3)
    axes.set_title(title)
    axes.set_xlabel(label)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.4)
    return as_svg(figure)


def _steps(title: str, stages: Mapping[str, Any]) -> bytes:
    figure = new_figure(WIDTH, 3.5)
    axes = figure.subplots()
    for stage in ("step", "step engines", "step outside"):
        steps = zip(*stages[stage]["runs"], strict=False)
        axes.plot([median(values) * 1e3 for values in steps], "o-", markersize=3, label=stage)
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.set_ylabel("ms, median of the runs")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.4)
    axes.legend()
    return as_svg(figure)


def _memory(title: str, runners: Mapping[str, Any], plan: Mapping[str, Any] | None) -> bytes:
    bars = {name: item["memory"]["peak_bytes"] / 1e9 for name, item in runners.items()}
    if plan is not None:
        bars["as planned, beside the process"] = plan["peak_bytes"] / 1e9
        bars["the process itself"] = runners[OURS]["memory"]["before_bytes"] / 1e9
    figure = new_figure(WIDTH, BAR * len(bars) + AROUND)
    axes = figure.subplots()
    axes.barh(list(bars), list(bars.values()), color="#7fb069")
    axes.set_title(title)
    axes.set_xlabel("GB")
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.4)
    return as_svg(figure)
