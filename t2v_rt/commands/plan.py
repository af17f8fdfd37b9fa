"""The plan command: whether a request fits a card, stage by stage, before anything is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t2v_rt.commands.parsing import declare_options, given_options
from t2v_rt.engines.bundle.store import open_bundle
from t2v_rt.errors import T2VError
from t2v_rt.options import documented_by, option
from t2v_rt.plots import as_svg, new_figure
from t2v_rt.runtime.memory.advice import plan_request
from t2v_rt.runtime.options import CallOptions
from t2v_rt.system.files import writing
from t2v_rt.system.outputs import check_apart, check_file

PARTS = {"weights_bytes": "#1f6fb4", "context_bytes": "#f2a541", "state_bytes": "#7fb069", "io_bytes": "#b8b8b8"}
GB = 1e9
WIDTH, BAR, AROUND = 7.0, 0.55, 1.3  # inches of the picture: its width, a stage's height, and that of all else
LABEL_ROOM = 1.18  # of the axis, so that the label after the longest bar is inside
BUDGET_COLOUR = "#c0392b"


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
        provider: provider of ONNX Runtime that is planned for, whether it is here or not: `cpu` (where it is left out),
            or `cuda` (experimental), whose engines work in a card's memory.
        previews: plan with a preview after each step, as `generate --preview` makes them.
        picture: svg file that the plan is drawn into as well, which takes t2v-rt[plots].
    """

    bundle: str = option(positional=True, metavar="BUNDLE")
    height: int | None = option(None, read=int, metavar="PIXELS")
    width: int | None = option(None, read=int, metavar="PIXELS")
    num_frames: int | None = option(None, read=int, metavar="COUNT")
    vram_budget: str | int | None = option(None, metavar="SIZE")
    vae_tiles: str | None = option(None, metavar="RxC")
    provider: str | None = option(None, metavar="NAME")
    previews: bool = option(False)
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
        provider=options.provider,
        previews=options.previews,
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
    provider: str | None = None,
    previews: bool = False,
) -> dict[str, Any]:
    """Plans a request.

    Args:
        folder: folder of the bundle.

    Returns:
        `peak_bytes`, `budget_bytes`, `fits`, `kept` (names of the components that stay loaded), `resident` (whether
        that is all of them), `streamed` (whether the text encoder is loaded engine by engine), `vae_tiles`,
        `parked_bytes`, `stages`, the request's size, `profiles` (the contexts of each size that plans were built for);
        and where it does not fit, `largest_fitting`: the size and frames of one that does, or None; `advice` says it in
        words.

    Raises:
        BundleError: the bundle cannot be used.
        RequestError: a size that the model cannot make, or a budget or tiles that cannot be read.
        BackendError: the provider is unknown, or the bundle's backend has none to choose.
    """
    manifest = open_bundle(folder).manifest
    options = CallOptions(prompt="", seed=0, height=height, width=width, num_frames=num_frames)
    made = plan_request(
        manifest, options, vram_budget=vram_budget, vae_tiles=vae_tiles, provider=provider, previews=previews
    )
    return {"bundle_id": manifest.bundle_id, **made}


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
    lines += [_profile_line(profile) for profile in _told_profiles(report["profiles"])]
    lines += [
        f"as a list, {_profile_line({**profile, 'used': False})}" for profile in report.get("listed_profiles", ())
    ]
    reserve = (
        f", {report['reserve_bytes'] / GB:.1f} of it kept for driver and desktop" if report["reserve_bytes"] else ""
    )
    lines.append(f"peak {report['peak_bytes'] / GB:.3f} GB{reserve}; {_kept(report)}")
    if report["budget_bytes"] is not None:
        verdict = "fits" if report["fits"] else "does not fit"
        advice = "" if report["fits"] else f"; {report['advice']}"
        lines.append(f"{verdict} {report['budget_bytes'] / GB:.3f} GB{advice}")
    return lines


def _kept(report: Mapping[str, Any]) -> str:
    """What stays loaded, in words."""
    if report["resident"]:
        return "all weights stay loaded"
    names = " and ".join(report["kept"])
    stay = f"{names} {'stay' if len(report['kept']) > 1 else 'stays'} loaded" if names else "no weights stay loaded"
    return f"{stay}, the text encoder's engines are loaded one by one" if report["streamed"] else stay


def _told_profiles(profiles: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """Those that say more than the table: of several sizes, or a range."""
    return profiles if len(profiles) > 1 or any(profile["ranged"] for profile in profiles) else ()


def _profile_line(profile: Mapping[str, Any]) -> str:
    """What one profile of the plans works in."""
    contexts = " and ".join(f"{size / GB:.3f} GB to {stage}" for stage, size in profile["context_bytes"].items())
    ranged = ", for any video of the range" if profile["ranged"] else ""
    return f"profile {profile['video']}: context {contexts}{ranged}{' (this request)' if profile['used'] else ''}"


def picture(report: Mapping[str, Any]) -> bytes:
    """The plan as an SVG: a stacked bar for each stage against the card.

    Raises:
        InputError: matplotlib is not installed.
    """
    stages, budget = report["stages"], report["budget_bytes"]
    figure = new_figure(WIDTH, BAR * len(stages) + AROUND)
    axes = figure.subplots()
    names, ends = [stage["name"] for stage in stages], [0.0] * len(stages)
    for part, colour in PARTS.items():
        sizes = [stage[part] / GB for stage in stages]
        bars = axes.barh(names, sizes, left=ends, color=colour, label=part.removesuffix("_bytes"))
        for name, bar in zip(names, bars, strict=True):
            bar.set_gid(f"{name}.{part}")
        ends = [end + size for end, size in zip(ends, sizes, strict=True)]
    for row, stage in enumerate(stages):
        total = f"{stage['total_bytes'] / GB:.2f} GB"
        axes.annotate(total, (ends[row], row), (4, 0), textcoords="offset points", va="center")
    if budget is not None:
        axes.axvline(budget / GB, color=BUDGET_COLOUR, linewidth=2, gid="budget")
        place, above = (budget / GB, 1), ("data", "axes fraction")
        told = f"{budget / GB:.2f} GB"
        axes.annotate(told, place, (0, 4), above, "offset points", ha="center", color=BUDGET_COLOUR)
    axes.set_xlim(0, max([*ends, (budget or 1) / GB]) * LABEL_ROOM)
    axes.set_xlabel("GB")
    axes.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=len(PARTS), frameon=False)
    return as_svg(figure)


def check_picture(path: str | Path) -> Path:
    """Checks that the picture can be drawn and written; see `check_file`. Raises InputError without matplotlib."""
    new_figure(WIDTH, BAR)
    return check_file(path, ".svg", "an svg file")


def write_picture(report: Mapping[str, Any], path: str | Path) -> None:
    """Writes the picture, whole or not at all; raises InputError where it cannot be drawn or written there."""
    target = check_picture(path)
    try:
        with writing(target) as stream:
            stream.write(picture(report))
    except OSError as exc:
        raise T2VError(f"{target} cannot be written ({exc}); free some disk space or choose another place") from exc
