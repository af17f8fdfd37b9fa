"""How time and memory grow: a prediction's with the tokens, decoding's with the frames; as figures, fits and a plot.

    python -m t2v_rt.benchmarks.scaling build/demo --output build/scaling.json --plot build/scaling.svg

Each size runs in a process of its own. Attention is quadratic in the tokens, all else is linear; so the denoiser's
times are fitted by a parabola, and those of decoding, and its memory, by a line.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from t2v_rt.benchmarks.options import BenchOptions
from t2v_rt.benchmarks.peers import OURS
from t2v_rt.benchmarks.results import finish
from t2v_rt.benchmarks.timing import as_json, summarize
from t2v_rt.benchmarks.worker import Worker
from t2v_rt.benchmarks.workloads import DECODE, DENOISER, Workload
from t2v_rt.engines.bundle.manifest import Manifest
from t2v_rt.engines.bundle.store import open_bundle
from t2v_rt.errors import RequestError
from t2v_rt.plots import as_svg, new_figure

SIZES = ("64x64x9", "64x64x17", "128x128x9", "128x128x17", "192x192x17", "256x256x17", "320x320x17")  # of predictions
VIDEO, FRAMES = "128x128", (9, 17, 33, 49, 65)  # of decoding
ROUNDS = 3
DEGREES: Mapping[str, int] = {DENOISER: 2, DECODE: 1}


def parse_size(text: str) -> tuple[int, int, int]:
    """Reads `832x480x81`, width first as videos are named; raises RequestError for anything else."""
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdigit() for part in parts):
        raise RequestError(f"{text!r} is no size; expected WIDTHxHEIGHTxFRAMES, such as 832x480x81")
    width, height, frames = map(int, parts)
    return height, width, frames


def measure(options: BenchOptions, manifest: Manifest, kind: str, size: tuple[int, int, int]) -> dict[str, Any]:
    """Times and peak memory of one size, after a first run that loads and allocates."""
    job = options.job(manifest, Workload(kind, "", size))
    with Worker(OURS, job) as worker:
        runs = [worker.ask("run") for _ in range(1 + options.runs)]
        peak = worker.ask("facts")["peak_rss_bytes"]
    return {
        "width": job.width,
        "height": job.height,
        "num_frames": job.num_frames,
        "tokens": job.tokens(manifest.model),
        "first_seconds": runs[0]["seconds"],
        **as_json(summarize([run["seconds"] for run in runs[1:]])),
        "peak_rss_bytes": peak,
    }


def fit(xs: Sequence[float], ys: Sequence[float], degree: int) -> dict[str, Any]:
    """A polynomial by least squares of the relative errors, so that small sizes count as much as large ones.

    Args:
        xs: sizes.
        ys: what was measured.
        degree: of the polynomial.

    Returns:
        `coefficients`, the constant first; `largest_error`, relative; `shares` of the terms at the largest size.
    """
    x, y = np.asarray(xs, np.float64), np.asarray(ys, np.float64)
    powers = np.stack([x**power for power in range(degree + 1)], axis=1)
    scale = powers.max(axis=0)
    solution = np.linalg.lstsq(powers / scale / y[:, None], np.ones_like(y), rcond=None)[0] / scale
    found = powers @ solution
    last = powers[x.argmax()] * solution
    return {
        "coefficients": solution.tolist(),
        "largest_error": float(np.abs(found / y - 1).max()),
        "shares": (last / last.sum()).tolist(),
    }


def report(options: BenchOptions, sizes: Sequence[tuple[int, int, int]]) -> dict[str, Any]:
    """All figures.

    Args:
        options: of the bundle, its threads and runs.
        sizes: of predictions: height, width, frames.
    """
    manifest = open_bundle(options.bundle).manifest
    predictions = [measure(options, manifest, DENOISER, size) for size in sizes]
    height, width, _ = parse_size(f"{VIDEO}x1")
    decodes = [measure(options, manifest, DECODE, (height, width, frames)) for frames in FRAMES]
    tokens, frames = [row["tokens"] for row in predictions], [row["num_frames"] for row in decodes]
    return {
        "bundle_id": manifest.bundle_id,
        "runs": options.runs,
        "predictions": predictions,
        "decodes": decodes,
        "fits": {
            "seconds of a prediction, by tokens": fit(tokens, [row["p50"] for row in predictions], DEGREES[DENOISER]),
            "seconds of decoding, by frames": fit(frames, [row["p50"] for row in decodes], DEGREES[DECODE]),
            "bytes of decoding, by frames": fit(frames, [row["peak_rss_bytes"] for row in decodes], DEGREES[DECODE]),
        },
    }


def plot(found: Mapping[str, Any]) -> bytes:
    """What was measured, and the fits, as an SVG."""
    figure = new_figure(9.0, 3.2)
    rows = (found["predictions"], found["decodes"], found["decodes"])
    across, up = ("tokens", "num_frames", "num_frames"), ("p50", "p50", "peak_rss_bytes")
    labels = ("seconds of a prediction", "seconds of decoding", "MB of decoding")
    for axes, items, x, y, label, fitted in zip(
        figure.subplots(1, 3), rows, across, up, labels, found["fits"].values(), strict=True
    ):
        unit = 1e-6 if y == "peak_rss_bytes" else 1.0
        line = np.linspace(0, max(item[x] for item in items), 100)
        values = sum(factor * line**power for power, factor in enumerate(fitted["coefficients"]))
        axes.plot(line, unit * values, "-", color="#b8b8b8")
        axes.plot([item[x] for item in items], [unit * item[y] for item in items], "o")
        axes.set_xlabel(x.replace("num_", ""))
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.4)
    return as_svg(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engines", metavar="BUNDLE", help="folder that build-engines wrote")
    parser.add_argument("--size", action="append", metavar="WxHxF", help="of a prediction; may be given several times")
    parser.add_argument("--runs", type=int, default=ROUNDS, help="of each size, after the first")
    parser.add_argument("--threads", type=int, help="of each engine")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--plot", type=Path, help="svg to draw")
    given = parser.parse_args()
    options = BenchOptions(bundle=given.engines, runs=given.runs, threads=given.threads)
    found = report(options, [parse_size(size) for size in given.size or SIZES])
    if given.plot is not None:
        given.plot.write_bytes(plot(found))
    finish(found, given.output)


if __name__ == "__main__":
    main()
