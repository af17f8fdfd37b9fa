"""What TensorRT-RTX's builder tells of the memory that plans work in, for networks of Wan2.1-T2V-1.3B's widths.

    python -m t2v_rt.benchmarks.plan_contexts --output benchmarks/results/plan_contexts.json

Two layers of the denoiser and one of the text encoder do: they work in the same memory one after another. The rules of
thumb in `export/wan/contexts.py` are fitted to the result.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from t2v_rt import build_engines
from t2v_rt.benchmarks.make_checkpoint import changed, make_checkpoint
from t2v_rt.benchmarks.results import finish
from t2v_rt.benchmarks.wan_tensors import CONFIGS

SIZES = ((256, 256, 9), (240, 416, 33), (480, 832, 17), (480, 832, 81), (720, 1280, 81))
CHANGES = (
    "transformer.num_layers=2",
    "text_encoder.d_ff=10240",
    "text_encoder.num_heads=64",
)


def contexts(checkpoint: Path, output: Path, size: tuple[int, int, int]) -> list[dict[str, Any]]:
    """Builds for one size; a row for each engine and shape profile."""
    height, width, frames = size
    bundle = build_engines(
        checkpoint, output, backend="tensorrt-rtx", height=height, width=width, num_frames=frames, force=True
    )
    return [
        {
            "video": f"{width}x{height}, {frames} frames",
            "component": name,
            "role": role,
            "sizes": {symbol: ranges.max for symbol, ranges in profile.sizes.items()},
            "context_bytes": profile.context_bytes,
        }
        for name, spec in bundle.manifest.components.items()
        for role, graph in spec.graphs.items()
        if graph.plan is not None
        for profile in graph.plan.profiles
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint"
        make_checkpoint(checkpoint, changed(CONFIGS, CHANGES))
        rows = [row for size in SIZES for row in contexts(checkpoint, Path(folder) / "bundle", size)]
    finish({"changes": list(CHANGES), "contexts": rows}, options.output)


if __name__ == "__main__":
    main()
