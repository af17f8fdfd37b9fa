"""The Wan2.1 denoiser as one ONNX graph.

Source of the architecture: diffusers `WanTransformer3DModel`; Wan: Open and Advanced Large-Scale Video Generative
Models (arXiv:2503.20314). Written differently where it costs nothing in the result:

- Rotary embedding on halves. Rotation acts on channel pairs (2i, 2i+1); with the rows of the q and k projections
  reordered once at export so that a head's even channels come first, the pairs are (i, i + D/2) and no strided access
  is left. The q and k norms average over all channels, so only their weights are reordered along; q.k is unchanged.
- Cross attention takes a bias per text position. The reference attends to 512 positions of which those past the
  prompt are zero vectors, hence all alike after the text projection: one of them, its score raised by the logarithm
  of how many there are, gives the same attention. An engine of fixed shapes takes all 512 and no bias.

In half precision more things, for memory on a GPU (figures: TensorRT-RTX, 832x480, 81 frames):

- The query and key norms multiply by their weight in half, then by the reciprocal root mean square in float32. A norm
  of its own makes the builder keep both projections in float32 (0.2 GB more).
- The feed-forward runs over slices of the tokens, so that its widened values are there for one slice at a time
  (0.5 GB less; with less than ten slices the builder runs several at once again).
- Values of the self attention are projected apart from queries and keys (0.2 GB less in plans for one GPU).
- Each layer's text depends on its hidden states, by nothing times them: the builder would compute the keys and values
  of all 30 layers first of all, and keep them (0.1 GB less).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t2v_rt.engines.specs import TensorSpec
from t2v_rt.errors import CheckpointError
from t2v_rt.export.attention import attend, project_values
from t2v_rt.export.config import option, require
from t2v_rt.export.graph import GraphWriter, transpose
from t2v_rt.export.tensors import Transform

TEXT_LENGTH = 512  # the pipeline's max_sequence_length; the denoiser was trained on text padded to it
ROPE_THETA = 10000.0
MAX_PERIOD = 10000.0  # of the sinusoidal time embedding


@dataclass(frozen=True)
class TransformerConfig:
    """What of a WanTransformer3DModel's config shapes the graph."""

    patch: tuple[int, int, int]
    heads: int
    head_dim: int
    in_channels: int
    out_channels: int
    text_dim: int
    freq_dim: int
    ffn_dim: int
    layers: int
    cross_attn_norm: bool
    eps: float
    rope_max: int

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> TransformerConfig:
        """Reads `transformer/config.json`; raises CheckpointError for an architecture that is not text-to-video 2.1."""
        require(config, "transformer", "_class_name", "WanTransformer3DModel")
        require(config, "transformer", "qk_norm", "rms_norm_across_heads", default="rms_norm_across_heads")
        for key in ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len"):
            require(config, "transformer", key, None, default=None)
        patch = tuple(option(config, "transformer", "patch_size", list, [1, 2, 2]))
        in_channels = option(config, "transformer", "in_channels", int, 16)
        head_dim = option(config, "transformer", "attention_head_dim", int, 128)
        if len(patch) != 3 or head_dim % 2 or head_dim < 6:
            raise CheckpointError(
                f"transformer/config.json: patch_size {list(patch)} and attention_head_dim {head_dim}; "
                "expected three patch sizes and an even head size of 6 or more"
            )
        return cls(
            patch=(patch[0], patch[1], patch[2]),
            heads=option(config, "transformer", "num_attention_heads", int, 40),
            head_dim=head_dim,
            in_channels=in_channels,
            out_channels=option(config, "transformer", "out_channels", int, in_channels, nullable=True) or in_channels,
            text_dim=option(config, "transformer", "text_dim", int, 4096),
            freq_dim=option(config, "transformer", "freq_dim", int, 256),
            ffn_dim=option(config, "transformer", "ffn_dim", int, 13824),
            layers=option(config, "transformer", "num_layers", int, 40),
            cross_attn_norm=option(config, "transformer", "cross_attn_norm", bool, True),
            eps=option(config, "transformer", "eps", float, 1e-6),
            rope_max=option(config, "transformer", "rope_max_seq_len", int, 1024),
        )


