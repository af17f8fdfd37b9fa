"""The inspect command: what a bundle holds."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from t2v_rt.engines.bundle.manifest import GraphSpec, from_plain
from t2v_rt.engines.bundle.profiles import VideoProfile, count_nodes
from t2v_rt.engines.bundle.store import open_bundle

EXAMPLE = "example: t2v-rt inspect build/demo"


def declare(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.epilog = EXAMPLE
    parser.add_argument("bundle", metavar="BUNDLE", help="folder that build-engines wrote")


def run(parsed: argparse.Namespace) -> dict[str, Any]:
    """Inspects the bundle; returns the report."""
    return inspect_bundle(parsed.bundle)


def inspect_bundle(folder: str | Path) -> dict[str, Any]:
    """Opens a bundle, all hashes checked, and returns its manifest with the nodes of each ONNX graph counted.

    Of a plan, they are those of the graph that it was built from.

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
    return report


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
    if report["targets"]:
        built = ", ".join(f"{name} {version}" for name, version in report["builder"].items())
        lines += [f"GPUs       {', '.join(report['targets'])}", f"built by   {built}"]
    lines += [f"videos     {from_plain(profile, VideoProfile)}" for profile in report["profiles"]]
    for name, fields in report["components"].items():
        lines.append(f"{name}  {fields['weights_bytes'] / 1e6:.1f} MB of weights, {fields['precision']}")
        if (table := fields["embedding"]) is not None:
            size = f"{table['dtype']}[{table['rows']}, {table['columns']}]"
            lines.append(f"  embedding  {table['path']}, {size}, on the host")
        for role, raw in fields["graphs"].items():
            lines += _describe_graph(role, from_plain(raw, GraphSpec), report["nodes"].get(raw["path"], {}))
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
        if nodes.get("Attention"):
            lines.append(
                f"    attention  {'fused' if graph.plan.fused_attention else 'not fused, scores are in memory'}"
            )
    if nodes:
        lines.append("    nodes  " + ", ".join(f"{count} {kind}" for kind, count in nodes.items()))
    return lines
