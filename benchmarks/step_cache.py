"""What the step cache saves and what it costs: skipped calls, speed-up and PSNR for thresholds, as figures and a plot.

    python -m t2v_rt.benchmarks.step_cache --engines build/demo

Each video is sampled in turn without and with the cache; the speed-up is the median of the ratios of both denoise
stages, the PSNR is that of the cached video against the uncached one, all frames of all prompts together.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from t2v_rt import TextToVideoPipeline
from t2v_rt.benchmarks.results import FOLDER, write
from t2v_rt.plots import as_svg, new_figure

PROMPTS = (
    "a red ball bouncing on a blue background",
    "a green square moving left on a yellow background",
    "a yellow triangle going up on a black background",
    "白色背景上有一个蓝色的球在向右移动",
)
THRESHOLDS = (0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2)
RESULTS = FOLDER / "step_cache.json"


def measure(pipe: TextToVideoPipeline, threshold: float, steps: int, rounds: int) -> dict[str, Any]:
    """One threshold over all prompts."""
    ratios, errors, calls, skipped = [], [], 0, 0
    for seed, prompt in enumerate(PROMPTS):
        for _ in range(rounds):
            whole = pipe(prompt, seed=seed, num_inference_steps=steps)
            cached = pipe(prompt, seed=seed, num_inference_steps=steps, step_cache=threshold)
            ratios.append(whole.stage_seconds["denoise"] / cached.stage_seconds["denoise"])
        errors.append(float(np.mean(np.square(whole.frames - cached.frames), dtype=np.float64)))
        calls += sum(cached.step_calls)
        skipped += cached.skipped_calls
    return {
        "threshold": threshold,
        "calls": calls,
        "skipped": skipped,
        "speed_up": round(statistics.median(ratios), 2),
        "psnr_db": round(-10 * math.log10(statistics.mean(errors)), 1),
        "worst_psnr_db": round(-10 * math.log10(max(errors)), 1),
    }


def plot(report: Mapping[str, Any]) -> bytes:
    """Speed-up and PSNR of each threshold, as an SVG."""
    rows = report["rows"]
    figure = new_figure(6.4, 4.0)
    axes = figure.subplots()
    axes.plot([row["speed_up"] for row in rows], [row["psnr_db"] for row in rows], "o-")
    for row in rows:
        point = row["speed_up"], row["psnr_db"]
        axes.annotate(f"{row['threshold']:g}", point, (8, 6), textcoords="offset points")
    axes.set_title(f"Step cache, {report['steps']} steps: thresholds")
    axes.set_xlabel("speed-up of denoising")
    axes.set_ylabel("PSNR to the uncached video, dB")
    axes.margins(0.12)
    axes.grid(alpha=0.4)
    return as_svg(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints and stores a row for each threshold, and draws them."""
    parser = argparse.ArgumentParser(description="Speed-up and PSNR of the step cache.")
    parser.add_argument("--engines", required=True, metavar="BUNDLE")
    parser.add_argument("--num-inference-steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3, help="pairs of videos for each prompt (3)")
    parser.add_argument("--plot", metavar="FILE", help="svg to draw")
    options = parser.parse_args(arguments)
    pipe = TextToVideoPipeline.from_pretrained(options.engines)
    rows = []
    for threshold in THRESHOLDS:
        row = measure(pipe, threshold, options.num_inference_steps, options.rounds)
        rows.append(row)
        print(
            f"threshold {threshold:<5} skipped {row['skipped']} of {row['skipped'] + row['calls']}  "
            f"{row['speed_up']:.2f}x  {row['psnr_db']} dB (worst video {row['worst_psnr_db']})",
            flush=True,
        )
    report = {
        "bundle_id": pipe.manifest.bundle_id,
        "steps": options.num_inference_steps,
        "prompts": PROMPTS,
        "rows": rows,
    }
    write(RESULTS, report)
    if options.plot:
        Path(options.plot).write_bytes(plot(report))


if __name__ == "__main__":
    main()
