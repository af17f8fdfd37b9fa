"""Shape profiles of the Wan2.1 family: from videos in pixels and frames to the sizes of each component's graphs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from t2v_rt.engines.manifest import GRIDS, ModelSpec, TileSpec
from t2v_rt.engines.plans import Range, VideoProfile
from t2v_rt.export.graph import Form

Ranges = Mapping[str, Range]
TILE_PIXELS = 50_000  # of the VAE decoder's tail: half a GB of context
TYPICAL_PROMPT = 64  # tokens; prompts of a few sentences
HALF = 2
# Bytes of the feed-forward's widened values that need no slices, and that a slice should have where there are any.
UNSLICED, SLICE = 64_000_000, 50_000_000
LEAST_SLICES = 12  # with less than ten the builder runs several at once again


def with_grid(tiles: TileSpec, model: ModelSpec, profiles: Sequence[VideoProfile]) -> TileSpec:
    """The tiles of a decoder whose tail is built for the largest video of all profiles.

    Args:
        tiles: of the decoder.
        model: constants of the model.
        profiles: of the bundle.

    Returns:
        The same with the coarsest grid whose tiles have at most `TILE_PIXELS`.
    """
    rows, columns = (
        max(getattr(profile, name).max for profile in profiles) // model.spatial_factor * tiles.scale
        for name in ("height", "width")
    )
    for grid in GRIDS:
        fed = tiles.fed_length(rows, grid[0]) * tiles.fed_length(columns, grid[1])
        if fed * tiles.upscale**2 <= TILE_PIXELS:
            break
    return replace(tiles, grid=grid)


def component_ranges(
    model: ModelSpec, profiles: Sequence[VideoProfile], tiles: TileSpec
) -> dict[str, dict[str, tuple[Ranges, ...]]]:
    """Ranges of the symbols of each engine's graph, for each profile; equal ones once.

    Args:
        model: constants of the model.
        profiles: of the bundle.
        tiles: of the VAE decoder, with the grid to build for.

    Returns:
        Component -> role -> a mapping of symbols to ranges for each profile.
    """
    assert tiles.grid is not None
    text = {"batch": Range.of(1), "length": Range(1, min(TYPICAL_PROMPT, model.text_length), model.text_length)}
    frames, images, parts = [], [], []
    for profile in profiles:
        image = {
            "height": _divided(profile.height, model.spatial_factor),
            "width": _divided(profile.width, model.spatial_factor),
        }
        latents = Range(*((size - 1) // model.temporal_factor + 1 for size in profile.num_frames.to_json()))
        images.append(image)
        frames.append({"batch": Range.of(1), "frames": latents, **image})
        parts.append(
            {
                name: Range(*(tiles.fed_length(size * tiles.scale, count) for size in image[name].to_json()))
                for name, count in zip(("height", "width"), tiles.grid, strict=True)
            }
        )
    head, tail = _distinct(images), _distinct(parts)
    return {
        "text_encoder": {"model": (text,)},
        "transformer": {"model": _distinct(frames)},
        "vae_decoder": {"head_first": head, "head_next": head, "tail_first": tail, "tail_next": tail},
    }


def component_forms(
    model: ModelSpec, ranges: Mapping[str, Mapping[str, Sequence[Ranges]]], ffn_dim: int, float32_matmul: bool
) -> dict[str, dict[str, Form]]:
    """The form of each engine's graph.

    Args:
        model: constants of the model.
        ranges: from `component_ranges`.
        ffn_dim: width of the denoiser's feed-forward.
        float32_matmul: whether all GPUs can multiply float32 matrices.

    Returns:
        Component -> role -> form.
    """
    forms: dict[str, dict[str, Form]] = {}
    for name, roles in ranges.items():
        for role, profiles in roles.items():
            firsts = profiles[0]
            fixed = {
                symbol: firsts[symbol].min
                for symbol in firsts
                if firsts[symbol].fixed and all(sizes[symbol] == firsts[symbol] for sizes in profiles)
            }
            slices, rows = 1, None
            if name == "transformer":
                slices, rows = _slices(model, profiles, ffn_dim), model.text_length
            forms.setdefault(name, {})[role] = Form(fixed, slices, rows, float32_matmul)
    return forms


def _slices(model: ModelSpec, profiles: Sequence[Ranges], ffn_dim: int) -> int:
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


def _distinct(profiles: Sequence[Ranges]) -> tuple[Ranges, ...]:
    return tuple(profile for i, profile in enumerate(profiles) if profile not in profiles[:i])
