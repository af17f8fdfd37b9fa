"""How like a preview is to what the VAE decodes, against linear maps from latent channels to colours.

    python -m t2v_rt.benchmarks.preview --engines build/demo --output benchmarks/results/preview.json

Three ways to a picture of latents: `TextToVideoPipeline.preview`; a linear map fitted once to what the VAE decodes from
random latents; and the linear map that fits these very videos best, which bounds what any such map can do. Likeness is
the correlation with the decoded frames, averaged over the pixels and frames that one latent stands for.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t2v_rt import TextToVideoPipeline
from t2v_rt.benchmarks.results import finish
from t2v_rt.benchmarks.timing import seconds
from t2v_rt.runtime.noise import Generator
from t2v_rt.runtime.preview import shrunk

Array = NDArray[Any]
PROMPTS = (
    "a red ball bouncing on a blue background",
    "a green square moving left",
    "一个红色的球在蓝色背景上弹跳",
    "a yellow triangle moving up on a black background",
)
RANDOM_SIZE = 32  # rows and columns of the random latents, of one frame
ROUNDS = 7


def decoded(pipe: TextToVideoPipeline, latents: Array) -> Array:
    """The colours (F, h, w, 3) that latents (1, C, F, h, w) stand for."""
    chunks = [chunk.mean(0).transpose(2, 0, 1) for chunk in pipe.decode(latents)]
    return shrunk(np.stack(chunks), pipe.manifest.model.latents.spatial_factor).transpose(0, 2, 3, 1)


def columns(latents: Array) -> Array:
    """Latents (1, C, F, h, w) as rows of channels and a one, (F h w, C + 1)."""
    flat = latents[0].reshape(latents.shape[1], -1).T
    return np.concatenate([flat, np.ones((len(flat), 1))], axis=1)


def fitted(latents: Sequence[Array], colours: Sequence[Array]) -> Array:
    """The linear map (C + 1, 3) by least squares."""
    x = np.concatenate([columns(item) for item in latents])
    y = np.concatenate([item.reshape(-1, 3) for item in colours])
    solution: Array = np.linalg.lstsq(x, y, rcond=None)[0]
    return solution


def likeness(found: Sequence[Array], expected: Sequence[Array]) -> dict[str, object]:
    """Correlations over all videos together, and of each."""
    pairs = [(np.clip(a, 0, 1).ravel(), b.ravel()) for a, b in zip(found, expected, strict=True)]
    joined = [np.concatenate(side) for side in zip(*pairs, strict=True)]
    return {"all videos": correlation(joined[0], joined[1]), "each": [correlation(a, b) for a, b in pairs]}


def correlation(a: Array, b: Array) -> float:
    return float(np.corrcoef(a, b)[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=Path, required=True, help="bundle of the demo checkpoint")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    pipe = TextToVideoPipeline.from_pretrained(options.engines)
    latents = [pipe(prompt, seed=i, output_type="latent").frames for i, prompt in enumerate(PROMPTS)]
    colours = [decoded(pipe, item) for item in latents]
    random = Generator(0).randn((1, latents[0].shape[1], 1, RANDOM_SIZE, RANDOM_SIZE))
    maps = {"random latents": fitted([random], [decoded(pipe, random)]), "these videos": fitted(latents, colours)}
    times = [seconds(lambda: pipe.preview(latents[0])) for _ in range(ROUNDS)]
    result = {
        "preview": likeness([pipe.preview(item)[0] / 255 for item in latents], colours),
        **{
            f"linear map fitted to {name}": likeness([columns(item) @ solution for item in latents], colours)
            for name, solution in maps.items()
        },
        "seconds of a preview": statistics.median(times),
    }
    finish(result, options.output)


if __name__ == "__main__":
    main()
