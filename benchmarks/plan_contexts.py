"""What TensorRT-RTX's builder tells of the memory that plans work in, for networks of Wan2.1-T2V-1.3B's widths.

    python -m t2v_rt.benchmarks.plan_contexts --output benchmarks/results/plan_contexts.json

Four layers of the denoiser and one of the text encoder do: they work in the same memory one after another. (Two are too
few: with them the builder finds an order that it does not find with more. For one GPU four are too few as well: all 30
work in 1.01 GB of sm89 at 832x480 with 81 frames, four in 0.81.) The rules of thumb in `export/wan/contexts.py` are
fitted to the result.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from t2v_rt.benchmarks.make_checkpoint import changed, make_checkpoint
from t2v_rt.benchmarks.results import finish
from t2v_rt.benchmarks.wan_tensors import CONFIGS
from t2v_rt.build import prepare
from t2v_rt.build.options import BuildOptions
from t2v_rt.build.work_folder import open_work_folder
from t2v_rt.engines.bundle.manifest import ComponentSpec, from_plain, to_plain
from t2v_rt.engines.tensorrt.libraries import DEFAULT_TARGETS

# height, width and frames: fixed ones, several, and ranges
SIZES = (
    ("256", "256", "9"),
    ("240", "416", "33"),
    ("480", "832", "17"),
    ("480", "832", "81"),
    ("720", "1280", "81"),
    ("480,720", "832,1280", "81"),
    ("480", "832", "17:81"),
    ("480:720", "832:1280", "81"),
    ("480:720", "832:1280", "17:81"),
    ("240:480", "416:832", "17:33"),
    ("720", "1280", "17:81"),
    ("480", "832:1280", "81"),
)
GPUS = (DEFAULT_TARGETS, ("sm89",))
CHANGES = (
    "transformer.num_layers=4",
    "text_encoder.d_ff=10240",
    "text_encoder.num_heads=64",
)


def contexts(checkpoint: Path, place: Path, size: tuple[str, str, str], gpus: tuple[str, ...]) -> list[dict[str, Any]]:
    """Builds for sizes; a row for each engine and shape profile."""
    height, width, frames = size
    options = BuildOptions(checkpoint, backend="tensorrt-rtx", height=height, width=width, num_frames=frames, gpus=gpus)
    job, manifest = prepare(options, estimate=True)
    rows = []
    with tempfile.TemporaryDirectory(dir=place) as folder, open_work_folder(Path(folder) / "plans", "") as work:
        for unit in job.units(manifest):
            spec = from_plain(
                work.part(unit.name, partial(job.build_unit, unit, work, lambda done: None)), ComponentSpec
            )
            rows += [
                {
                    "gpus": list(gpus),
                    "video": f"{height}x{width}, {frames} frames",
                    "component": unit.component,
                    "role": role,
                    "sizes": to_plain(profile.sizes),
                    "profiles": len(graph.plan.profiles),
                    "context_bytes": profile.context_bytes,
                }
                for role, graph in spec.graphs.items()
                if graph.plan is not None
                for profile in graph.plan.profiles
            ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint"
        make_checkpoint(checkpoint, changed(CONFIGS, CHANGES))
        for gpus in GPUS:
            for size in SIZES:
                rows += contexts(checkpoint, Path(folder), size, gpus)
                print("x".join(size), *gpus, *(row["context_bytes"] for row in rows[-5:]), file=sys.stderr, flush=True)
    finish({"changes": list(CHANGES), "contexts": rows}, options.output)


if __name__ == "__main__":
    main()
