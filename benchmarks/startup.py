"""Start-up: import cost, and process start to the first denoised step and to the finished video, against diffusers.

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
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from t2v_rt.benchmarks.results import finish
from t2v_rt.benchmarks.timing import alternate

PROMPT = "a red ball bouncing on a blue background"
OURS = "from t2v_rt import TextToVideoPipeline"
LIBRARIES = "import os; os.environ['ORT_DISABLE_TELEMETRY'] = '1'; import numpy, onnxruntime, tokenizers"
DIFFUSERS = """
import sys
import torch
from diffusers import DiffusionPipeline
from t2v_rt.runtime.video import open_writer
checkpoint, output, prompt, size = sys.argv[1], sys.argv[2], sys.argv[3], [int(v) for v in sys.argv[4:]]
height, width, count, steps, fps = size
pipe = DiffusionPipeline.from_pretrained(checkpoint)
pipe.set_progress_bar_config(disable=True)
frames = pipe(prompt, height=height, width=width, num_frames=count, num_inference_steps=steps,
              generator=torch.Generator("cpu").manual_seed(0)).frames[0]
with open_writer(output, fps=fps, width=width, height=height, num_frames=count, metadata={}) as writer:
    for frame in (frames * 255).round().astype("uint8"):
        writer.write(frame)
"""
FIRST_STEP = """
import sys
from t2v_rt import TextToVideoPipeline
bundle, prompt = sys.argv[1:]
pipe = TextToVideoPipeline.from_pretrained(bundle, prompt_cache=False)
pipe(prompt, seed=0, callback_on_step_end=lambda *_: sys.exit())
"""
DIFFUSERS_FIRST_STEP = """
import sys
import torch
from diffusers import DiffusionPipeline
checkpoint, prompt, size = sys.argv[1], sys.argv[2], [int(v) for v in sys.argv[3:]]
height, width, count, steps = size
pipe = DiffusionPipeline.from_pretrained(checkpoint)
pipe.set_progress_bar_config(disable=True)
pipe(prompt, height=height, width=width, num_frames=count, num_inference_steps=steps,
     callback_on_step_end=lambda *_: sys.exit())
"""


def compare(first: Sequence[str], second: Sequence[str], rounds: int) -> dict[str, object]:
    """Runs two commands in turn, after one run of each that fills the disk cache; medians, and second over first."""
    run = partial(subprocess.run, check=True, capture_output=True)
    times = alternate({"first": partial(run, first), "second": partial(run, second)}, rounds)
    medians = [statistics.median(values) for values in times.values()]
    return {"seconds": list(zip(*times.values(), strict=True)), "medians": medians, "ratio": medians[1] / medians[0]}


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-W", "ignore", "-c", code, *arguments]


def measure(engines: Path, checkpoint: Path, rounds: int) -> dict[str, object]:
    """All figures."""
    defaults = json.loads((engines / "bundle.json").read_text(encoding="utf-8"))["defaults"]
    size = [str(int(defaults[key])) for key in ("height", "width", "num_frames", "num_inference_steps", "fps")]
    with tempfile.TemporaryDirectory() as folder:
        ours = [sys.executable, "-m", "t2v_rt", "generate", PROMPT, "--engines", str(engines)]
        ours += ["--output", f"{folder}/ours.mp4", "--seed", "0"]
        theirs = python(DIFFUSERS, str(checkpoint), f"{folder}/theirs.mp4", PROMPT, *size)
        video = compare(ours, theirs, rounds)
    ours, theirs = (
        python(FIRST_STEP, str(engines), PROMPT),
        python(DIFFUSERS_FIRST_STEP, str(checkpoint), PROMPT, *size[:4]),
    )
    return {
        "import: libraries, then t2v_rt": compare(python(LIBRARIES), python(OURS), rounds),
        "process start to finished demo video: t2v_rt, then diffusers": video,
        "process start to first denoised step: t2v_rt, then diffusers": compare(ours, theirs, rounds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=Path, required=True, help="bundle of the demo checkpoint")
    parser.add_argument("--checkpoint", type=Path, required=True, help="the demo checkpoint")
    parser.add_argument("--rounds", type=int, default=7, help="runs of each command")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    finish(measure(options.engines, options.checkpoint, options.rounds), options.output)


if __name__ == "__main__":
    main()
