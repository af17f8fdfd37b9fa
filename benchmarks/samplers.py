"""One video by every sampler that can sample a bundle's model, as rows of a contact sheet.

    python -m t2v_rt.benchmarks.samplers --engines build/demo --sheet docs/samplers.png

The others say in one line why they cannot. Needs Pillow for the labels (t2v-rt[pil]).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from t2v_rt import TextToVideoPipeline
from t2v_rt.errors import RequestError
from t2v_rt.runtime.schedulers import available_schedulers, get_scheduler
from t2v_rt.runtime.video import write_png

PROMPT = "a red ball bouncing on a blue background"
SHOWN = 6  # frames of each video
LABEL_WIDTH = 90
Frame = NDArray[np.uint8]


def row_of(name: str, frames: Frame) -> Frame:
    """A label and some evenly spaced frames, side by side."""
    chosen = frames[np.linspace(0, len(frames) - 1, SHOWN).round().astype(int)]
    label = Image.new("RGB", (LABEL_WIDTH, frames.shape[1]), "white")
    ImageDraw.Draw(label).text((4, frames.shape[1] // 2 - 6), name, fill="black")
    return np.concatenate([np.asarray(label), *chosen], axis=1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Makes the videos and the sheet."""
    parser = argparse.ArgumentParser(description="Contact sheet of all samplers.")
    parser.add_argument("--engines", required=True, metavar="BUNDLE")
    parser.add_argument("--sheet", required=True, metavar="FILE", help="png to write")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--seed", type=int, default=3)
    options = parser.parse_args(arguments)
    pipe = TextToVideoPipeline.from_pretrained(options.engines)
    rows = []
    for name in available_schedulers():
        try:
            pipe.scheduler = get_scheduler(name, pipe.manifest.scheduler)
        except RequestError as exc:
            print(f"{name:16} {exc}")
            continue
        out = pipe(options.prompt, seed=options.seed, output_type="uint8")
        print(f"{name:16} {sum(out.step_calls)} calls, {out.stage_seconds['denoise']:.2f} s", flush=True)
        rows.append(row_of(name, out.frames[0]))
    write_png(Path(options.sheet), np.concatenate(rows))


if __name__ == "__main__":
    main()
