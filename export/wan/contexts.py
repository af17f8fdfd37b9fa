"""Rules of thumb for the memory that plans of the Wan2.1 family work in, for before they are built.

Fitted to what TensorRT-RTX's builder told of networks with the true model's widths, for 256x256 with 9 frames to
1280x720 with 81 (`benchmarks/results/plan_contexts.json`), which they meet within a tenth: a number of bytes for each
value of the hidden states, and what grows otherwise. A builder of another version may do better or worse.

All take the largest sizes of the shape profile, symbol -> size, and estimate bytes of a half-precision plan.
"""

from __future__ import annotations

from collections.abc import Mapping

from t2v_rt.export.text_encoders.t5 import TextEncoderConfig
from t2v_rt.export.wan.transformer import TEXT_LENGTH, TransformerConfig
from t2v_rt.export.wan.vae import VaeConfig

HALF, FULL = 2, 4  # bytes of a value
TOKEN_BYTES = 21  # of a token's hidden value in the denoiser; the feed-forward's widened values are counted apart
ENCODER_BYTES = (14.5, 5.0, 4.0)  # of a text token's hidden, attended and widened value
FIRST_BYTES, NEXT_BYTES, ATTENTION_BYTES = 115, 874, 562  # of a latent pixel and base channel in the VAE's head
TAIL_BYTES = 16  # of an output pixel and base channel in its tail


def text_encoder_context(config: TextEncoderConfig, sizes: Mapping[str, int]) -> int:
    """Of each engine of the text encoder."""
    widths = (config.dim, config.heads * config.head_dim, config.ffn_dim)
    return int(sizes["length"] * sum(a * b for a, b in zip(widths, ENCODER_BYTES, strict=True)))


def transformer_context(config: TransformerConfig, sizes: Mapping[str, int], slices: int) -> int:
    """Of the denoiser, its feed-forward in so many slices."""
    patch = config.patch[0] * config.patch[1] * config.patch[2]
    tokens = sizes["frames"] * sizes["height"] * sizes["width"] // patch
    text_bytes = TEXT_LENGTH * config.text_dim * FULL
    return TOKEN_BYTES * tokens * config.dim + HALF * tokens * config.ffn_dim // slices + text_bytes


def vae_context(config: VaeConfig, role: str, sizes: Mapping[str, int]) -> int:
    """Of an engine of the VAE decoder."""
    pixels = sizes["height"] * sizes["width"]
    if role == "tail":
        return TAIL_BYTES * pixels * config.tiles.upscale**2 * config.base_dim
    scores = FULL * pixels**2  # of the middle's attention, whose one wide head no kernel fuses
    if role == "head_first":
        return FIRST_BYTES * pixels * config.base_dim + scores
    return max(NEXT_BYTES * pixels * config.base_dim, ATTENTION_BYTES * pixels * config.base_dim + scores)
