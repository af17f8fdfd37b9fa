"""Shape profiles of the Wan2.1 family: from videos in pixels and frames to the sizes of each component's graphs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from t2v_rt.engines.manifest import ModelSpec
from t2v_rt.engines.plans import Range, VideoProfile
from t2v_rt.export.graph import Form

TYPICAL_PROMPT = 64  # tokens; prompts of a few sentences
HALF = 2
# Bytes of the feed-forward's widened values that need no slices, and that a slice should have where there are any.
UNSLICED, SLICE = 64_000_000, 50_000_000
LEAST_SLICES = 12  # with less than ten the builder runs several at once again


def component_ranges(model: ModelSpec, profiles: Sequence[VideoProfile]) -> dict[str, tuple[Mapping[str, Range], ...]]:
    """Ranges of the symbols of each component's graphs, for each profile; equal ones once.

    Args:
        model: constants of the model.
        profiles: of the bundle.

    Returns:
        Component -> symbol -> range.
    """
    text = {"batch": Range.of(1), "length": Range(1, min(TYPICAL_PROMPT, model.text_length), model.text_length)}
    frames, images = [], []
    for profile in profiles:
        image = {
            "height": _divided(profile.height, model.spatial_factor),
            "width": _divided(profile.width, model.spatial_factor),
        }
        latents = Range(*((size - 1) // model.temporal_factor + 1 for size in profile.num_frames.to_json()))
        images.append(image)
        frames.append({"batch": Range.of(1), "frames": latents, **image})
    return {"text_encoder": (text,), "transformer": _distinct(frames), "vae_decoder": _distinct(images)}


def component_forms(
    model: ModelSpec, ranges: Mapping[str, Sequence[Mapping[str, Range]]], ffn_dim: int, float32_matmul: bool
) -> dict[str, Form]:
    """The form of each component's graphs.

    Args:
        model: constants of the model.
        ranges: from `component_ranges`.
        ffn_dim: width of the denoiser's feed-forward.
        float32_matmul: whether all GPUs can multiply float32 matrices.

    Returns:
        Component -> form.
    """
    forms = {}
    for name, profiles in ranges.items():
        firsts = profiles[0]
        fixed = {
            symbol: firsts[symbol].min
            for symbol in firsts
            if firsts[symbol].fixed and all(sizes[symbol] == firsts[symbol] for sizes in profiles)
        }
        slices, rows = 1, None
        if name == "transformer":
            slices, rows = _slices(model, profiles, ffn_dim), model.text_length
        forms[name] = Form(fixed, slices, rows, float32_matmul)
    return forms


def _slices(model: ModelSpec, profiles: Sequence[Mapping[str, Range]], ffn_dim: int) -> int:
    tokens = max(
        math.prod(
            sizes[axis].max // size for axis, size in zip(("frames", "height", "width"), model.patch, strict=True)
        )
        for sizes in profiles
    )
    widened = tokens * ffn_dim * HALF
    return 1 if widened <= UNSLICED else max(LEAST_SLICES, math.ceil(widened / SLICE))


def _divided(pixels: Range, factor: int) -> Range:
    return Range(*(size // factor for size in pixels.to_json()))


def _distinct(profiles: Sequence[Mapping[str, Range]]) -> tuple[Mapping[str, Range], ...]:
    return tuple(profile for i, profile in enumerate(profiles) if profile not in profiles[:i])
