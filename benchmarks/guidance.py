"""The two predictions of guidance: one batch of two against two calls, at several sizes.

    python -m t2v_rt.benchmarks.guidance --engines build/demo --output benchmarks/results/guidance.json

Both ways run in turn on the same inputs, with prompts of two lengths; medians and their ratio are reported. From the
ratios follows `ONE_BATCH_TOKENS` in `runtime/denoise/denoiser.py`.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from t2v_rt import TextToVideoPipeline
from t2v_rt.benchmarks.results import finish
from t2v_rt.benchmarks.timing import alternate
from t2v_rt.runtime.denoise.denoiser import Denoiser, Prompts
from t2v_rt.runtime.noise import Generator

PROMPT, NEGATIVE = "a red ball bouncing on a blue background", "blurred"
# videos, and frames, rows and columns of their latents
SIZES = (
    (1, 1, 4, 4),
    (1, 5, 8, 8),
    (2, 5, 8, 8),
    (1, 5, 16, 16),
    (4, 5, 8, 8),
    (1, 7, 16, 16),
    (1, 9, 16, 16),
    (2, 5, 16, 16),
    (1, 5, 24, 24),
    (1, 5, 32, 32),
    (4, 5, 16, 16),
    (1, 9, 32, 32),
)
TIMESTEP = 500.0


def compare(pipe: TextToVideoPipeline, videos: int, latent: Sequence[int], rounds: int) -> dict[str, object]:
    """Medians of both ways for one size, and how far their results are apart."""
    model = pipe.manifest.model
    prompts = Prompts(pipe.encode_prompt([PROMPT] * videos), pipe.encode_prompt([NEGATIVE] * videos))
    component = pipe.stages.components.get("transformer")
    sample = Generator(0).randn((videos, model.latents.channels, *latent))
    calls, batch = (Denoiser(component, pipe.stages.text, prompts, together) for together in (False, True))
    ways = {name: partial(way.predict, sample, TIMESTEP, 2) for name, way in (("two", calls), ("one", batch))}
    results = [way() for way in ways.values()]
    two, one = (statistics.median(times) for times in alternate(ways, rounds).values())
    tokens = videos * int(np.prod([size // patch for size, patch in zip(latent, model.patch, strict=True)]))
    return {
        "videos": videos,
        "latent frames, rows, columns": list(latent),
        "tokens": tokens,
        "two calls, seconds": two,
        "one batch, seconds": one,
        "two calls / one batch": two / one,
        "largest difference": max(float(np.abs(a - b).max()) for a, b in zip(*results, strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=Path, required=True, help="bundle of the demo checkpoint")
    parser.add_argument("--rounds", type=int, default=15, help="runs of each way at each size")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    pipe = TextToVideoPipeline.from_pretrained(options.engines)
    rows = [compare(pipe, videos, latent, options.rounds) for videos, *latent in SIZES]
    rows.sort(key=lambda row: int(str(row["tokens"])))
    result = {
        "backend": "onnxruntime, cpu",
        "bundle": str(options.engines),
        "sizes": rows,
    }
    finish(result, options.output)


if __name__ == "__main__":
    main()
