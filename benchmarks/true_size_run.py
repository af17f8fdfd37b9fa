"""The true-size model at work on the CPU: its networks against diffusers', opening its bundle, and a small video.

    python -m t2v_rt.benchmarks.true_size_run networks build/wan-full build/true/graphs
    python -m t2v_rt.benchmarks.true_size_run opening build/true/graphs
    python -m t2v_rt.benchmarks.true_size_run video build/true/graphs

Each writes its part of benchmarks/results/true_size.json; the bundle is one of ONNX Runtime at fp32.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t2v_rt.benchmarks.families.wan import FAMILY
from t2v_rt.benchmarks.process_tree import measure
from t2v_rt.benchmarks.timing import seconds
from t2v_rt.benchmarks.true_size import relative, store
from t2v_rt.runtime.denoise.denoiser import Denoiser, Prompts
from t2v_rt.runtime.frames import denormalize
from t2v_rt.runtime.noise import Generator
from t2v_rt.runtime.pipeline import TextToVideoPipeline
from t2v_rt.system.resources import peak_rss_bytes

Array = NDArray[np.float32]
SIDE, FRAMES, STEPS = 256, 9, 2
TOKENS, TIMESTEP = 40, 700.0
CALLS = 3  # after the first
PROCESSES = 5
OPENING = "import sys; from t2v_rt.benchmarks import true_size_run as r; r.tell_opening(sys.argv[1])"


def networks(checkpoint: Path, bundle: Path) -> dict[str, Any]:
    """Errors of one denoiser call at 256x256x9, and of the VAE's first and second chunk, relative to the largest value.

    Args:
        checkpoint: of true size.
        bundle: of it.
    """
    pipe = TextToVideoPipeline.from_pretrained(bundle)
    model = pipe.manifest.model
    noise = Generator(0)
    latents = noise.randn(model.latent_shape(1, SIDE, SIDE, FRAMES))
    embeds = np.zeros((1, model.text.length, model.text.dim), np.float32)
    embeds[:, :TOKENS] = noise.randn((1, TOKENS, model.text.dim))
    expected = _reference_prediction(checkpoint, latents, embeds)
    gc.collect()
    component = pipe.stages.components.get("transformer")
    (found,) = Denoiser(component, pipe.stages.text, Prompts(embeds, None), False).predict(latents, TIMESTEP, 1)
    del component
    pipe.stages.components.release("transformer")
    denormalized = denormalize(model.latents, latents[:, :, :2])
    frames = _reference_frames(checkpoint, denormalized)
    chunks = [chunk.transpose(0, 3, 1, 2) * 2 - 1 for chunk in pipe.decode(latents[:, :, :2])]
    return {
        "size": [SIDE, SIDE, FRAMES],
        "denoiser_error": relative(found, expected),
        "vae_chunk_errors": [relative(chunks[0], frames[:1]), relative(chunks[1], frames[1:])],
    }


def _reference_prediction(checkpoint: Path, latents: Array, embeds: Array) -> Array:
    import torch

    network = FAMILY.denoiser(checkpoint, torch.float32)
    with torch.no_grad():
        prediction = FAMILY.predict(network, torch.from_numpy(latents), TIMESTEP, torch.from_numpy(embeds))
    result: Array = prediction.numpy()
    return result


def _reference_frames(checkpoint: Path, latents: Array) -> Array:
    """Frames (f, 3, H, W) in [-1, 1]."""
    import torch

    network = FAMILY.vae(checkpoint, torch.float32)
    with torch.no_grad():
        result: Array = network.decode(torch.from_numpy(latents)).sample[0].transpose(0, 1).numpy()
    return result


def opening(bundle: Path) -> dict[str, Any]:
    """Time and memory of opening a bundle whose files were checked before, and of the denoiser's first calls.

    Medians of some processes, and for each by how much its first call was longer.
    """
    TextToVideoPipeline.from_pretrained(bundle).close()  # leaves the stamp
    command = [sys.executable, "-P", "-c", OPENING, str(bundle)]
    told = [json.loads(subprocess.check_output(command, text=True)) for _ in range(PROCESSES)]
    medians = {name: statistics.median(item[name] for item in told) for name in told[0]}
    return {**medians, "processes": [item["first_minus_steady_seconds"] for item in told]}


def tell_opening(bundle: str) -> None:
    """What `opening` measures in a process of its own, printed as JSON."""
    start = time.perf_counter()
    pipe = TextToVideoPipeline.from_pretrained(bundle)
    opened, memory = time.perf_counter() - start, peak_rss_bytes()
    model = pipe.manifest.model
    latents = Generator(0).randn(model.latent_shape(1, SIDE, SIDE, FRAMES))
    embeds = np.zeros((1, model.text.length, model.text.dim), np.float32)
    embeds[:, :TOKENS] = 1.0

    def predict() -> object:
        component = pipe.stages.components.get("transformer")
        return Denoiser(component, pipe.stages.text, Prompts(embeds, None), False).predict(latents, TIMESTEP, 1)

    first, *later = [seconds(predict) for _ in range(1 + CALLS)]
    steady = statistics.median(later)
    report = {
        "seconds": opened,
        "rss_bytes_before_the_first_call": memory,
        "first_denoiser_call_seconds": first,
        "steady_denoiser_call_seconds": steady,
        "first_minus_steady_seconds": first - steady,
        "peak_rss_bytes": peak_rss_bytes(),
    }
    print(json.dumps(report))


def video(bundle: Path) -> dict[str, Any]:
    """A small video by the command, with its stage times, and the memory of its process."""
    with tempfile.TemporaryDirectory() as folder:
        latents, file = str(Path(folder) / "latents.npz"), str(Path(folder) / "video.mp4")
        sizes = ["--height", str(SIDE), "--width", str(SIDE), "--num-frames", str(FRAMES)]
        command = [sys.executable, "-P", "-m", "t2v_rt", "generate", "a red ball bouncing", "--engines", str(bundle)]
        command += ["--output", file, "--save-latents", latents, "--seed", "1", "--no-prompt-cache", "--json", *sizes]
        command += ["--num-inference-steps", str(STEPS)]
        printed = Path(folder) / "printed"
        shell = ["/bin/sh", "-c", 'exec "$@" > "$0"', str(printed), *command]
        used = measure(shell, Path(folder))
        told = json.loads(printed.read_text(encoding="utf-8"))
    return {
        "size": [SIDE, SIDE, FRAMES],
        "steps": STEPS,
        "stage_seconds": told["stage_seconds"],
        "frames_sha256": told["frames_sha256"],
        "seconds": used["seconds"],
        "peak_rss_bytes": used["peak_rss_bytes"],
        "peak_anonymous_bytes": used["peak_anonymous_bytes"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["networks", "opening", "video"])
    parser.add_argument("paths", nargs="+", type=Path, metavar="FOLDER", help="checkpoint and bundle, or the bundle")
    options = parser.parse_args()
    if options.what == "networks":
        report = networks(*options.paths)
    else:
        (bundle,) = options.paths
        report = opening(bundle) if options.what == "opening" else video(bundle)
    store(options.what, report)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