def input_specs(config: TransformerConfig, text_rows: int | None = None) -> list[TensorSpec]:
    """The denoiser's inputs: latents, timestep in 0..1000, text embeddings, and the bias of each text position.

    There is no bias where the text always comes padded to a fixed number of rows.
    """
    specs = [
        TensorSpec("hidden_states", "float32", ("batch", config.in_channels, "frames", "height", "width")),
        TensorSpec("timestep", "float32", ("batch",)),
        TensorSpec("encoder_hidden_states", "float32", ("batch", text_rows or "text", config.text_dim)),
    ]
    return specs if text_rows else [*specs, TensorSpec("encoder_attention_bias", "float32", ("batch", "text"))]


def output_spec(config: TransformerConfig) -> TensorSpec:
    return TensorSpec("noise_pred", "float32", ("batch", config.out_channels, "frames", "height", "width"))


def write_transformer(g: GraphWriter, config: TransformerConfig) -> None:
    """Writes the whole denoiser into `g`: `input_specs` in, `output_spec` out."""
    latents, timestep, text, *text_bias = (g.input(spec) for spec in input_specs(config, g.options.sizes.get("text")))
    batch = g.dim(latents, 0)
    grid = [_divide(g, g.dim(latents, axis), size) for axis, size in zip((2, 3, 4), config.patch, strict=True)]

    hidden = _patch_embedding(g, config, latents, batch)
    tokens = g.dim(hidden, 1)
    rotary = _rotary_table(g, config, grid, tokens)
    temb, modulation = _time_embedding(g, config, timestep)
    context = _text_projection(g, config, text)
    mask = _text_mask(g, text_bias[0], tokens) if text_bias else None
    for layer in range(config.layers):
        hidden = _block(g, config, f"blocks.{layer}", hidden, modulation, rotary, context, mask)

    table = g.weight("scale_shift_table", (1, 2, config.dim), half=False)
    shift, scale = _chunks(g, g.add(table, g.op("Unsqueeze", temb, g.const([1]))), 2)
    normed = _modulate(g, _layer_norm(g, hidden, config), scale, shift)
    patch_values = g.full(
        g.linear(g.half(normed), "proj_out", config.dim, config.out_channels * int(np.prod(config.patch)))
    )
    g.output(_unpatchify(g, config, patch_values, batch, grid), output_spec(config))


def _text_mask(g: GraphWriter, bias: str, tokens: str) -> str:
    """The bias (B, text) as an attention mask (B, 1, tokens, text)."""
    shape = g.shape_of([g.dim(bias, 0), 1, tokens, g.dim(bias, 1)])
    return g.half(g.op("Expand", g.op("Unsqueeze", bias, g.const([1, 2])), shape))


def _divide(g: GraphWriter, size: str, by: int) -> str:
    return size if by == 1 else g.op("Div", size, g.const([by]))


def _patch_embedding(g: GraphWriter, config: TransformerConfig, latents: str, batch: str) -> str:
    """(B, C, F, H, W) -> (B, tokens, dim); a patch is one stride of the convolution."""
    shape = (config.dim, config.in_channels, *config.patch)
    weight = g.weight("patch_embedding.weight", shape)
    bias = g.weight("patch_embedding.bias", (config.dim,))
    patches = g.op("Conv", g.half(latents), weight, bias, strides=list(config.patch), kernel_shape=list(config.patch))
    return g.transpose(g.full(g.reshape(patches, [batch, config.dim, -1])), [0, 2, 1])


def _unpatchify(g: GraphWriter, config: TransformerConfig, x: str, batch: str, grid: list[str]) -> str:
    """(B, tokens, patch * C) -> (B, C, F, H, W)."""
    pt, ph, pw = config.patch
    x = g.reshape(x, [batch, *grid, pt, ph, pw, config.out_channels])
    x = g.transpose(x, [0, 7, 1, 4, 2, 5, 3, 6])
    sizes = [size if by == 1 else g.op("Mul", size, g.const([by])) for size, by in zip(grid, config.patch, strict=True)]
    return g.reshape(x, [batch, config.out_channels, *sizes])


