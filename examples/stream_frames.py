"""Writes each frame as soon as it is decoded; Ctrl-C, or a time limit, ends the work at the next call of an engine.

python examples/stream_frames.py BUNDLE "a red ball bouncing on a blue background" frames --seconds 60
"""

from __future__ import annotations

import argparse
import signal
import threading
import time
from pathlib import Path
from typing import Any

from t2v_rt import CancelledError, TextToVideoPipeline
from t2v_rt.runtime.video import write_png


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundle", help="folder that build-engines wrote")
    parser.add_argument("prompt", help="what to show, in English or Chinese")
    parser.add_argument("folder", type=Path, help="for the frames, one png each")
    parser.add_argument("--seconds", type=float, help="time that sampling may take; no limit where it is left out")
    options = parser.parse_args()

    stop = threading.Event()
    signal.signal(signal.SIGINT, lambda number, stack: stop.set())
    start, steps, written = time.monotonic(), 0, 0

    def on_step_end(pipe: TextToVideoPipeline, step: int, t: float, tensors: dict[str, Any]) -> None:
        nonlocal steps
        steps = step + 1
        print(f"step {steps}, timestep {t:g}, latents {tensors['latents'].std():.3f} strong")
        if options.seconds is not None and time.monotonic() - start > options.seconds:
            stop.set()  # any thread may do so

    options.folder.mkdir(parents=True, exist_ok=True)
    with TextToVideoPipeline.from_pretrained(options.bundle) as pipe:
        stream = pipe.stream(options.prompt, output_type="uint8", callback_on_step_end=on_step_end, cancel=stop)
        try:
            for frame in stream:
                write_png(options.folder / f"frame_{written:04d}.png", frame)
                written += 1
        except CancelledError as exc:
            print(exc)  # the pipeline can be called again
    print(f"{steps} steps, {written} of {stream.request.num_frames} frames")


if __name__ == "__main__":
    main()
