"""Training of the demo's VAE: single frames first, then clips of mixed length, the full length among them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import clips
import numpy as np
import torch
from diffusers import AutoencoderKLWan
from state import load_state, save_state
from torch import Tensor, nn

CHANNELS = 8  # of the latents
CONFIG: dict[str, Any] = {
    "base_dim": 16,
    "z_dim": CHANNELS,
    "dim_mult": [1, 2, 2, 4],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
}
CACHES = 64  # more than the causal convolutions of either half
SINGLE_STEPS = 900
SINGLE_BATCH, SINGLE_RATE = 16, 2e-4
CLIP_RATE = 3.5e-4
# (share of the steps, clips per step, frames per clip): short clips give a step more scenes, long ones teach the drift
CLIP_MIX = ((0.3, 3, 17), (0.4, 6, 9), (0.3, 11, 5))
OBJECT_WEIGHT = 3.0  # the object covers a tenth of the picture
SAVE_EVERY = 300


def make_vae() -> AutoencoderKLWan:
    """An untrained VAE, its kernels laid out as the CPU likes them."""
    vae = AutoencoderKLWan(**CONFIG, latents_mean=[0.0] * CHANNELS, latents_std=[1.0] * CHANNELS)
    for module in vae.modules():
        if isinstance(module, nn.Conv3d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last_3d)
        elif isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
    return vae


def encode(vae: AutoencoderKLWan, video: Tensor) -> Tensor:
    """Video (B, 3, F, H, W) in [-1, 1] -> latent means (B, C, f, h, w), chunk by chunk as the VAE itself does."""
    cache: list[Any] = [None] * CACHES
    parts = []
    for i in range((video.shape[2] + 3) // 4):
        chunk = video[:, :, :1] if i == 0 else video[:, :, 4 * i - 3 : 4 * i + 1]
        chunk = chunk.contiguous(memory_format=torch.channels_last_3d)
        parts.append(vae.encoder(chunk, feat_cache=cache, feat_idx=[0]))
    moments: torch.Tensor = vae.quant_conv(torch.cat(parts, 2))
    return moments[:, :CHANNELS]


def decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Latents -> video; unlike the VAE's own decode it does not clamp, which would stop the gradient."""
    z = vae.post_quant_conv(latents)
    cache: list[Any] = [None] * CACHES
    parts = [
        vae.decoder(z[:, :, i : i + 1], feat_cache=cache, feat_idx=[0], first_chunk=i == 0) for i in range(z.shape[2])
    ]
    return torch.cat(parts, 2)


def as_video(frames: list[np.ndarray[Any, Any]]) -> Tensor:
    """Clips uint8 (F, H, W, 3) -> (B, 3, F, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack(frames)).float().permute(0, 4, 1, 2, 3) / 127.5 - 1


def batches(rng: np.random.Generator, step: int) -> Iterator[Tensor]:
    """Training videos without end."""
    scenes = clips.scenes(held=False)
    while True:
        if step < SINGLE_STEPS:
            count, length = SINGLE_BATCH, 1
        else:
            choice = rng.choice(len(CLIP_MIX), p=[share for share, _, _ in CLIP_MIX])
            _, count, length = CLIP_MIX[choice]
        start = 4 * int(rng.integers(0, (clips.FRAMES - length) // 4 + 1))
        drawn = [clips.draw(scenes[rng.integers(len(scenes))], rng) for _ in range(count)]
        yield as_video([clip[start : start + length] for clip in drawn])
        step += 1


def loss_of(found: Tensor, video: Tensor, latents: Tensor) -> Tensor:
    """Squared and absolute error, the object's pixels weighted up, and a small pull of the latents towards zero."""
    background = video[:, :, :, :1, :1]
    on_object = ((video - background).abs().amax(1, keepdim=True) > 0.05).float()
    weight = 1 + OBJECT_WEIGHT * on_object
    error = found.float() - video
    fit = (weight * (error.square() + 0.3 * error.abs())).mean() / weight.mean()
    return fit + 1e-4 * latents.float().square().mean()


def psnr(vae: AutoencoderKLWan, count: int = 16) -> float:
    """Peak signal-to-noise ratio in dB of full-length held-out clips."""
    rng, scenes = np.random.default_rng(1), clips.scenes(held=True)
    video = as_video([clips.draw(scenes[7 * i % len(scenes)], rng) for i in range(count)])
    with torch.no_grad():
        error = decode(vae, encode(vae, video)).clamp(-1, 1) - video
    return float(-10 * torch.log10(error.square().mean() / 4))


def train_vae(work: Path, seconds: float) -> AutoencoderKLWan:
    """Trains until `seconds` of clip training are done; continues from `work/vae.pt`.

    Args:
        work: folder of the training's state.
        seconds: of training on clips, over which the learning rate falls.

    Returns:
        The trained VAE.
    """
    vae, file = make_vae(), work / "vae.pt"
    optimizer = torch.optim.Adam(vae.parameters(), lr=SINGLE_RATE, betas=(0.9, 0.99))
    step, done = 0, 0.0
    state = load_state(file)
    if state is not None:
        vae.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, done = state["step"], state["done"]
    source, last = batches(np.random.default_rng(step), step), time.monotonic()
    while done < seconds:
        single = step < SINGLE_STEPS
        rate = SINGLE_RATE * min(1.0, (step + 1) / 50) if single else CLIP_RATE * max(0.03, 1 - done / seconds)
        for group in optimizer.param_groups:
            group["lr"] = rate
        video = next(source)
        with torch.autocast("cpu", torch.bfloat16):
            latents = encode(vae, video)
            found = decode(vae, latents + 0.02 * torch.randn_like(latents))
        loss = loss_of(found, video, latents)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        step += 1
        now = time.monotonic()
        done, last = done + (0.0 if single else now - last), now
        if step % 50 == 0:
            print(f"vae {step} {done:.0f}s loss {loss.item():.4f}", flush=True)
        if step % SAVE_EVERY == 0 or done >= seconds:
            save_state(file, model=vae.state_dict(), optimizer=optimizer.state_dict(), step=step, done=done)
    print(f"vae {step} steps, {psnr(vae):.1f} dB on held-out clips", flush=True)
    return vae
