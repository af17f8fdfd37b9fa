"""Start-up: import cost, and process start to finished video against diffusers.

    python -m t2v_rt.benchmarks.startup --engines build/demo --checkpoint demo/bouncing-shapes

Timings on a shared machine are noisy: each pair runs in turn, and medians and their ratio are reported.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from t2v_rt.benchmarks.machine import describe_machine

PROMPT = "a red ball bouncing on a blue background"
OURS = "from t2v_rt import TextToVideoPipeline"
LIBRARIES = "import os; os.environ['ORT_DISABLE_TELEMETRY'] = '1'; import numpy, onnxruntime, tokenizers"
DIFFUSERS = """
import sys
import torch
from diffusers import WanPipeline
from t2v_rt.runtime.video import open_writer
checkpoint, output, prompt, size = sys.argv[1], sys.argv[2], sys.argv[3], [int(v) for v in sys.argv[4:]]
height, width, count, steps, fps = size
pipe = WanPipeline.from_pretrained(checkpoint)
pipe.set_progress_bar_config(disable=True)
frames = pipe(prompt, height=height, width=width, num_frames=count, num_inference_steps=steps,
              generator=torch.Generator("cpu").manual_seed(0)).frames[0]
with open_writer(output, fps=fps, width=width, height=height, num_frames=count, metadata={}) as writer:
    for frame in (frames * 255).round().astype("uint8"):
        writer.write(frame)
"""


def seconds(command: Sequence[str]) -> float:
    """Wall time of a process that must succeed."""
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def compare(first: Sequence[str], second: Sequence[str], rounds: int) -> dict[str, object]:
    """Runs two commands in turn; medians in seconds, and second over first."""
    seconds(first), seconds(second)  # the first runs fill the disk cache
    pairs = [(seconds(first), seconds(second)) for _ in range(rounds)]
    medians = [statistics.median(times) for times in zip(*pairs, strict=True)]
    return {"seconds": pairs, "medians": medians, "ratio": medians[1] / medians[0]}


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-W", "ignore", "-c", code, *arguments]


def measure(engines: Path, checkpoint: Path, rounds: int) -> dict[str, object]:
    """All figures, with the machine's name."""
    defaults = json.loads((engines / "bundle.json").read_text(encoding="utf-8"))["defaults"]
    size = [str(int(defaults[key])) for key in ("height", "width", "num_frames", "num_inference_steps", "fps")]
    with tempfile.TemporaryDirectory() as folder:
        ours = [sys.executable, "-m", "t2v_rt", "generate", PROMPT, "--engines", str(engines)]
        ours += ["--output", f"{folder}/ours.mp4", "--seed", "0"]
        theirs = python(DIFFUSERS, str(checkpoint), f"{folder}/theirs.mp4", PROMPT, *size)
        video = compare(ours, theirs, rounds)
    return {
        "machine": describe_machine(),
        "import: libraries, then t2v_rt": compare(python(LIBRARIES), python(OURS), rounds),
        "process start to finished demo video: t2v_rt, then diffusers": video,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=Path, required=True, help="bundle of the demo checkpoint")
    parser.add_argument("--checkpoint", type=Path, required=True, help="the demo checkpoint")
    parser.add_argument("--rounds", type=int, default=7, help="runs of each command")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    text = json.dumps(measure(options.engines, options.checkpoint, options.rounds), indent=1)
    if options.output is not None:
        options.output.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
