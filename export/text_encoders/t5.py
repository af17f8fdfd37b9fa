"""The UMT5 encoder as ONNX graphs of dynamic length, each a group of its blocks.

Source of the architecture: transformers `UMT5EncoderModel`; UniMax (arXiv:2304.09151), T5 (arXiv:1910.10683). Each
layer has its own relative-position bias and scores are not scaled. The bucket of each pair of positions is an input:
its logarithm would otherwise be folded, or taken of zero, inside the graph. So are the rows of the embedding: its
table, a fifth of the true model's weights, stays on the host. The residual stream stays float32 and, at float16, so
does the second feed-forward matrix: their values leave half's range, not bfloat16's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from t2v_rt.engines.specs import TensorSpec
from t2v_rt.errors import CheckpointError
from t2v_rt.export.attention import attend
from t2v_rt.export.config import option, require
from t2v_rt.export.graph import GraphWriter, transpose
from t2v_rt.export.tensors import CheckpointWeights

# Where float32 matrices cannot be multiplied, half ones are, of values divided by this power of two: sums of several
# hundred thousand, as they occur, then stay below half's 65504.
WO_SCALE = 64.0
HALF, FULL = 2, 4  # bytes of a value
SCORE_COPIES = 3  # of the attention's scores, in float32, that are held at once: with their bias and their softmax
TOKEN_COPIES = 4  # of the residual stream, likewise
WIDENED_COPIES = 3  # of the feed-forward's values
EMBEDDING = ("encoder.embed_tokens.weight", "shared.weight")  # the first that there is, as transformers ties them


@dataclass(frozen=True)
class TextEncoderConfig:
    """What of a UMT5Config shapes the encoder."""

    vocab: int
    dim: int
    head_dim: int
    heads: int
    ffn_dim: int
    layers: int
    buckets: int
    max_distance: int
    eps: float
    end_token: int = 1

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> TextEncoderConfig:
        """Reads `text_encoder/config.json`; raises CheckpointError for another architecture or activation."""
        require(config, "text_encoder", "model_type", "umt5")
        act = config.get("feed_forward_proj", "gated-gelu")
        if act != "gated-gelu":
            raise CheckpointError(
                f"text_encoder/config.json: feed_forward_proj is {act!r}; only 'gated-gelu' is supported"
            )
        read = {
            key: option(config, "text_encoder", key, int, default)
            for key, default in (
                ("vocab_size", 250112),
                ("d_model", 512),
                ("d_kv", 64),
                ("num_heads", 6),
                ("d_ff", 1024),
                ("num_layers", 8),
                ("relative_attention_num_buckets", 32),
                ("relative_attention_max_distance", 128),
            )
        }
        return cls(
            vocab=read["vocab_size"],
            dim=read["d_model"],
            head_dim=read["d_kv"],
            heads=read["num_heads"],
            ffn_dim=read["d_ff"],
            layers=read["num_layers"],
            buckets=read["relative_attention_num_buckets"],
            max_distance=read["relative_attention_max_distance"],
            eps=option(config, "text_encoder", "layer_norm_epsilon", float, 1e-6),
            end_token=option(config, "text_encoder", "eos_token_id", int, 1, nullable=True),
        )

    @property
    def block_bytes(self) -> int:
        """Weights of a block at half precision, with the float32 ones of float16."""
        attention = 4 * self.dim * self.heads * self.head_dim
        return HALF * attention + (2 * HALF + FULL) * self.dim * self.ffn_dim

    def context_bytes(self, length: int) -> int:
        """Estimate of the memory that a block works in, for so many tokens."""
        values = TOKEN_COPIES * self.dim + WIDENED_COPIES * self.ffn_dim + SCORE_COPIES * self.heads * length
        return length * values * FULL

    def groups(self, limit: int, length: int) -> tuple[range, ...]:
        """Consecutive groups of blocks, as even as can be, none of which takes more memory than `limit`.

        Args:
            limit: bytes, of weights at half precision and context.
            length: tokens of the longest prompt.

        Returns:
            As few groups as will do, of one block or more.
        """
        most = max(1, (limit - self.context_bytes(length)) // self.block_bytes)
        count = math.ceil(self.layers / most)
        bounds = [self.layers * i // count for i in range(count + 1)]
        return tuple(range(*pair) for pair in itertools.pairwise(bounds))


def write_blocks(g: GraphWriter, config: TextEncoderConfig, blocks: range) -> None:
    """Writes consecutive blocks of the encoder into `g`.

    Args:
        g: takes the graph: hidden states (B, L, D), of the first blocks rows of the embedding, and buckets (L, L) in;
            hidden states out or, of the last blocks, prompt embeddings (B, L, D).
        config: of the encoder.
        blocks: their indices.
    """
    shape = ("batch", "length", config.dim)
    hidden = g.input(TensorSpec("hidden_states", "float32", shape))
    buckets = g.input(TensorSpec("relative_buckets", "int64", ("length", "length")))
    for layer in blocks:
        block = f"encoder.block.{layer}"
        hidden = g.add(hidden, _self_attention(g, config, f"{block}.layer.0", hidden, buckets))
        hidden = g.add(hidden, _feed_forward(g, config, f"{block}.layer.1", hidden))
    if blocks.stop == config.layers:
        hidden = _norm(g, config, "encoder.final_layer_norm", hidden)
        g.output(hidden, TensorSpec("prompt_embeds", "float32", shape))
    else:
        g.output(hidden, TensorSpec("hidden_states_out", "float32", shape))


def embedding_name(weights: CheckpointWeights) -> str:
    """The tensor that is the table of token embeddings."""
    return next((name for name in EMBEDDING if name in weights), EMBEDDING[-1])


def _norm(g: GraphWriter, config: TextEncoderConfig, name: str, x: str) -> str:
    weight = g.weight(f"{name}.weight", (config.dim,), half=False)
    return g.op("RMSNormalization", x, weight, axis=-1, epsilon=config.eps)


def _self_attention(g: GraphWriter, config: TextEncoderConfig, name: str, x: str, buckets: str) -> str:
    inner = config.heads * config.head_dim
    normed = g.half(_norm(g, config, f"{name}.layer_norm", x))
    attention = f"{name}.SelfAttention"
    query, key, value = (g.linear(normed, f"{attention}.{part}", config.dim, inner, bias=False) for part in "qkv")
    table = g.weight(f"{attention}.relative_attention_bias.weight", (config.buckets, config.heads), half=False)
    bias = g.op("Unsqueeze", g.transpose(g.op("Gather", table, buckets), [2, 0, 1]), g.const([0]))
    attended = attend(g, query, key, value, g.half(bias), heads=config.heads, scale=1.0)
    return g.full(g.linear(attended, f"{attention}.o", inner, config.dim, bias=False))


def _feed_forward(g: GraphWriter, config: TextEncoderConfig, name: str, x: str) -> str:
    normed = g.half(_norm(g, config, f"{name}.layer_norm", x))
    dense = f"{name}.DenseReluDense"
    gate, linear = (g.linear(normed, f"{dense}.wi_{i}", config.dim, config.ffn_dim, bias=False) for i in (0, 1))
    inner = g.mul(g.full(g.op("Gelu", gate, approximate="tanh")), g.full(linear))
    if g.precision in ("bf16", "fp32"):
        return g.full(g.linear(g.half(inner), f"{dense}.wo", config.ffn_dim, config.dim, bias=False))
    if g.options.float32_matmul:
        wo = g.weight(f"{dense}.wo.weight", (config.dim, config.ffn_dim), transpose, half=False)
        return g.op("MatMul", inner, wo)
    small = g.half(g.mul(inner, g.scalar(1 / WO_SCALE)))
    narrowed = g.linear(small, f"{dense}.wo", config.ffn_dim, config.dim, bias=False)
    return g.mul(g.full(narrowed), g.scalar(WO_SCALE))
