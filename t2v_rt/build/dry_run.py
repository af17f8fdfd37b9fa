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
    from t2v_rt.build.job import BuildJob, Part


def dry_run(options: BuildOptions, output: str | Path | None = None) -> dict[str, Any]:
    """Estimates a build; nothing is downloaded or written.

    Args:
        options: what is asked of the build.
        output: folder that the bundle would be written to, for the free disk; None for the current folder.

    Returns:
        What the command `plan` reports for the default size, `estimated` true; and `disk_bytes`, `memory_bytes` (of the
        build) and `free_disk_bytes`, `available_memory_bytes`.

    Raises:
        InputError: the checkpoint or an option cannot be used; `build_engines` tells the kinds.
    """
    job, manifest = prepare(options, estimate=True)
    parts = job.parts(manifest)
    outline = job.outline(parts)
    specs = [_with_plans(job, part, spec) for part, spec in zip(parts, outline, strict=True)]
    components = {
        name: ComponentSpec.joined([spec for part, spec in zip(parts, specs, strict=True) if part.component == name])
        for name in dict.fromkeys(part.component for part in parts)
    }
    whole = manifest.with_components(components)
    report = plan_request(whole, CallOptions(prompt="", seed=0), vram_budget=options.vram_budget)
    needs = estimate_needs(job, outline)
    return {
        **report,
        "estimated": True,
        **vars(needs),
        "free_disk_bytes": free_disk_bytes(Path(output or ".").absolute()),
        "available_memory_bytes": available_memory_bytes(),
    }


def _with_plans(job: BuildJob, part: Part, spec: ComponentSpec) -> ComponentSpec:
    """The outline of a part with the plans that would be built of it; of a part for ONNX Runtime, itself."""
    if not part.ranges:
        return spec
    graphs = {}
    for role, graph in spec.graphs.items():
        profiles = tuple(PlanProfile(dict(ranges), _context(job, part, role, ranges)) for ranges in part.ranges[role])
        graphs[role] = replace(graph, plan=PlanSpec(profiles, graph.weights_bytes, fused_attention=True))
    return replace(spec, graphs=graphs, weights_bytes=sum(graph.weights_bytes for graph in graphs.values()))


def _context(job: BuildJob, part: Part, role: str, ranges: Mapping[str, Range]) -> int:
    from t2v_rt.export.wan.contexts import estimate_context

    largest = {symbol: sizes.max for symbol, sizes in ranges.items()}
    form = None if part.forms is None else part.forms[role]
    return estimate_context(job.configs, part.component, role, largest, form)
