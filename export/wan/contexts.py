"""Rules of thumb for the memory that plans of the Wan2.1 family work in, for before they are built.

Fitted to what TensorRT-RTX's builder told of networks with the true model's widths, for 256x256 with 9 frames to
1280x720 with 81 (`benchmarks/results/plan_contexts.json`), which they meet within a tenth: a number of bytes for each
value of the hidden states, and what grows otherwise. A builder of another version may do better or worse.
"""

from __future__ import annotations

from collections.abc import Mapping

from t2v_rt.export.graph import Form
from t2v_rt.export.wan.family import TEXT_LENGTH, WanConfigs

HALF, FULL = 2, 4  # bytes of a value
TOKEN_BYTES = 21  # of a token's hidden value in the denoiser; the feed-forward's widened values are counted apart
ENCODER_BYTES = (14.5, 5.0, 4.0)  # of a text token's hidden, attended and widened value
FIRST_BYTES, NEXT_BYTES, ATTENTION_BYTES = 115, 874, 562  # of a latent pixel and base channel in the VAE's head
TAIL_BYTES = 16  # of an output pixel and base channel in its tail


def estimate_context(
    configs: WanConfigs, component: str, role: str, sizes: Mapping[str, int], form: Form | None = None
) -> int:
    """Bytes of memory that a half-precision plan works in.

    Args:
        configs: of the networks.
        component: its name.
        role: of the engine.
        sizes: symbol -> largest size of the shape profile.
        form: of the engine's graph.

    Returns:
        An estimate.
    """
    if component == "text_encoder":
        text = configs.text_encoder
        widths = (text.dim, text.heads * text.head_dim, text.ffn_dim)
        return int(sizes["length"] * sum(a * b for a, b in zip(widths, ENCODER_BYTES, strict=True)))
    pixels = sizes["height"] * sizes["width"]
    if component == "transformer":
        net = configs.transformer
        tokens = sizes["frames"] * pixels // (net.patch[0] * net.patch[1] * net.patch[2])
        slices = 1 if form is None else form.slices
        text_bytes = TEXT_LENGTH * net.text_dim * FULL
        return TOKEN_BYTES * tokens * net.dim + HALF * tokens * net.ffn_dim // slices + text_bytes
    vae = configs.vae
    if role == "tail":
        return TAIL_BYTES * pixels * vae.tiles.upscale**2 * vae.base_dim
    scores = FULL * pixels**2  # of the middle's attention, whose one wide head no kernel fuses
    if role == "head_first":
        return FIRST_BYTES * pixels * vae.base_dim + scores
    return max(NEXT_BYTES * pixels * vae.base_dim, ATTENTION_BYTES * pixels * vae.base_dim + scores)
