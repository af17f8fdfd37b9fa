"""What is measured: workloads, each a kind of work at a size, and the job that a process is given.

A workload is one line in `WORKLOADS`. Its inputs are made in each process alike, out of the job: noise is the same
bytes everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t2v_rt.engines.bundle.model import ModelSpec
from t2v_rt.errors import RequestError
from t2v_rt.runtime.noise import Generator

Array = NDArray[np.float32]
CALL, DENOISER, ENCODER, CHUNK, DECODE = "call", "denoiser", "encoder", "vae-chunk", "decode"  # kinds of work
PROMPT_TOKENS = 40  # of a denoiser call's text: a long sentence
TIMESTEP = 500.0
CHUNKS = 2  # of the latents of a VAE chunk: the first prepares the states, the second is measured


@dataclass(frozen=True)
class Workload:
    """A kind of work at a size.

    Args:
        kind: `call`, `denoiser`, `encoder`, `vae-chunk` or `decode`.
        text: what it is, for the report.
        size: height, width and frames of the video; None for the request's.
    """

    kind: str
    text: str
    size: tuple[int, int, int] | None = None


WORKLOADS: Mapping[str, Workload] = {
    "call": Workload(CALL, "a whole call: prompts to frames"),
    "denoiser": Workload(DENOISER, "one prediction of the denoiser, 40 tokens of text"),
    "encoder": Workload(ENCODER, "the prompt to embeddings"),
    "vae-chunk": Workload(CHUNK, "one later chunk of the VAE decoder"),
    "decode": Workload(DECODE, "the latents of a video to its frames"),
    "denoiser-256x256x9": Workload(DENOISER, "one prediction of the denoiser, 40 tokens of text", (256, 256, 9)),
    "denoiser-384x256x17": Workload(DENOISER, "one prediction of the denoiser, 40 tokens of text", (256, 384, 17)),
    "denoiser-480x480x17": Workload(DENOISER, "one prediction of the denoiser, 40 tokens of text", (480, 480, 17)),
    "vae-chunk-256x256": Workload(CHUNK, "one later chunk of the VAE decoder", (256, 256, 9)),
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a process measures.

    Args:
        kind: of the work.
        bundle: its folder.
        checkpoint: that the bundle was built from, for peers that need it; or None.
        height: of the video in pixels.
        width: of the video in pixels.
        num_frames: of the video.
        num_inference_steps: of a call.
        guidance_scale: of a call.
        prompt: of a call and of the encoder.
        negative_prompt: of a call.
        latents_seed: of the noise that every run begins with.
        backend: of the bundle, or None.
        provider: of ONNX Runtime, or None.
        device: index of the GPU, or None.
        threads: of each engine; None for as many as there are cores.
        trust: whether plans from elsewhere may run.
    """

    kind: str
    bundle: str
    checkpoint: str | None = None
    height: int
    width: int
    num_frames: int
    num_inference_steps: int
    guidance_scale: float
    prompt: str
    negative_prompt: str
    latents_seed: int = 0
    backend: str | None = None
    provider: str | None = None
    device: int | None = None
    threads: int | None = None
    trust: bool = False

    def latents(self, model: ModelSpec) -> Array:
        """The noise float32 (1, C, F, H, W) that a run begins with; of a VAE chunk, as many frames as it takes."""
        shape = model.latent_shape(1, self.height, self.width, self.num_frames)
        if self.kind == CHUNK:
            shape = (*shape[:2], sum(model.decode.chunks(shape[2])[:CHUNKS]), *shape[3:])
        return Generator(self.latents_seed).randn(shape)

    def embeds(self, model: ModelSpec) -> Array:
        """Random prompt embeddings float32 (1, L, D) of a denoiser call, padded with zeros."""
        result = np.zeros((1, model.text.length, model.text.dim), np.float32)
        count = min(PROMPT_TOKENS, model.text.length)
        result[:, :count] = Generator(self.latents_seed + 1).randn((1, count, model.text.dim))
        return result

    def tokens(self, model: ModelSpec) -> int:
        """Tokens of one video in the denoiser."""
        latent = model.latent_shape(1, self.height, self.width, self.num_frames)[2:]
        return prod(size // patch for size, patch in zip(latent, model.patch, strict=True))


def workload(name: str) -> Workload:
    """The workload of a name; raises RequestError for an unknown one."""
    if name not in WORKLOADS:
        raise RequestError(f"workload {name!r} is unknown; expected one of {', '.join(WORKLOADS)}")
    return WORKLOADS[name]


def relative_error(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """Largest difference over the largest expected value; infinite where shapes differ."""
    if found.shape != expected.shape:
        return float("inf")
    return float(np.abs(found - expected).max() / max(float(np.abs(expected).max()), float(np.finfo(np.float32).tiny)))


def psnr(found: NDArray[Any], expected: NDArray[Any]) -> float | None:
    """Peak signal-to-noise ratio of frames in [0, 1], in dB; None where they are equal or of other shapes."""
    if found.shape != expected.shape:
        return None
    error = float(np.mean(np.square(found - expected), dtype=np.float64))
    return None if error == 0 else -10 * float(np.log10(error))
