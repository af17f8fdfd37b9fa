"""Seams and memory of tiled decoding: the VAE decoder's tiles, and diffusers' blended ones, against undivided frames.

    python -m t2v_rt.benchmarks.tiles demo/bouncing-shapes build/demo

Writes benchmarks/results/tiles.json, and docs/tiles.png: the last frame, and what diffusers' tiling and ours change in
it, amplified. Memory is that of a process that decodes random latents.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from t2v_rt import TextToVideoPipeline
from t2v_rt.benchmarks.results import FOLDER, finish
from t2v_rt.runtime.frames import denormalize
from t2v_rt.runtime.noise import Generator
from t2v_rt.runtime.video.images import contact_sheet, write_png
from t2v_rt.system.resources import peak_rss_bytes

Array = NDArray[np.float32]
ROOT = Path(__file__).resolve().parent.parent
RESULTS, PICTURE = FOLDER / "tiles.json", ROOT / "docs" / "tiles.png"
COLOURS, SHAPES = ("red", "green", "yellow"), ("ball", "square", "triangle", "star")
ROWS, COLUMNS = 23, 31  # of latents, which no grid below divides evenly
GRIDS = ("1x2", "2x1", "2x2", "3x2", "2x3", "3x3", "3x4", "4x3")
TILE, STRIDE = 128, 96  # pixels of diffusers' tiles, overlapping in the share that it takes at 256
AMPLIFIED = 4
SIDE, DECODED = 256, ((17, "1x1"), (65, "1x1"), (17, "2x2"), (17, "3x4"))  # pixels; frames and tiles
DECODE = "import sys; from t2v_rt.benchmarks import tiles; tiles.decode_noise(*sys.argv[1:])"


def mosaic(pipe: TextToVideoPipeline) -> Array:
    """Latents of a larger frame than the demo was trained for: its videos side by side."""
    rows = []
    for colour in COLOURS:
        prompts = [f"a {colour} {shape} bouncing on a blue background" for shape in SHAPES]
        rows.append(np.concatenate(list(pipe(prompts, seed=0, output_type="latent").frames), axis=-1))
    return np.ascontiguousarray(np.concatenate(rows, axis=-2)[None, :, :, :ROWS, :COLUMNS])


def blended(checkpoint: Path, latents: Array) -> tuple[Array, Array]:
    """Frames (F, H, W, 3) in [0, 1] as diffusers decodes them whole, and in tiles that it blends."""
    import torch
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan.from_pretrained(checkpoint / "vae", torch_dtype=torch.float32)
    results = []
    for tiled in (False, True):
        if tiled:
            vae.enable_tiling(TILE, TILE, STRIDE, STRIDE)
        with torch.no_grad():
            frames = vae.decode(torch.from_numpy(latents)).sample[0].permute(1, 2, 3, 0).numpy()
        results.append((frames / 2 + 0.5).clip(0, 1))
    return results[0], results[1]


def decode_noise(bundle: str, num_frames: str, grid: str) -> None:
    """Decodes random latents, chunk by chunk, and prints the peak bytes of this process."""
    pipe = TextToVideoPipeline.from_pretrained(bundle, vae_tiles=grid)
    latents = Generator(0).randn(pipe.manifest.model.latent_shape(1, SIDE, SIDE, int(num_frames)))
    for _ in pipe.decode(latents):
        pass
    print(peak_rss_bytes())


def memory(bundle: Path, num_frames: int, grid: str) -> int:
    """Peak bytes of a process that decodes a video of 256x256."""
    command = [sys.executable, "-P", "-c", DECODE, str(bundle), str(num_frames), grid]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def largest(found: Array, expected: Array) -> float:
    return float(np.abs(found - expected).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="of the demo")
    parser.add_argument("bundle", type=Path, help="of it, of ONNX Runtime at fp32")
    options = parser.parse_args()
    latents = mosaic(TextToVideoPipeline.from_pretrained(options.bundle))
    frames = {}
    for grid in ("1x1", *GRIDS):
        pipe = TextToVideoPipeline.from_pretrained(options.bundle, vae_tiles=grid)
        frames[grid] = np.concatenate(list(pipe.decode(latents)))
    whole = frames["1x1"]
    theirs, tiled = blended(options.checkpoint, denormalize(pipe.manifest.model.latents, latents))
    report = {
        "frames": list(whole.shape),
        "largest_difference": {grid: largest(frames[grid], whole) for grid in GRIDS},
        "diffusers_largest_difference": largest(tiled, theirs),
        "diffusers_tiles": {"pixels": TILE, "stride": STRIDE},
        "whole_against_diffusers": largest(whole, theirs),
        "peak_bytes_of_decoding": {
            f"{SIDE}x{SIDE}, {count} frames, {grid}": memory(options.bundle, count, grid) for count, grid in DECODED
        },
    }
    changes = [AMPLIFIED * np.abs(a - b) for a, b in ((tiled, theirs), (frames["3x4"], whole))]
    images = [(image[-1].clip(0, 1) * 255).round().astype(np.uint8) for image in (whole, *changes)]
    write_png(PICTURE, contact_sheet(np.stack(images), len(images)))
    finish(report, RESULTS)


if __name__ == "__main__":
    main()
