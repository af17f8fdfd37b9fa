"""The plan command: whether a request fits a card, stage by stage, before anything is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from t2v_rt.commands.parsing import declare_options, given_options
from t2v_rt.engines.bundle.store import open_bundle
from t2v_rt.errors import T2VError
from t2v_rt.options import documented_by, option
from t2v_rt.runtime.memory.advice import plan_request
from t2v_rt.runtime.options import CallOptions
from t2v_rt.system.files import replacing
from t2v_rt.system.outputs import check_apart, check_file

PARTS = {"weights_bytes": "#1f6fb4", "context_bytes": "#f2a541", "state_bytes": "#7fb069", "io_bytes": "#b8b8b8"}
GB = 1e9
LEFT, BAR, GAP, WIDTH = 80, 34, 18, 640  # of the picture


EXAMPLE = "example: t2v-rt plan build/demo --vram-budget 8GiB"


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """The options of the command.

    Args:
        bundle: folder that build-engines wrote.
        height: height of the video in pixels; the bundle's default where it is left out.
        width: width of the video in pixels; the bundle's default where it is left out.
        num_frames: frames of the video; the bundle's default where it is left out.
        vram_budget: memory of the card, such as `8GiB`.
        vae_tiles: tiles of the VAE decoder, such as `2x3`; as few as fit the budget where it is left out.
        picture: svg file that the plan is drawn into as well.
    """

    bundle: str = option(positional=True, metavar="BUNDLE")
    height: int | None = option(None, read=int, metavar="PIXELS")
    width: int | None = option(None, read=int, metavar="PIXELS")
    num_frames: int | None = option(None, read=int, metavar="COUNT")
    vram_budget: str | int | None = option(None, metavar="SIZE")
    vae_tiles: str | None = option(None, metavar="RxC")
    picture: str | None = option(None, metavar="FILE")


def declare(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.epilog = EXAMPLE
    declare_options(parser, PlanOptions)


def run(parsed: argparse.Namespace) -> dict[str, Any]:
    """Plans the request, and draws the plan where that is asked for; returns the report."""
    options = PlanOptions(**given_options(PlanOptions, parsed))
    if options.picture is not None:
        check_apart({"--picture": check_picture(options.picture)}, {"BUNDLE": options.bundle})
    report = plan(
        options.bundle,
        height=options.height,
        width=options.width,
        num_frames=options.num_frames,
        vram_budget=options.vram_budget,
        vae_tiles=options.vae_tiles,
    )
    if options.picture is not None:
        write_picture(report, options.picture)
    return report


@documented_by(PlanOptions)
def plan(
    folder: str | Path,
    *,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    vram_budget: str | int | None = None,
    vae_tiles: str | None = None,
) -> dict[str, Any]:
    """Plans a request.

    Args:
        folder: folder of the bundle.

    Returns:
        `peak_bytes`, `budget_bytes`, `fits`, `resident`, `streamed`, `vae_tiles`, `parked_bytes`, `stages`, the
        request's size; and where it does not fit, `largest_fitting`: the size and frames of one that does, or None;
        `advice` says it in words.

    Raises:
        BundleError: the bundle cannot be used.
        RequestError: a size that the model cannot make, or a budget or tiles that cannot be read.
    """
    manifest = open_bundle(folder).manifest
    options = CallOptions(prompt="", seed=0, height=height, width=width, num_frames=num_frames)
    return {
        "bundle_id": manifest.bundle_id,
        **plan_request(manifest, options, vram_budget=vram_budget, vae_tiles=vae_tiles),
    }


def describe(report: Mapping[str, Any]) -> list[str]:
    """The plan as a table for a person."""
    rows, columns = report["vae_tiles"]
    staged = any(stage["staging_bytes"] for stage in report["stages"])
    lines = [
        f"{report['width']}x{report['height']}, {report['num_frames']} frames, {report['backend']}, "
        f"{'contexts estimated' if report['estimated'] else 'contexts as the builder told them'}; "
        f"VAE tiles {rows}x{columns}"
        + (f", {report['parked_bytes'] / GB:.2f} GB of their caches in host memory" if report["parked_bytes"] else ""),
        f"{'GB':8}{'weights':>9}{'context':>9}{'state':>9}{'io':>9}{'total':>9}"
        + (f"{'staging':>9} (pinned, of the host)" if staged else ""),
    ]
    for stage in report["stages"]:
        cells = [*(stage[part] for part in PARTS), stage["total_bytes"]]
        cells += [stage["staging_bytes"]] if staged else []
        lines.append(f"{stage['name']:8}" + "".join(f"{cell / GB:9.3f}" for cell in cells))
    kept = "all weights stay loaded" if report["resident"] else "each stage's weights are released after it"
    kept += ", the text encoder's engine by engine" if report["streamed"] else ""
    reserve = (
        f", {report['reserve_bytes'] / GB:.1f} of it kept for driver and desktop" if report["reserve_bytes"] else ""
    )
    lines.append(f"peak {report['peak_bytes'] / GB:.3f} GB{reserve}, {kept}")
    if report["budget_bytes"] is not None:
        verdict = "fits" if report["fits"] else "does not fit"
        advice = "" if report["fits"] else f"; {report['advice']}"
        lines.append(f"{verdict} {report['budget_bytes'] / GB:.3f} GB{advice}")
    return lines


def picture(report: Mapping[str, Any]) -> str:
    """The plan as an SVG: a stacked bar for each stage against the card."""
    most = max(report["budget_bytes"] or 0, *(stage["total_bytes"] for stage in report["stages"]), 1)
    scale = (WIDTH - LEFT - GAP) / most
    bottom = GAP + len(report["stages"]) * (BAR + GAP)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 44}" font-family="sans-serif" '
        'font-size="13">',
        f'<rect width="{WIDTH}" height="{bottom + 44}" fill="white"/>',
    ]
    for i, stage in enumerate(report["stages"]):
        x, y = float(LEFT), GAP + i * (BAR + GAP)
        lines.append(f'<text x="8" y="{y + 22}">{escape(stage["name"])}</text>')
        for part, colour in PARTS.items():
            wide = stage[part] * scale
            lines.append(f'<rect x="{x:.1f}" y="{y}" width="{wide:.1f}" height="{BAR}" fill="{colour}"/>')
            x += wide
        lines.append(f'<text x="{min(x + 6, WIDTH - 70):.1f}" y="{y + 22}">{stage["total_bytes"] / GB:.2f} GB</text>')
    if report["budget_bytes"] is not None:
        x = LEFT + report["budget_bytes"] * scale
        lines.append(f'<path d="M{x:.1f} 6V{bottom}" stroke="#c0392b" stroke-width="2"/>')
        lines.append(
            f'<text x="{x - 4:.1f}" y="{bottom + 12}" text-anchor="end">{report["budget_bytes"] / GB:.2f} GB</text>'
        )
    for i, (part, colour) in enumerate(PARTS.items()):
        x, y = LEFT + i * 120, bottom + 22
        lines.append(f'<rect x="{x}" y="{y}" width="12" height="12" fill="{colour}"/>')
        lines.append(f'<text x="{x + 18}" y="{y + 11}">{part.removesuffix("_bytes")}</text>')
    return "\n".join([*lines, "</svg>", ""])


def check_picture(path: str | Path) -> Path:
    """Checks that the picture can be written; see `check_file`."""
    return check_file(path, ".svg", "an svg file")


def write_picture(report: Mapping[str, Any], path: str | Path) -> None:
    """Writes the picture, whole or not at all; raises RequestError where it cannot be written."""
    target = check_picture(path)
    try:
        with replacing(target) as temporary:
            temporary.write_text(picture(report), encoding="utf-8", newline="\n")
    except OSError as exc:
        raise T2VError(f"{target} cannot be written ({exc}); free some disk space or choose another place") from exc
