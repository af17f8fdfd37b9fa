"""Shape profiles of the Wan2.1 family: from videos in pixels and frames to the sizes of each component's graphs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from t2v_rt.engines.bundle.manifest import TileSpec
from t2v_rt.engines.bundle.model import ModelSpec, thumbnail_size
from t2v_rt.engines.bundle.profiles import Accumulation, Range, VideoProfile
from t2v_rt.export.graph import GraphOptions

Ranges = Mapping[str, Range]
BUILT_GRIDS = ((1, 1), (2, 2), (3, 4))  # of the VAE decoder: the whole frame, and tiles for when it does not fit
TYPICAL_PROMPT = 64  # tokens; prompts of a few sentences
HALF = 2
# Bytes of the feed-forward's widened values that need no slices, and that a slice should have where there are any.
UNSLICED, SLICE = 64_000_000, 50_000_000
LEAST_SLICES = 12  # with less than ten the builder runs several at once again
# An attention is one kernel, and Windows ends one after 2 s on a card that drives the display. Of 1280x720 with 81
# frames (75,600 tokens, 35 TFLOP) it would take 1.7 s on a GeForce RTX 4060 and 2.0 s on a 3060, by their peak rates.
TOKENS_OF_A_KERNEL, KERNELS = 50_000, 2


def with_grids(tiles: TileSpec, model: ModelSpec, profiles: Sequence[VideoProfile]) -> TileSpec:
    """The tiles of a decoder whose tail is built for `BUILT_GRIDS`.

    Args:
        tiles: of the decoder.
        model: constants of the model.
        profiles: of the bundle.

    Returns:
        The same with those grids that the smallest video has features for, and that make its tiles smaller.
    """
    rows, columns = (
        min(getattr(profile, name).min for profile in profiles) // model.latents.spatial_factor * tiles.scale
        for name in ("height", "width")
    )
    grids = [BUILT_GRIDS[0]]
    for grid in BUILT_GRIDS[1:]:
        fed = (tiles.fed_length(rows, grid[0]), tiles.fed_length(columns, grid[1]))
        if grid[0] <= rows and grid[1] <= columns and fed[0] < rows and fed[1] < columns:
            grids.append(grid)
    return replace(tiles, grids=tuple(grids))


def component_ranges(
    model: ModelSpec, profiles: Sequence[VideoProfile], tiles: TileSpec, text_roles: Sequence[str]
) -> dict[str, dict[str, tuple[Ranges, ...]]]:
    """Ranges of the symbols of each engine's graph, for each profile; equal ones once.

    Args:
        model: constants of the model.
        profiles: of the bundle.
        tiles: of the VAE decoder, with the grids to build for.
        text_roles: of the text encoder's engines.

    Returns:
        Component -> role -> a mapping of symbols to ranges for each profile; the VAE decoder's last ones are those of
        the thumbnails that previews decode.
    """
    text = {"batch": Range.of(1), "length": Range(1, min(TYPICAL_PROMPT, model.text.length), model.text.length)}
    frames, images, parts, thumbnails = [], [], [], []
    for profile in profiles:
        image = {
            "height": _divided(profile.height, model.latents.spatial_factor),
            "width": _divided(profile.width, model.latents.spatial_factor),
        }
        latents = profile.num_frames.map(model.decode.latents)
        images.append(image)
        thumbnails.append(_thumbnails(image))
        frames.append({"batch": Range.of(1), "frames": latents, **image})
        parts += [
            {
                name: image[name].map(lambda size, count=count: tiles.fed_length(size * tiles.scale, count))  # type: ignore[misc]
                for name, count in zip(("height", "width"), grid, strict=True)
            }
            for grid in tiles.grids
        ]
    small = [{name: sizes.map(lambda size: size * tiles.scale) for name, sizes in item.items()} for item in thumbnails]
    head, tail = _distinct([*images, *thumbnails]), _distinct([*parts, *small])
    return {
        "text_encoder": dict.fromkeys(text_roles, (text,)),
        "transformer": {"model": _distinct(frames)},
        "vae_decoder": {"head_first": head, "head_next": head, "tail": tail},
    }


def component_options(
    model: ModelSpec,
    ranges: Mapping[str, Mapping[str, Sequence[Ranges]]],
    ffn_dim: int,
    float32_matmul: bool,
    accumulation: Accumulation,
) -> dict[str, dict[str, GraphOptions]]:
    """The form of each engine's graph.

    Args:
        model: constants of the model.
        ranges: from `component_ranges`.
        ffn_dim: width of the denoiser's feed-forward.
        float32_matmul: whether all GPUs can multiply float32 matrices.
        accumulation: what attention adds up in.

    Returns:
        Component -> role -> options.
    """
    graph_options: dict[str, dict[str, GraphOptions]] = {}
    for name, roles in ranges.items():
        for role, profiles in roles.items():
            firsts = profiles[0]
            fixed = {
                symbol: firsts[symbol].min
                for symbol in firsts
                if firsts[symbol].fixed and all(sizes[symbol] == firsts[symbol] for sizes in profiles)
            }
            options = GraphOptions(fixed, float32_matmul=float32_matmul, accumulation=accumulation)
            if name == "transformer":
                fixed["text"], tokens = model.text.length, _most_tokens(model, profiles)
                parts = 1 if tokens <= TOKENS_OF_A_KERNEL else KERNELS
                options = replace(options, slices=_slices(tokens * ffn_dim * HALF), attention_parts=parts)
            graph_options.setdefault(name, {})[role] = options
    return graph_options


def _most_tokens(model: ModelSpec, profiles: Sequence[Ranges]) -> int:
    axes = tuple(zip(("frames", "height", "width"), model.patch, strict=True))
    return max(math.prod(sizes[axis].max // size for axis, size in axes) for sizes in profiles)


def _slices(widened: int) -> int:
    """Slices for so many bytes of widened values."""
    return 1 if widened <= UNSLICED else max(LEAST_SLICES, math.ceil(widened / SLICE))


def _thumbnails(image: Ranges) -> dict[str, Range]:
    """The latent rows and columns of the thumbnails of all videos of a profile: their size does not rise steadily."""
    height, width = image["height"], image["width"]
    made = [thumbnail_size(rows, columns) for rows in _all(height) for columns in _all(width)]
    best = thumbnail_size(height.opt, width.opt)
    return {
        name: Range(min(sizes), opt, max(sizes))
        for name, opt, sizes in zip(("height", "width"), best, zip(*made, strict=True), strict=True)
    }


def _all(sizes: Range) -> range:
    return range(sizes.min, sizes.max + 1)


def _divided(pixels: Range, factor: int) -> Range:
    return pixels.map(lambda size: size // factor)


def _distinct(profiles: Sequence[Ranges]) -> tuple[Ranges, ...]:
    return tuple(profile for i, profile in enumerate(profiles) if profile not in profiles[:i])
