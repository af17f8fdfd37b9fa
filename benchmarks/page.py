"""A measurement as a table for a person, and as a page in Markdown with plots."""

from __future__ import annotations

import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from t2v_rt.benchmarks import figures, results
from t2v_rt.benchmarks.peers import OURS
from t2v_rt.errors import RequestError
from t2v_rt.plots import new_figure
from t2v_rt.system.files import writing
from t2v_rt.system.outputs import check_place

JSON, PAGE = "bench.json", "bench.md"
COLUMNS = ("count", "min", "mean", "p50", "p90", "p99", "max", "spread")
GB = 1e9


def check_folder(path: str) -> Path:
    """The folder that takes a report; raises RequestError where it must not be written, InputError without plots."""
    new_figure(1, 1)
    target = check_place(path, stat.S_IFDIR, "a folder of a report")
    if target.is_dir() and any(target.iterdir()) and not (target / JSON).is_file():
        raise RequestError(f"{path} holds files, and no report of t2v-rt bench; choose another folder")
    return target


def write_page(report: Mapping[str, Any], folder: str) -> list[Path]:
    """Writes a report as JSON, its page and the page's plots; returns the files."""
    target = check_folder(folder)
    target.mkdir(exist_ok=True)
    pictures = {
        f"{name}-{kind}.svg": picture
        for name, workload in report["workloads"].items()
        for kind, picture in figures.pictures(name, workload)
    }
    results.write(target / JSON, report)
    text = "\n".join(markdown(report, list(pictures)))
    for name, content in {**pictures, PAGE: f"{text}\n".encode()}.items():
        with writing(target / name) as stream:
            stream.write(content)
    return [target / name for name in (JSON, PAGE, *pictures)]


def cells(stage: Mapping[str, Any]) -> list[str]:
    """A stage's figures: milliseconds, and the spread in per cent."""
    return [str(stage["count"]), *(f"{stage[name] * 1e3:.2f}" for name in COLUMNS[1:-1]), f"{stage['spread']:.1%}"]


def lines(report: Mapping[str, Any]) -> list[str]:
    """The report in lines for a terminal."""
    found = []
    for name, workload in report["workloads"].items():
        found.append(f"{name}: {_sizes(workload)}")
        found.append(f"  {'ms':22}" + "".join(f"{column:>10}" for column in COLUMNS))
        for runner, stages in _tables(workload):
            found.append(f"  {runner}")
            found += [f"    {stage:20}" + "".join(f"{cell:>10}" for cell in row) for stage, row in stages]
        found += [f"  {line}" for line in _facts(workload)]
    return [*found, *(f"written  {path}" for path in report.get("written", ()))]


def markdown(report: Mapping[str, Any], pictures: Sequence[str]) -> Iterator[str]:
    """The page, line by line."""
    machine, bundle = report["machine"], report["bundle"]
    yield "# What was measured"
    yield ""
    cores, python = machine["usable_cores"], machine["python"]
    yield f"Machine: {machine['cpu']}, {cores} cores, {machine['system']}, Python {python}."
    yield "Packages: " + ", ".join(f"{name} {version}" for name, version in machine["packages"].items()) + "."
    for card in machine.get("cards", ()):
        yield "Card: " + ", ".join(f"{name} {value}" for name, value in card.items()) + "."
    yield f"Bundle: {bundle['id']}, {bundle['family']}, {bundle['backend']}, {bundle['precision']}."
    settings = ", ".join(f"{name} {value}" for name, value in report["settings"].items() if value not in (None, []))
    yield f"Settings: {settings}."
    yield ""
    yield from (f"- {line}" for line in report["conventions"])
    for name, workload in report["workloads"].items():
        yield from ("", f"## {name}", "", f"{workload['text']}: {_sizes(workload)}.", "")
        yield f"| ms | {' | '.join(COLUMNS)} |"
        yield "|---" * (len(COLUMNS) + 1) + "|"
        for runner, stages in _tables(workload):
            for stage, row in stages:
                yield f"| {runner}, {stage} | {' | '.join(row)} |"
        yield ""
        yield from (f"- {line}" for line in _facts(workload))
        for picture in pictures:
            if (
                picture.startswith(f"{name}-")
                and picture.removeprefix(f"{name}-").removesuffix(".svg") in figures.KINDS
            ):
                yield from ("", f"![{picture.removesuffix('.svg')}]({picture})")
    yield from ("", "## What each stage counts", "")
    yield from (f"- **{stage}**: {text}." for stage, text in report["counted"].items())


