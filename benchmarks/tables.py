"""The figures in the documentation, made from the results.

    python -m t2v_rt.benchmarks.tables

Rewrites what stands between `<!-- figures: NAME -->` and `<!-- end of figures -->` in the pages. Each name is a
function in `FIGURES`; a test fails where a page says something else than its results.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from t2v_rt.benchmarks import results
from t2v_rt.errors import RequestError

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/samplers.md")
BLOCK = re.compile(r"(<!-- figures: ([\w-]+) -->\n).*?(<!-- end of figures -->)", re.DOTALL)
GB, MB = 1e9, 1e6
LIBRARIES = ("numpy", "onnxruntime", "tokenizers")  # that any program of this kind imports
Report = Mapping[str, Any]


def memory_plan(true_size: Report) -> list[str]:
    """What each stage takes on a card; the way to decode that fits a small one as well."""
    plans = true_size["build_tensorrt-rtx"]["plans"]
    large, small = plans[0]["stages"], plans[-1]["stages"][-1]
    rows, columns = plans[-1]["vae_tiles"]
    names = (
        "encode, one of five engines at a time",
        "denoise",
        "decode, undivided",
        f"decode, {rows}x{columns} tiles, caches of all but one in host memory",
    )
    lines = ["| stage | weights | context | caches | inputs and outputs | total |", "|---|---|---|---|---|---|"]
    for name, stage in zip(names, [*large, small], strict=True):
        parts = [stage[f"{part}_bytes"] for part in ("weights", "context", "state", "io", "total")]
        lines.append(f"| {name} | " + " | ".join(f"{part / GB:.3f}" if part else "" for part in parts).strip() + " |")
    return [line.replace("|  |", "| |") for line in lines]


def startup(report: Report) -> list[str]:
    """Imports, and a process from its start to a video."""
    pairs = [item for key, item in report.items() if key != "machine"]
    (libraries, ours), (video, theirs) = pairs[0]["medians"], pairs[1]["medians"]
    return [
        "| | t2v-rt | compared with | ratio |",
        "|---|---|---|---|",
        f"| `from t2v_rt import TextToVideoPipeline` | {ours:.2f} s | {libraries:.2f} s, "
        f"`import {', '.join(LIBRARIES)}` | {pairs[0]['ratio']:.1f} |",
        f"| process start to finished demo video | {video:.2f} s | {theirs:.2f} s, diffusers on the same checkpoint | "
        f"{pairs[1]['ratio']:.1f} |",
    ]


def demo(step_cache: Report, guidance: Report, preview: Report) -> list[str]:
    """What the demo shows of the step cache, of guidance in one batch, and of previews."""
    cached = next(row for row in step_cache["rows"] if row["threshold"] == 0.05)
    small = [row for row in guidance["sizes"] if row["tokens"] <= 720]
    ratios = [round(100 * (row["two calls / one batch"] - 1)) for row in small]
    from_there = min(row["tokens"] for row in guidance["sizes"] if row["tokens"] > 720)
    likeness = {
        key: item["all videos"] for key, item in preview.items() if isinstance(item, dict) and "all videos" in item
    }
    return [
        f"- the step cache at 0.05 makes sampling {cached['speed_up']:.1f} times as fast at {step_cache['steps']} "
        f"steps, with {cached['psnr_db']:.0f} dB to the video without it",
        "  (`benchmarks/results/step_cache.json`);",
        f"- one batch for both predictions is {min(ratios)} to {max(ratios)} % faster than two calls up to 720 tokens, "
        f"and no faster from {from_there} on",
        "  (`benchmarks/results/guidance.json`);",
        f"- previews correlate with the decoded frames at {likeness['preview']:.2f}; the best linear map of latents to "
        f"colours alone reaches {likeness['linear map fitted to these videos']:.2f}",
        "  (`benchmarks/results/preview.json`).",
    ]


def decoding(tiles: Report) -> list[str]:
    """Memory of decoding."""
    short, long, tiled, _ = (f"{value / MB:.0f} MB" for value in tiles["peak_bytes_of_decoding"].values())
    return [
        f"Peak memory of a process that decodes 256x256 with the demo's VAE: {short} for 17 frames, {long} for 65; in",
        f"2x2 tiles {tiled} (`benchmarks/results/tiles.json`).",
    ]


def true_size(report: Report) -> list[str]:
    """The model at its true size, random weights."""
    plans, graphs, opening, video = (
        report[name] for name in ("build_tensorrt-rtx", "build_onnxruntime", "opening", "video")
    )
    stages, lengths = video["stage_seconds"], report["lengths"]
    errors = report["parity"]["encoder_error"], report["networks"]["denoiser_error"]
    chunks = max(report["networks"]["vae_chunk_errors"])
    ratios = [f"{item['ratio']:.1f}" for item in lengths.values()]

    def built(item: Report) -> str:
        return (
            f"{item['seconds']:.0f} s, at most {item['peak_rss_bytes'] / GB:.1f} GB of memory, bundle "
            f"{item['bundle_bytes'] / GB:.1f} GB"
        )

    return [
        "| | |",
        "|---|---|",
        f"| `build-engines`, fp16 plans for 832x480, 81 frames | {built(plans)} |",
        f"| `build-engines`, fp32 graphs for ONNX Runtime | {built(graphs)} |",
        f"| opening the latter, its files checked before | {opening['seconds']:.2f} s, "
        f"{opening['rss_bytes_before_the_first_call'] / MB:.0f} MB |",
        f"| a denoiser call at 256x256, 9 frames | {opening['steady_denoiser_call_seconds']:.1f} s, the first "
        f"{opening['first_denoiser_call_seconds']:.1f} s |",
        f"| a video of 256x256, 9 frames, {video['steps']} steps | encode {stages['encode']:.0f} s, denoise "
        f"{stages['denoise']:.0f} s, decode {stages['decode']:.0f} s; at most {video['peak_rss_bytes'] / GB:.1f} GB of "
        "memory |",
        f"| largest error to diffusers and transformers, relative | encoder {_error(errors[0])}, denoiser call "
        f"{_error(errors[1])}, VAE chunks {_error(chunks)} |",
        f"| encoding at the prompt's own length, not at 512 | {', '.join(ratios)} times as fast for "
        f"{', '.join(list(lengths)[:-1])}, {list(lengths)[-1]} tokens |",
    ]


def schedulers(report: Report) -> list[str]:
    """Samplers beside diffusers': draws, and the largest differences."""
    lines = [
        "| class | draws | refused by both | steps | timesteps | sigmas | sample | failed |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, item in report["classes"].items():
        differences = " | ".join(
            "0" if not item[key] else f"{item[key]:.1e}" for key in ("timesteps", "sigmas", "step")
        )
        counts = " | ".join(str(item[key]) for key in ("trials", "refused", "steps"))
        lines.append(f"| {name.removesuffix('Scheduler')} | {counts} | {differences} | {item['failed']} |")
    return lines


SETTINGS = {  # of a sampler -> in words
    "{'algorithm_type': 'sde-dpmsolver++'}": "sde-dpmsolver++",
    "{'skip_prk_steps': True}": "without Runge-Kutta start",
}


def scheduler_cost(report: Report) -> list[str]:
    """What one step of each sampler costs."""
    lines = [
        "| class | settings | ms | torch ms | ratio | allocated / latents |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for row in report["steps"]:
        settings = row["settings"]
        words = "defaults" if not settings else SETTINGS.get(str(settings)) or _flow(settings)
        name = row["class"].removesuffix("Scheduler")
        times = f"{row['ms']:.1f} | {row['torch_ms']:.1f} | {row['ratio']:.2f} | {row['allocated']:.1f}"
        lines.append(f"| {name} | {words} | {times} |")
    return lines


def _flow(settings: Report) -> str:
    order = f", order {settings['solver_order']}" if "solver_order" in settings else ""
    return f"flow{order}"


def _error(value: float) -> str:
    mantissa, _, exponent = f"{value:.0e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


# name of the figures -> what makes them, and the results it takes
FIGURES: Mapping[str, tuple[Callable[..., list[str]], tuple[str, ...]]] = {
    "memory-plan": (memory_plan, ("true_size",)),
    "startup": (startup, ("startup",)),
    "demo": (demo, ("step_cache", "guidance", "preview")),
    "decoding": (decoding, ("tiles",)),
    "true-size": (true_size, ("true_size",)),
    "schedulers": (schedulers, ("schedulers",)),
    "scheduler-cost": (scheduler_cost, ("scheduler_cost",)),
}


def rewritten(text: str, folder: Path = results.FOLDER) -> str:
    """A page with its figures made anew.

    Args:
        text: of the page.
        folder: of the results.

    Raises:
        RequestError: figures that nothing here makes.
    """

    def block(found: re.Match[str]) -> str:
        if found[2] not in FIGURES:
            raise RequestError(f"no function makes the figures {found[2]!r}; expected one of {', '.join(FIGURES)}")
        make, names = FIGURES[found[2]]
        lines = make(*(results.read(folder / f"{name}.json") for name in names))
        return "\n".join([found[1].rstrip("\n"), *lines, found[3]])

    return BLOCK.sub(block, text)


def main() -> None:
    """Rewrites the pages."""
    for name in PAGES:
        page = ROOT / name
        old = page.read_text(encoding="utf-8")
        new = rewritten(old)
        if new != old:
            page.write_text(new, encoding="utf-8")
        print(f"{name}: {'written anew' if new != old else 'as it was'}")


if __name__ == "__main__":
    main()
