"""`build-engines --dry-run`: what a build would need, and the memory plan of its bundle, before anything is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2v_rt.build import prepare
from t2v_rt.build.needs import estimate_needs
from t2v_rt.build.options import BuildOptions
from t2v_rt.engines.bundle.manifest import ComponentSpec
from t2v_rt.engines.bundle.profiles import PlanProfile, PlanSpec, Range
from t2v_rt.runtime.memory.advice import plan_request
from t2v_rt.runtime.options import CallOptions
from t2v_rt.system.files import free_disk_bytes
from t2v_rt.system.resources import available_memory_bytes

if TYPE_CHECKING:
    from t2v_rt.build.job import BuildJob
    from t2v_rt.build.units import Unit

SIZES = ("height", "width", "num_frames")  # options that take a size, a list of sizes or a range


def dry_run(options: BuildOptions, output: str | Path | None = None) -> dict[str, Any]:
    """Estimates a build; nothing is downloaded or written.

    Args:
        options: what is asked of the build.
        output: folder that the bundle would be written to, for the free disk; None for the current folder.

    Returns:
        What the command `plan` reports for the default size, `estimated` true; and `disk_bytes`, `memory_bytes` (of the
        build) and `free_disk_bytes`, `available_memory_bytes`. Of ranges of sizes also `listed_profiles`: the
        `profiles` of a bundle that is built for lists of their ends.

    Raises:
        InputError: the checkpoint or an option cannot be used; `build_engines` tells the kinds.
    """
    job, outline, report = _planned(options)
    listed = _as_lists(options)
    if listed != options:
        report["listed_profiles"] = _planned(listed)[2]["profiles"]
    return {
        **report,
        "estimated": True,
        **vars(estimate_needs(job, outline)),
        "free_disk_bytes": free_disk_bytes(Path(output or ".").absolute()),
        "available_memory_bytes": available_memory_bytes(),
    }


def _planned(options: BuildOptions) -> tuple[BuildJob, tuple[ComponentSpec, ...], dict[str, Any]]:
    """The job of a build, what it makes of each unit, and the plan of the default request of its bundle."""
    job, manifest = prepare(options, estimate=True)
    units = job.units(manifest)
    outline = job.outline(units)
    specs = [_with_plans(job, unit, spec) for unit, spec in zip(units, outline, strict=True)]
    components = {
        name: ComponentSpec.joined([spec for unit, spec in zip(units, specs, strict=True) if unit.component == name])
        for name in dict.fromkeys(unit.component for unit in units)
    }
    whole = manifest.with_components(components)
    return job, outline, plan_request(whole, CallOptions(prompt="", seed=0), vram_budget=options.vram_budget)


def _as_lists(options: BuildOptions) -> BuildOptions:
    """The options with lists of their ends in the place of ranges; the same without any, or where some are lists."""
    sizes = {name: str(getattr(options, name)) for name in SIZES if getattr(options, name) is not None}
    if any("," in text for text in sizes.values()):
        return options
    parts = {name: text.split(":") for name, text in sizes.items() if ":" in text}
    ends = {name: f"{part[0]},{part[-1]}" for name, part in parts.items()}  # a size between is the most usual one
    return replace(options, **ends) if ends else options  # type: ignore[arg-type]


def _with_plans(job: BuildJob, unit: Unit, spec: ComponentSpec) -> ComponentSpec:
    """The outline of a unit with the plans that would be built of it; of a unit for ONNX Runtime, itself."""
    if not unit.ranges:
        return spec
    graphs = {}
    for role, graph in spec.graphs.items():
        profiles = tuple(PlanProfile(dict(ranges), _context(job, unit, role, ranges)) for ranges in unit.ranges[role])
        graphs[role] = replace(graph, plan=PlanSpec(profiles, graph.weights_bytes))
    return replace(spec, graphs=graphs, weights_bytes=sum(graph.weights_bytes for graph in graphs.values()))


def _context(job: BuildJob, unit: Unit, role: str, ranges: Mapping[str, Range]) -> int:
    form = None if unit.graph_options is None else unit.graph_options[role]
    return job.configs.context(unit.component, role, ranges, form)
