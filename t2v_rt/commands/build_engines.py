"""The build-engines command: a checkpoint to a bundle, or what that would take."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from t2v_rt.build import build
from t2v_rt.build.dry_run import dry_run
from t2v_rt.build.options import BuildOptions
from t2v_rt.commands.bars import Bars
from t2v_rt.commands.parsing import declare_options, given_options
from t2v_rt.commands.plan import describe as describe_plan
from t2v_rt.engines.bundle.store import Bundle
from t2v_rt.errors import RequestError
from t2v_rt.options import option

EXAMPLE = "example: t2v-rt build-engines demo/bouncing-shapes --output build/demo"
FILES: Mapping[str, str] = {
    "transformer": "single safetensors file that takes the place of the checkpoint's transformer",
    "vae": "single safetensors file that takes the place of the checkpoint's vae",
    "text_encoder": "single safetensors file that takes the place of the checkpoint's text encoder",
    "tokenizer": "tokenizer.json, or its folder, that takes the place of the checkpoint's tokenizer",
}
GB = 1e9


@dataclass(frozen=True, kw_only=True)
class BuildCommand(BuildOptions):
    """The options of the command.

    Args:
        output: folder of the bundle that is written.
        dry_run: only tell what the build would take, and what the bundle would take on a card.
        force: build even where the bundle that is there could be reused.
    """

    output: str | None = option(None, metavar="BUNDLE")
    dry_run: bool = option(False)
    force: bool = option(False)


def declare(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.epilog = EXAMPLE
    declare_options(parser, BuildCommand)
    for name, text in FILES.items():
        parser.add_argument("--" + name.replace("_", "-"), metavar="FILE", help=text)


def run(parsed: argparse.Namespace) -> dict[str, Any]:
    """Builds, or estimates; returns the report."""
    files = {name: file for name in FILES if (file := vars(parsed)[name]) is not None}
    options = BuildCommand(**given_options(BuildCommand, parsed), files=files)
    if options.dry_run:
        return dry_run(options, options.output)
    if options.output is None:
        raise RequestError("--output is missing; expected the folder to write")
    with Bars() as bars:

        def tell(step: str, done: int, total: int) -> None:
            bars.update("build", done, total, detail=step)

        return _report(build(options, options.output, force=options.force, progress=tell))


def _report(bundle: Bundle) -> dict[str, Any]:
    manifest = bundle.manifest
    return {
        "output": str(bundle.folder),
        "bundle_id": manifest.bundle_id,
        "backend": manifest.backend,
        "precision": manifest.precision,
        "weights_bytes": sum(spec.weights_bytes for spec in manifest.components.values()),
        "weights": {name: spec.weights for name, spec in manifest.components.items() if spec.weights},
        "weights_errors": {name: spec.weights_error for name, spec in manifest.components.items() if spec.weights},
    }


def describe(report: Mapping[str, Any]) -> list[str]:
    """The report for a person."""
    if "estimated" in report:
        disk, free, memory, available = (
            f"{report[name] / GB:.3g}"
            for name in ("disk_bytes", "free_disk_bytes", "memory_bytes", "available_memory_bytes")
        )
        needs = f"{disk} GB of disk, {free} are free; {memory} GB of memory, {available} are available"
        return ["an estimate; nothing was built", *describe_plan(report), f"to build  {needs}"]
    lines = [
        f"bundle   {report['output']} ({report['bundle_id']})",
        f"engines  {report['backend']}, {report['precision']}",
        f"weights  {report['weights_bytes'] / 1e6:.1f} MB",
    ]
    for name, error in report["weights_errors"].items():
        told = "not measured" if error is None else f"{error:.2g}"
        lines.append(f"{name}  {report['weights'][name]} weights, error {told}")
    return lines