def _sizes(workload: Mapping[str, Any]) -> str:
    steps = f", {workload['num_inference_steps']} steps, guidance {workload['guidance_scale']:g}" if (
        "num_inference_steps" in workload) else ""  # fmt: skip
    size = f"{workload['width']}x{workload['height']}, {workload['num_frames']} frames, {workload['tokens']} tokens"
    return size + steps


def _tables(workload: Mapping[str, Any]) -> Iterator[tuple[str, list[tuple[str, list[str]]]]]:
    """Each runner that was measured, and the rows of its stages."""
    for runner, item in workload["runners"].items():
        if "stages" in item:
            yield runner, [(stage, cells(values)) for stage, values in item["stages"].items()]


def _facts(workload: Mapping[str, Any]) -> Iterator[str]:
    """All else that was found, a line each."""
    ours = workload["runners"][OURS]
    yield f"first call {ours['first']['seconds']:.3f} s, engines loaded in it; opening {ours['open_seconds']:.3f} s"
    yield "throughput " + ", ".join(f"{value:.4g} {name.replace('_', ' ')}" for name, value in
                                    workload["throughput"].items())  # fmt: skip
    stages = ours["stages"]
    yield f"transfers: {ours['facts']['transfers']}"
    if "outside" in stages and "call" in stages:
        yield f"outside of engines: {stages['outside']['p50'] / stages['call']['p50']:.1%} of the call"
    yield from _memory(workload)
    for name, item in workload["runners"].items():
        if "missing" in item:
            yield f"{name} was not measured: {item['missing']}"
    for name, output in workload["outputs"].items():
        error = "another shape" if output["error"] is None else f"error {output['error']:.1e}"
        decibels = "" if output["psnr_db"] is None else f", {output['psnr_db']:.1f} dB"
        yield f"{name}: result against {OURS}'s: {error}{decibels}" + ("" if output["same"] else "; no ratio is told")
    for name, found in workload["ratios"].items():
        yield f"{name} takes {found['median']:.2f} times as long ({found['low']:.2f} to {found['high']:.2f})"
    yield from _bounds(workload)


def _memory(workload: Mapping[str, Any]) -> Iterator[str]:
    for name, item in workload["runners"].items():
        if "memory" in item:
            memory = item["memory"]
            yield (
                f"memory of {name}: at most {memory['peak_bytes'] / GB:.3f} GB, {memory['first_bytes'] / GB:.3f} after "
                f"the first call, {memory['growth']:+.2%} over the measured runs"
            )
    plan = workload["plan"]
    if plan is not None:
        base = workload["runners"][OURS]["memory"]["before_bytes"]
        yield f"memory as planned: {plan['peak_bytes'] / GB:.3f} GB, beside {base / GB:.3f} of the process itself"
    if workload["card"] is not None:
        peak, before = (workload["card"][when] / GB for when in ("peak", "before"))
        yield f"memory of the card: at most {peak:.3f} GB, {before:.3f} before"
    traced = workload["runners"][OURS]["allocations"]
    yield (
        f"allocations of a call, engines apart: at most {traced['most_bytes'] / 1e6:.2f} MB at once, the result's "
        f"{traced['result_bytes'] / 1e6:.2f} among them; {traced['left_bytes'] / 1e3:.1f} kB left behind"
    )


def _bounds(workload: Mapping[str, Any]) -> Iterator[str]:
    before, after = (workload["rates"][when] for when in ("before", "after"))
    yield (
        f"this machine: products at {before['matmul_gflops']:.0f} GFLOP/s before and {after['matmul_gflops']:.0f} "
        f"after, copies at {before['copy_gbytes']:.1f} GB/s"
    )
    found = workload["bounds"]
    if any(row["share"] > 1 for row in found.get("rows", ())):
        yield "others had the machine while its rates were measured: shares of the limit above 100 % say nothing"
    if "missing" in found:
        yield f"work was not counted: {found['missing']}"
    for row in found.get("rows", ()):
        yield (
            f"{row['component']}: {(row['products'] + row['attention'] + row['convolutions']) / 1e9:.3f} GFLOP "
            f"({row['attention'] / 1e9:.3f} attention), {row['bytes'] / GB:.3f} GB in {row['seconds'] * 1e3:.2f} ms: "
            f"{row['gflops']:.0f} GFLOP/s, {row['share']:.0%} of the limit"
        )
