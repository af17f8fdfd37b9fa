"""The inspect command: what a bundle holds."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from t2v_rt.engines.bundle.manifest import GraphSpec, from_plain, to_plain
from t2v_rt.engines.bundle.profiles import VideoProfile, count_nodes
from t2v_rt.engines.bundle.store import open_bundle
from t2v_rt.engines.tensorrt.plan_text import FusedAttention, PlanText, Program, read_plan

EXAMPLE = "example: t2v-rt inspect build/demo"
NOT_TOLD = "not told by this plan"


def declare(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.epilog = EXAMPLE
    parser.add_argument("bundle", metavar="BUNDLE", help="folder that build-engines wrote")
    parser.add_argument(
        "--kernels",
        action="store_true",
        help="read from the plans what a card will get: kernels, attention, memory; needs no GPU",
    )


def run(parsed: argparse.Namespace) -> dict[str, Any]:
    """Inspects the bundle; returns the report."""
    return inspect_bundle(parsed.bundle, kernels=parsed.kernels)


def inspect_bundle(folder: str | Path, *, kernels: bool = False) -> dict[str, Any]:
    """Opens a bundle, all hashes checked, and returns its manifest with the nodes of each ONNX graph counted.

    Of a plan, they are those of the graph that it was built from.

    Args:
        folder: of the bundle.
        kernels: whether plans are read: `kernels` of the result has the fields of `PlanText` for the path of each.

    Raises:
        BundleError: the bundle cannot be used.
    """
    bundle = open_bundle(folder)
    report = bundle.manifest.to_json()
    report["nodes"] = {
        graph.path: count_nodes(bundle.folder / graph.path) if graph.plan is None else dict(graph.plan.nodes)
        for spec in bundle.manifest.components.values()
        for graph in spec.graphs.values()
    }
    if kernels:
        plans = [
            graph.path for spec in bundle.manifest.components.values() for graph in spec.graphs.values() if graph.plan
        ]
        report["kernels"] = {path: to_plain(_read(bundle.folder / path)) for path in plans}
    return report


def _read(path: Path) -> PlanText:
    with path.open("rb") as stream:
        return read_plan(stream)


def describe(report: Mapping[str, Any]) -> list[str]:
    """The report for a person."""
    defaults, scheduler = report["defaults"], report["scheduler"]
    lines = [
        f"bundle     {report['bundle_id']} (schema {report['schema_version']}), all files as built",
        f"engines    {report['backend']}, {report['precision']}, family {report['model']['family']}",
        f"defaults   {defaults['width']}x{defaults['height']}, {defaults['num_frames']} frames at "
        f"{defaults['fps']:g}/s, {defaults['num_inference_steps']} steps, guidance {defaults['guidance_scale']:g}",
        f"scheduler  {scheduler.get('_class_name')}, flow shift {scheduler.get('flow_shift', scheduler.get('shift'))}",
    ]
    if report["attention_accumulation"]:
        lines[1] += f", attention built to add up in {report['attention_accumulation']}"
    if report["targets"]:
        built = ", ".join(f"{name} {version}" for name, version in report["builder"].items())
        lines += [f"GPUs       {', '.join(report['targets'])}", f"built by   {built}"]
    lines += [f"videos     {from_plain(profile, VideoProfile)}" for profile in report["profiles"]]
    if report.get("kernels") == {}:
        lines.append("kernels    there are no plans to read, the engines are ONNX graphs")
    for name, fields in report["components"].items():
        lines.append(f"{name}  {fields['weights_bytes'] / 1e6:.1f} MB of weights, {fields['precision']}")
        if (table := fields["embedding"]) is not None:
            size = f"{table['dtype']}[{table['rows']}, {table['columns']}]"
            lines.append(f"  embedding  {table['path']}, {size}, on the host")
        for role, raw in fields["graphs"].items():
            lines += _describe_graph(role, from_plain(raw, GraphSpec), report["nodes"].get(raw["path"], {}))
            if raw["path"] in report.get("kernels", {}):
                lines += _describe_plan(from_plain(report["kernels"][raw["path"]], PlanText))
    return lines


def _describe_graph(role: str, graph: GraphSpec, nodes: Mapping[str, int]) -> list[str]:
    def line(kind: str, specs: Any) -> str:
        return f"    {kind}  " + ", ".join(f"{s.name} {s.dtype}[{', '.join(map(str, s.shape))}]" for s in specs)

    lines = [f"  {role}  {graph.path}", line("in ", graph.inputs), line("out", graph.outputs)]
    if graph.states:
        lines.append(f"    state  {len(graph.states)} tensors kept from call to call")
    if graph.plan is not None:
        lines.append(f"    memory  {graph.plan.weights_bytes / 1e6:.1f} MB of weights and, for a call of at most")
        for profile in graph.plan.profiles:
            sizes = ", ".join(f"{symbol} {ranges.max}" for symbol, ranges in profile.sizes.items())
            lines.append(f"            {sizes}: {profile.context_bytes / 1e6:.1f} MB")
        if graph.plan.attention is not None:
            lines.append(f"    attention  {graph.plan.attention}")
    if nodes:
        lines.append("    nodes  " + ", ".join(f"{count} {kind}" for kind, count in nodes.items()))
    return lines


def _describe_plan(plan: PlanText) -> list[str]:
    """What a plan tells of itself, one program after another."""
    lines = [] if plan.programs else [f"    kernels  {NOT_TOLD}"]
    for program in plan.programs:
        targets = NOT_TOLD if program.targets is None else ", ".join(program.targets)
        lines.append(f"    program  for {targets}")
        if program.launches is None:
            lines.append(f"      kernels  {NOT_TOLD}")
        else:
            lines.append(f"      kernels  {program.launches} launched, {program.sources} different ones come as source")
        lines.append(f"      regions  {_describe_regions(program)}")
        lines += [f"      attention  {line}" for line in _describe_attention(program)]
    return lines


def _describe_regions(program: Program) -> str:
    if program.regions is None:
        return NOT_TOLD
    own = [item.bytes for item in program.regions if item.is_context]
    others = sum(item.bytes for item in program.regions if not item.is_context and item.place == "accelerator")
    return f"{sum(own) / 1e6:.1f} MB in {len(own)} to work in, {others / 1e6:.1f} MB of the library's"


def _describe_attention(program: Program) -> list[str]:
    if program.fused is None or program.unfused is None:
        return [NOT_TOLD]
    kinds = Counter(replace(item, kernel="", layer="") for item in program.fused)
    lines = [f"{count} fused, {_describe_kind(item)}" for item, count in kinds.items()]
    return [*lines, *([f"{len(program.unfused)} not fused, scores are in memory"] if program.unfused else [])]


def _describe_kind(item: FusedAttention) -> str:
    queries, keys = ("any number of" if count is None else str(count) for count in (item.queries, item.keys))
    if item.alike is None:
        lengths = f"lengths {NOT_TOLD}"
    else:
        lengths = f"{queries} queries, {'as many' if item.alike else keys} keys"
    sums = (f"{name} {kind or NOT_TOLD}" for name, kind in (("scores", item.scores), ("values", item.values)))
    return f"{lengths}; sums: {', '.join(sums)}"
