"""Compares samplers: how near each comes, in so many steps, to the first one in many.

python examples/compare_samplers.py BUNDLE "a red ball bouncing on a blue background" --samplers unipc euler
"""

from __future__ import annotations

import argparse

import numpy as np
from numpy.typing import NDArray

from t2v_rt import TextToVideoPipeline
from t2v_rt.runtime.schedulers import fitting_schedulers, get_scheduler


def psnr(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """In decibels, of frames in [0, 1]; infinite where they are equal."""
    error = float(np.mean((found - expected) ** 2))
    return float("inf") if error == 0 else -10 * float(np.log10(error))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundle", help="folder that build-engines wrote")
    parser.add_argument("prompt", help="what to show, in English or Chinese")
    parser.add_argument("--samplers", nargs="+", metavar="NAME", default=["unipc", "euler"])
    parser.add_argument("--steps", type=int, default=10, help="of each sampler")
    parser.add_argument("--reference-steps", type=int, default=50, help="of the first one, to compare with")
    options = parser.parse_args()

    with TextToVideoPipeline.from_pretrained(options.bundle) as pipe:
        config = pipe.scheduler.settings()  # of the checkpoint; other classes read it too
        known = fitting_schedulers(config)
        if unknown := [name for name in options.samplers if name not in known]:
            parser.error(f"{unknown[0]!r} cannot sample this model; expected some of {', '.join(known)}")
        runs = [(options.samplers[0], options.reference_steps), *((name, options.steps) for name in options.samplers)]
        expected = None
        for name, steps in runs:  # all from the same noise
            pipe.scheduler = get_scheduler(name, config)
            out = pipe(options.prompt, seed=0, num_inference_steps=steps)
            expected = out.frames if expected is None else expected
            near, seconds = psnr(out.frames, expected), out.stage_seconds["denoise"]
            print(f"{name:12} {steps:3} steps {sum(out.step_calls):4} predictions {seconds:7.2f} s {near:6.1f} dB")


if __name__ == "__main__":
    main()
