"""Wan2.1 text-to-video at run time: what it does its own way with prompts, decoding and self-tests."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t2v_rt.engines.bundle.manifest import ComponentSpec, Manifest
from t2v_rt.engines.bundle.model import ModelSpec, TextSpec
from t2v_rt.engines.contract import Component
from t2v_rt.engines.specs import TensorSpec
from t2v_rt.runtime.decode.tile_decoder import FrameDecoder
from t2v_rt.runtime.decode.tiles import Grid
from t2v_rt.runtime.families import Call
from t2v_rt.runtime.memory.estimates import StageMemory, Way, decode_stage, tile_ways
from t2v_rt.runtime.noise import Generator
from t2v_rt.system import forked

Array = NDArray[np.float32]
BIAS = "encoder_attention_bias"  # an input of denoisers whose text has its own length
# of a self-test: the prompt's tokens, the latents' size, the timestep
TOKENS = 8
ROWS, COLUMNS, FRAMES = 4, 6, 2
TIMESTEP = 500.0
# Of the latents of a self-test, in units of noise. The blocks' norms make of quiet latents what they make of loud ones,
# so that against quiet ones what attention adds weighs the more, however small the gates: with random weights of the
# true width, and attention that sums 32,760 values in half precision, the answer is off by 2.5 % instead of 0.3 %; by
# 0.03 % where the sum is right (benchmarks/results/self_test.json).
QUIET = 0.1
CORNER = 64  # rows and columns of features whose pixels are compared: all of them took 9 GB on a CPU at 832x480


def relative_buckets(length: int, buckets: int, max_distance: int) -> NDArray[np.int64]:
    """Bucket of each (query, key) pair of positions for the encoder's relative-position bias.

    Exact up to a quarter of the buckets, then logarithmic up to `max_distance`; later keys use the upper half.
    Source: T5 (arXiv:1910.10683), transformers `UMT5Attention._relative_position_bucket`.

    Args:
        length: L.
        buckets: number of buckets.
        max_distance: distance from which all share the last bucket.

    Returns:
        int64 (L, L).
    """
    side = buckets // 2
    exact = side // 2
    position = np.arange(length)
    offset = position[None, :] - position[:, None]
    distance = np.arange(length)
    # in float32 step by step, as the reference: a distance on the edge of two buckets must fall on the same side
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact)) / np.float32(
        math.log(max_distance / exact)
    )
    far = np.minimum(exact + (ratio * np.float32(side - exact)).astype(np.int64), side - 1)
    bucket = np.where(distance < exact, distance, far)
    result: NDArray[np.int64] = bucket[np.abs(offset)] + side * (offset > 0)
    return result


@dataclass(frozen=True)
class TextContext:
    """Prompt embeddings as the denoiser takes them.

    Args:
        embeds: float32 (B, L, D).
        bias: float32 (B, L), added to each position's attention score; minus infinity hides a position.
    """

    embeds: Array
    bias: Array


def text_context(prompt_embeds: Array) -> TextContext:
    """Merges the zero rows that pad prompt embeddings into one row that weighs as many.

    The reference lets the denoiser attend to all padded positions; they are zero vectors, so their keys and values are
    alike, and n equal scores s weigh as much as one of s + log(n).

    Args:
        prompt_embeds: float32 (B, L, D), each prompt's rows followed by rows of zeros.

    Returns:
        The same content in as few rows as the longest prompt needs, plus one where there is padding.
    """
    batch, length, _ = prompt_embeds.shape
    used = np.any(prompt_embeds != 0, axis=2)
    lengths = [int(np.flatnonzero(row)[-1]) + 1 if row.any() else 0 for row in used]
    rows = min(length, max(lengths) + 1)
    bias = np.full((batch, rows), -np.inf, np.float32)
    for row, valid in zip(bias, lengths, strict=True):
        row[:valid] = 0.0
        if valid < length:
            row[valid] = math.log(length - valid)
    return TextContext(np.ascontiguousarray(prompt_embeds[:, :rows]), bias)


def joined(contexts: Sequence[TextContext]) -> TextContext:
    """Contexts of different lengths as one batch; the rows that the shorter ones lack are hidden from attention."""
    rows = max(context.embeds.shape[1] for context in contexts)
    lacking = [rows - context.embeds.shape[1] for context in contexts]
    return TextContext(
        np.concatenate([np.pad(c.embeds, ((0, 0), (0, n), (0, 0))) for c, n in zip(contexts, lacking, strict=True)]),
        np.concatenate(
            [np.pad(c.bias, ((0, 0), (0, n)), constant_values=-np.inf) for c, n in zip(contexts, lacking, strict=True)]
        ),
    )


@dataclass(frozen=True)
class WanText:
    """Positions past a prompt are zeros; the denoiser attends to all of them."""

    def clean(self, text: str) -> str:
        """Repairs mis-decoded text, resolves HTML entities twice and collapses white space.

        Source: `prompt_clean` of diffusers' `pipeline_wan.py`.
        """
        with forked.loading:  # a child that is forked during an import waits for its end for ever
            import ftfy  # costs more than the rest of the start-up; a call with precomputed embeddings does without

        return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(text)))).strip()

    def feeds(self, spec: TextSpec, length: int) -> Mapping[str, NDArray[Any]]:
        return {"relative_buckets": relative_buckets(length, spec.relative_buckets, spec.relative_max_distance)}

    def padded(self, rows: Array, length: int) -> Array:
        return np.pad(rows, ((0, length - len(rows)), (0, 0)))

    def unpadded(self, rows: Array) -> Array:
        used = np.flatnonzero(np.any(rows != 0, axis=1))
        return rows[: used[-1] + 1 if used.size else 0]

    def inputs(self, specs: Sequence[TensorSpec], embeds: Sequence[Array]) -> dict[str, Array]:
        """An engine of fixed shapes takes all padded positions, any other as few rows as there are and their bias."""
        if all(spec.name != BIAS for spec in specs):
            return {"encoder_hidden_states": embeds[0] if len(embeds) == 1 else np.concatenate(embeds)}
        context = joined([text_context(item) for item in embeds])
        return {"encoder_hidden_states": context.embeds, BIAS: context.bias}


@dataclass(frozen=True)
class Wan:
    """The family."""

    text: WanText = WanText()

    def decode_ways(self, manifest: Manifest, grid: Grid | None) -> list[Way]:
        return tile_ways(manifest, grid)

    def decode_memory(self, manifest: Manifest, shape: tuple[int, ...], way: Way, kept: int) -> tuple[StageMemory, int]:
        *_, height, width = shape
        return decode_stage(manifest.components["vae_decoder"], height, width, *way, kept)

    def open_decoder(self, vae: Component, shape: tuple[int, ...], way: Way) -> FrameDecoder:
        *_, height, width = shape
        return FrameDecoder(vae, height, width, *way)

    def self_test(
        self, name: str, component: Component, model: ModelSpec, built: ComponentSpec, results: Sequence[NDArray[Any]]
    ) -> Iterator[Call]:
        """The text encoder's engines, one denoiser call, and the VAE's first two latent frames; plans at each profile.

        On latents that are the same everywhere all tokens stay alike through every layer of the denoiser, because
        whatever weights attention gives to equal values, their mean is that value: one token alone has the same answer.
        """
        if name == "text_encoder":
            beside = self.text.feeds(model.text, TOKENS)
            for role in component:  # all are fed alike: what one gives would carry its error into the next
                hidden = Generator(0).randn((1, TOKENS, model.text.dim))
                yield Call(role, {"hidden_states": hidden, **beside}, component[role].outputs[0].name)
        elif name == "transformer":
            tested = _sizes(built, "model", ("frames", "height", "width"), (FRAMES, ROWS, COLUMNS))
            for sizes in tested:
                feeds = self._denoiser_feeds(component, model, built, sizes)
                yield Call("model", feeds, "noise_pred", _named(sizes), spare=sizes != min(tested, key=math.prod))
        else:
            yield from _decoder_calls(component, model, built, results)

    def _denoiser_feeds(
        self, component: Component, model: ModelSpec, built: ComponentSpec, sizes: tuple[int, ...]
    ) -> dict[str, NDArray[Any]]:
        """Quiet noise; of a plan, latents that are the same everywhere, and for its reference one token of them."""
        noise = Generator(0)
        text = np.zeros((1, model.text.length, model.text.dim), np.float32)
        text[:, :TOKENS] = noise.randn((1, TOKENS, model.text.dim))
        if built.graphs["model"].plan is None:
            latents = noise.randn((1, model.latents.channels, *sizes))
        else:
            values = noise.randn((1, model.latents.channels, *model.patch))
            shown = model.patch if component["model"].spec.plan is None else sizes
            latents = np.tile(values, [1, 1, *(size // of for size, of in zip(shown, model.patch, strict=True))])
        text_inputs = self.text.inputs(component["model"].inputs, [text])
        return {"hidden_states": latents * QUIET, "timestep": np.array([TIMESTEP]), **text_inputs}


def _decoder_calls(
    component: Component, model: ModelSpec, built: ComponentSpec, results: Sequence[NDArray[Any]]
) -> Iterator[Call]:
    """The head's calls at each size, and then the tail's at those that were not tested yet and that it has features
    for; the smallest of both must have room on any device."""
    heads = _sizes(built, "head_first", ("height", "width"), (ROWS, COLUMNS))
    scale = _scale(built)
    tails = _sizes(built, "tail", ("height", "width"), (ROWS * scale, COLUMNS * scale))
    smallest_head, smallest_tail = min(heads, key=math.prod), min(tails, key=math.prod)
    for rows, columns in sorted(heads, key=math.prod):
        noise, features, done = Generator(0), list[NDArray[Any]](), len(results)
        spare = (rows, columns) != smallest_head
        for when in ("first", "next"):
            latents = noise.randn((1, model.latents.channels, rows, columns))
            yield Call(f"head_{when}", {"latents": latents}, "features", _named((rows, columns)), spare=spare)
            features += results[done + len(features) :][:1]
        fed = [sizes for sizes in tails if sizes[0] <= rows * scale and sizes[1] <= columns * scale]
        tails = [sizes for sizes in tails if sizes not in fed]
        for sizes in sorted(fed, key=math.prod):
            for i, frames in enumerate(features):
                part, corner = _tail_part(component, built, frames[:1, :, : sizes[0], : sizes[1]])
                variant, spare = f"{_named(sizes)}.{i}", sizes != smallest_tail
                yield Call("tail", {"features": part}, "frames", variant, corner, spare)


def _tail_part(
    component: Component, built: ComponentSpec, features: NDArray[Any]
) -> tuple[NDArray[Any], tuple[int, int] | None]:
    """The features that a tail is fed, and the corner of its pixels that is kept where there are more than `CORNER`.

    A reference is fed no more than it takes for that corner: its memory on a CPU is that of a tile.
    """
    tiles, sizes = built.tiles, features.shape[-2:]
    assert tiles is not None
    if max(sizes) <= CORNER:
        return features, None
    if component["tail"].spec.plan is None:
        features = features[..., -(CORNER + tiles.halo) :, -(CORNER + tiles.halo) :]
    rows, columns = (min(size, CORNER) * tiles.upscale for size in sizes)
    return features, (rows, columns)


def _sizes(built: ComponentSpec, role: str, names: Sequence[str], free: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The sizes that a plan is tuned for in each of its profiles; `free` of a graph."""
    plan = built.graphs[role].plan
    if plan is None:
        return [free]
    return list(dict.fromkeys(tuple(profile.sizes[name].opt for name in names) for profile in plan.profiles))


def _named(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


def _scale(built: ComponentSpec) -> int:
    assert built.tiles is not None
    return built.tiles.scale


FAMILY = Wan()