def rotary_frequencies(config: TransformerConfig) -> list[NDArray[np.float64]]:
    """Angles position * theta^(-2i/d) of each axis: three arrays (rope_max, d/2), d the channels of that axis."""
    side = 2 * (config.head_dim // 6)
    positions = np.arange(config.rope_max, dtype=np.float64)
    angles = []
    for d in (config.head_dim - 2 * side, side, side):
        frequencies = 1.0 / ROPE_THETA ** (np.arange(0, d, 2, dtype=np.float64)[: d // 2] / d)
        angles.append(np.outer(positions, frequencies))
    return angles


def _rotary_table(g: GraphWriter, config: TransformerConfig, grid: list[str], tokens: str) -> tuple[str, str]:
    """Cosines and sines of every token, (1, tokens, 1, D/2): a token's channels turn by its frame, row and column."""
    tables = []
    for function in (np.cos, np.sin):
        parts = []
        for axis, angles in enumerate(rotary_frequencies(config)):
            column = g.const(function(angles), np.float32)
            used = g.slice(column, 0, 0, grid[axis])
            around = [d for d in range(3) if d != axis]
            placed = g.op("Unsqueeze", used, g.const(around))
            parts.append(g.op("Expand", placed, g.shape_of([*grid, angles.shape[1]])))
        tables.append(g.reshape(g.concat(parts, 3), [1, tokens, 1, config.head_dim // 2]))
    return tables[0], tables[1]


def halves_first(config: TransformerConfig) -> Transform:
    """Reorders output rows so that each head's even channels come before its odd ones."""
    order = np.arange(config.dim).reshape(config.heads, config.head_dim // 2, 2).transpose(0, 2, 1).reshape(-1)

    def reorder(weight: NDArray[np.float32]) -> NDArray[np.float32]:
        rows: NDArray[np.float32] = weight[order]
        return rows

    return reorder


def _time_embedding(g: GraphWriter, config: TransformerConfig, timestep: str) -> tuple[str, str]:
    """Timesteps (B,) -> embedding (B, dim) and the blocks' modulation (B, 6, dim), both float32."""
    half = config.freq_dim // 2
    exponent = np.float32(-np.log(MAX_PERIOD)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequencies = np.exp(exponent.astype(np.float64)).astype(np.float32)
    angles = g.mul(g.op("Unsqueeze", timestep, g.const([1])), g.const(frequencies[None], np.float32))
    wave = g.concat([g.op("Cos", angles), g.op("Sin", angles)], 1)
    name = "condition_embedder.time_embedder"
    temb = g.linear_full(wave, f"{name}.linear_1", config.freq_dim, config.dim)
    temb = g.linear_full(g.silu(temb), f"{name}.linear_2", config.dim, config.dim)
    projected = g.linear_full(g.silu(temb), "condition_embedder.time_proj", config.dim, 6 * config.dim)
    return temb, g.reshape(projected, [-1, 6, config.dim])


def _text_projection(g: GraphWriter, config: TransformerConfig, text: str) -> str:
    name = "condition_embedder.text_embedder"
    x = g.linear(g.half(text), f"{name}.linear_1", config.text_dim, config.dim)
    return g.linear(g.op("Gelu", x, approximate="tanh"), f"{name}.linear_2", config.dim, config.dim)


def _chunks(g: GraphWriter, x: str, count: int) -> list[str]:
    return g.ops("Split", count, x, axis=1, num_outputs=count)


def _modulate(g: GraphWriter, x: str, scale: str, shift: str) -> str:
    return g.add(g.mul(x, g.add(scale, g.scalar(1.0))), shift)


def _layer_norm(g: GraphWriter, x: str, config: TransformerConfig, affine: str | None = None) -> str:
    """Layer norm in float32, with the weights of `affine` where the checkpoint has them."""
    if affine is None:
        scale = [g.const(np.ones(config.dim), np.float32)]
    else:
        scale = [g.weight(f"{affine}.{part}", (config.dim,), half=False) for part in ("weight", "bias")]
    return g.op("LayerNormalization", x, *scale, axis=-1, epsilon=config.eps)


def _block(
    g: GraphWriter,
    config: TransformerConfig,
    name: str,
    hidden: str,
    modulation: str,
    rotary: tuple[str, str],
    context: str,
    mask: str | None,
) -> str:
    table = g.weight(f"{name}.scale_shift_table", (1, 6, config.dim), half=False)
    shift, scale, gate, ff_shift, ff_scale, ff_gate = _chunks(g, g.add(table, modulation), 6)

    # 1. Self attention
    normed = g.half(_modulate(g, _layer_norm(g, hidden, config), scale, shift))
    attended = _attention(g, config, f"{name}.attn1", normed, normed, rotary=rotary)
    hidden = g.add(hidden, g.mul(g.full(attended), gate))

    # 2. Cross attention to the prompt
    normed = _layer_norm(g, hidden, config, f"{name}.norm2") if config.cross_attn_norm else hidden
    context = _held_back(g, context, hidden)
    attended = _attention(g, config, f"{name}.attn2", g.half(normed), context, mask=mask)
    hidden = g.add(hidden, g.full(attended))

    # 3. Feed forward
    normed = g.half(_modulate(g, _layer_norm(g, hidden, config), ff_scale, ff_shift))
    return g.add(hidden, g.mul(g.full(_feed_forward(g, config, f"{name}.ffn.net", normed)), ff_gate))


def _held_back(g: GraphWriter, context: str, hidden: str) -> str:
    """The text again, as if it followed from a layer's hidden states."""
    in_order = g.options.accumulation is None  # as ONNX Runtime takes nodes
    if in_order or g.options.slices == 1:  # or the video is small, and memory with it
        return context
    nothing = g.mul(g.slice(hidden, 1, 0, 1), g.scalar(0.0))
    return g.add(context, g.half(nothing))


def _feed_forward(g: GraphWriter, config: TransformerConfig, name: str, x: str) -> str:
    """Widen, GELU, narrow; each slice of the tokens on its own."""
    count = g.options.slices
    parts = [x]
    if count > 1:
        tokens = g.dim(x, 1)
        step = g.op("Div", tokens, g.const([count]))
        bounds = [g.op("Mul", step, g.const([i])) for i in range(count)] + [tokens]
        parts = [g.slice(x, 1, bounds[i], bounds[i + 1]) for i in range(count)]
    outs = []
    for part in parts:
        inner = g.op("Gelu", g.linear(part, f"{name}.0.proj", config.dim, config.ffn_dim), approximate="tanh")
        outs.append(g.linear(inner, f"{name}.2", config.ffn_dim, config.dim))
    return outs[0] if count == 1 else g.concat(outs, 1)


def _attention(
    g: GraphWriter,
    config: TransformerConfig,
    name: str,
    x: str,
    context: str,
    rotary: tuple[str, str] | None = None,
    mask: str | None = None,
) -> str:
    dim = config.dim
    query, key = (
        _normed_projection(g, config, f"{name}.to_{q}", f"{name}.norm_{q}", source, rotary)
        for q, source in (("q", x), ("k", context))
    )
    if rotary is None:
        value = g.linear(context, f"{name}.to_v", dim, dim)
        attended = attend(g, query, key, value, mask, heads=config.heads)
    else:
        value, mean = project_values(g, context, f"{name}.to_v", dim, dim)
        attended = attend(g, query, key, value, heads=config.heads, mean=mean, parts=g.options.attention_parts)
    return g.linear(attended, f"{name}.to_out.0", dim, dim)


def _normed_projection(
    g: GraphWriter, config: TransformerConfig, name: str, norm: str, x: str, rotary: tuple[str, str] | None
) -> str:
    """Projection and RMS norm across all heads, then the rotation; back in the compute dtype for attention."""
    dim, order = config.dim, None if rotary is None else halves_first(config)
    kernel = g.weight(f"{name}.weight", (dim, dim), transpose if order is None else lambda rows: order(rows).T)
    y = g.add(g.op("MatMul", x, kernel), g.weight(f"{name}.bias", (dim,), order))
    if g.precision == "fp32":
        weight = g.weight(f"{norm}.weight", (dim,), order, half=False)
        y = g.op("RMSNormalization", y, weight, axis=-1, epsilon=config.eps)
    else:
        scaled = g.full(g.mul(y, g.weight(f"{norm}.weight", (dim,), order)))
        y = g.mul(scaled, _reciprocal_rms(g, g.full(y), config.eps))
    if rotary is None:
        return g.half(y)
    heads = g.reshape(y, [0, 0, config.heads, config.head_dim])
    first, second = g.ops("Split", 2, heads, axis=3, num_outputs=2)
    cos, sin = rotary
    turned = g.concat(
        [
            g.op("Sub", g.mul(first, cos), g.mul(second, sin)),
            g.add(g.mul(first, sin), g.mul(second, cos)),
        ],
        3,
    )
    return g.half(g.reshape(turned, [0, 0, dim]))


def _reciprocal_rms(g: GraphWriter, x: str, eps: float) -> str:
    mean = g.op("ReduceMean", g.mul(x, x), g.const([2]), keepdims=1)
    return g.op("Reciprocal", g.op("Sqrt", g.add(mean, g.scalar(eps))))
