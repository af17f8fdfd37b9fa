"""Rules of thumb for the memory that plans of the Wan2.1 family work in, for before they are built.

Fitted to what TensorRT-RTX's builder told of networks with the true model's widths, for 256x256 with 9 frames to
1280x720 with 81 (`benchmarks/results/plan_contexts.json`), which they meet within a tenth for four GPUs: a number of
bytes for each value of the hidden states, and what grows otherwise. Plans for one GPU take up to a third less, and what
a range of sizes takes follows no simple rule: there they tell up to two fifths too much, or an eighth too little. A
builder of another version may do better or worse.

All take the ranges of a shape profile, symbol -> range, and estimate bytes of a half-precision plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from t2v_rt.engines.bundle.profiles import Range
from t2v_rt.export.text_encoders.t5 import TextEncoderConfig
from t2v_rt.export.wan.transformer import TEXT_LENGTH, TransformerConfig
from t2v_rt.export.wan.vae import VaeConfig

Ranges = Mapping[str, Range]
HALF, FULL = 2, 4  # bytes of a value
TOKEN_BYTES = 21  # of a token's hidden value in the denoiser around attention
WIDE_BYTES = 16.8  # and beside the widened values of the feed-forward, which are counted apart
# Times the widened values of all tokens, by how many of frames, height and width are ranges: the builder then has
# slices of the feed-forward at once that it would run one after another.
RANGED_WIDENED = (0.0, 1.0, 1.0, 2.5)
ENCODER_BYTES = (14.5, 5.0, 4.0)  # of a text token's hidden, attended and widened value
FIRST_BYTES, NEXT_BYTES, ATTENTION_BYTES = 115, 874, 562  # of a latent pixel and base channel in the VAE's head
TAIL_BYTES = 16  # of an output pixel and base channel in its tail


def text_encoder_context(config: TextEncoderConfig, ranges: Ranges) -> int:
    """Of each engine of the text encoder."""
    widths = (config.dim, config.heads * config.head_dim, config.ffn_dim)
    return int(ranges["length"].max * sum(a * b for a, b in zip(widths, ENCODER_BYTES, strict=True)))


def transformer_context(config: TransformerConfig, ranges: Ranges, slices: int) -> int:
    """Of the denoiser, its feed-forward in so many slices."""
    video = [ranges[symbol] for symbol in ("frames", "height", "width")]
    values = prod(size.max for size in video) // prod(config.patch) * config.dim
    widened = HALF * values // config.dim * config.ffn_dim
    wide = max(1 / slices, RANGED_WIDENED[sum(not size.fixed for size in video)]) * widened
    text_bytes = TEXT_LENGTH * config.text_dim * (FULL + HALF)
    return int(max(TOKEN_BYTES * values, WIDE_BYTES * values + wide) + text_bytes)


def vae_context(config: VaeConfig, role: str, ranges: Ranges) -> int:
    """Of an engine of the VAE decoder."""
    pixels = ranges["height"].max * ranges["width"].max
    if role == "tail":
        return TAIL_BYTES * pixels * config.tiles.upscale**2 * config.base_dim
    scores = FULL * pixels**2  # of the middle's attention, whose one wide head no kernel fuses
    if role == "head_first":
        return FIRST_BYTES * pixels * config.base_dim + scores
    return max(NEXT_BYTES * pixels * config.base_dim, ATTENTION_BYTES * pixels * config.base_dim + scores)
