"""What a Wan2.1 checkpoint holds: its configs, and names and shapes of all tensors by them.

Source: the state dicts of diffusers `WanTransformer3DModel` and `AutoencoderKLWan` and of transformers
`UMT5EncoderModel`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from t2v_rt.export.wan import published

Tensor = tuple[str, tuple[int, ...]]
Config = Mapping[str, Any]
HEAD_DIM = 64  # of every UMT5
SCHEDULER = published.SCHEDULER
FULL_TEXT_ENCODER: Config = {
    **published.CONFIGS["text_encoder"],
    "architectures": ["UMT5EncoderModel"],
    "is_gated_act": True,
    "dense_act_fn": "gelu_new",
    "tie_word_embeddings": False,  # as published, though the embedding is there once only
}
CONFIGS: Mapping[str, Config] = {
    "transformer": {
        **published.CONFIGS["transformer"],
        "image_dim": None,
        "added_kv_proj_dim": None,
        "pos_embed_seq_len": None,
    },
    "vae": {**published.CONFIGS["vae"], "attn_scales": [], "dropout": 0.0},
    "text_encoder": {
        **FULL_TEXT_ENCODER,
        "vocab_size": 512,
        "d_ff": 256,
        "num_layers": 1,
        "num_heads": 4,
        "tie_word_embeddings": True,
    },
}
INDEX = {
    **published.INDEX,
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
}


def transformer_tensors(config: Config) -> Iterator[Tensor]:
    """Tensors of a WanTransformer3DModel."""
    dim = config["num_attention_heads"] * config["attention_head_dim"]
    yield "scale_shift_table", (1, 2, dim)
    yield from _layer("patch_embedding", dim, config["in_channels"], *config["patch_size"])
    embedder = "condition_embedder"
    yield from _layer(f"{embedder}.time_embedder.linear_1", dim, config["freq_dim"])
    yield from _layer(f"{embedder}.time_embedder.linear_2", dim, dim)
    yield from _layer(f"{embedder}.time_proj", 6 * dim, dim)
    yield from _layer(f"{embedder}.text_embedder.linear_1", dim, config["text_dim"])
    yield from _layer(f"{embedder}.text_embedder.linear_2", dim, dim)
    for i in range(config["num_layers"]):
        block = f"blocks.{i}"
        yield f"{block}.scale_shift_table", (1, 6, dim)
        for attention in ("attn1", "attn2"):
            for part in ("to_q", "to_k", "to_v", "to_out.0"):
                yield from _layer(f"{block}.{attention}.{part}", dim, dim)
            yield from ((f"{block}.{attention}.norm_{part}.weight", (dim,)) for part in "qk")
        if config["cross_attn_norm"]:
            yield from _layer(f"{block}.norm2", dim)
        yield from _layer(f"{block}.ffn.net.0.proj", config["ffn_dim"], dim)
        yield from _layer(f"{block}.ffn.net.2", dim, config["ffn_dim"])
    patch_t, patch_h, patch_w = config["patch_size"]
    yield from _layer("proj_out", config["out_channels"] * patch_t * patch_h * patch_w, dim)


def text_encoder_tensors(config: Config) -> Iterator[Tensor]:
    """Tensors of a UMT5EncoderModel as it is saved; its tied embedding is stored once."""
    dim, inner, heads = config["d_model"], config["d_kv"] * config["num_heads"], config["num_heads"]
    yield "shared.weight", (config["vocab_size"], dim)
    for i in range(config["num_layers"]):
        block = f"encoder.block.{i}.layer"
        yield from ((f"{block}.0.SelfAttention.{part}.weight", (inner, dim)) for part in "qkv")
        yield f"{block}.0.SelfAttention.o.weight", (dim, inner)
        buckets = config["relative_attention_num_buckets"]
        yield f"{block}.0.SelfAttention.relative_attention_bias.weight", (buckets, heads)
        yield f"{block}.0.layer_norm.weight", (dim,)
        yield from ((f"{block}.1.DenseReluDense.wi_{j}.weight", (config["d_ff"], dim)) for j in (0, 1))
        yield f"{block}.1.DenseReluDense.wo.weight", (dim, config["d_ff"])
        yield f"{block}.1.layer_norm.weight", (dim,)
    yield "encoder.final_layer_norm.weight", (dim,)


def vae_tensors(config: Config) -> Iterator[Tensor]:
    """Tensors of an AutoencoderKLWan, encoder and decoder."""
    base, z, mult, down = config["base_dim"], config["z_dim"], config["dim_mult"], config["temperal_downsample"]
    yield from _layer("encoder.conv_in", base, 3, 3, 3, 3)
    width, index = base, 0
    for level, factor in enumerate(mult):
        for _ in range(config["num_res_blocks"]):
            yield from _res_block(f"encoder.down_blocks.{index}", width, base * factor)
            width, index = base * factor, index + 1
        if level < len(mult) - 1:
            yield from _layer(f"encoder.down_blocks.{index}.resample.1", width, width, 3, 3)
            if down[level]:
                yield from _layer(f"encoder.down_blocks.{index}.time_conv", width, width, 3, 1, 1)
            index += 1
    yield from _mid_block("encoder", width)
    yield from _layer("encoder.conv_out", 2 * z, width, 3, 3, 3)
    yield from _layer("quant_conv", 2 * z, 2 * z, 1, 1, 1)
    yield from _layer("post_quant_conv", z, z, 1, 1, 1)
    width = base * mult[-1]
    yield from _layer("decoder.conv_in", width, z, 3, 3, 3)
    yield from _mid_block("decoder", width)
    for level, factor in enumerate(reversed(mult)):
        block = f"decoder.up_blocks.{level}"
        for i in range(config["num_res_blocks"] + 1):
            yield from _res_block(f"{block}.resnets.{i}", width, base * factor)
            width = base * factor
        if level < len(mult) - 1:
            yield from _layer(f"{block}.upsamplers.0.resample.1", width // 2, width, 3, 3)
            if down[::-1][level]:
                yield from _layer(f"{block}.upsamplers.0.time_conv", 2 * width, width, 3, 1, 1)
            width //= 2
    yield "decoder.norm_out.gamma", (width, 1, 1, 1)
    yield from _layer("decoder.conv_out", 3, width, 3, 3, 3)


def _layer(name: str, n_out: int, *rest: int) -> Iterator[Tensor]:
    yield f"{name}.weight", (n_out, *rest)
    yield f"{name}.bias", (n_out,)


def _res_block(name: str, n_in: int, n_out: int) -> Iterator[Tensor]:
    yield f"{name}.norm1.gamma", (n_in, 1, 1, 1)
    yield from _layer(f"{name}.conv1", n_out, n_in, 3, 3, 3)
    yield f"{name}.norm2.gamma", (n_out, 1, 1, 1)
    yield from _layer(f"{name}.conv2", n_out, n_out, 3, 3, 3)
    if n_in != n_out:
        yield from _layer(f"{name}.conv_shortcut", n_out, n_in, 1, 1, 1)


def _mid_block(side: str, width: int) -> Iterator[Tensor]:
    attention = f"{side}.mid_block.attentions.0"
    yield f"{attention}.norm.gamma", (width, 1, 1)
    yield from _layer(f"{attention}.to_qkv", 3 * width, width, 1, 1)
    yield from _layer(f"{attention}.proj", width, width, 1, 1)
    yield from _res_block(f"{side}.mid_block.resnets.0", width, width)
    yield from _res_block(f"{side}.mid_block.resnets.1", width, width)
    if side == "encoder":
        yield f"{side}.norm_out.gamma", (width, 1, 1, 1)


def fan_in(name: str, shape: tuple[int, ...]) -> int:
    """Products that a weight is summed over: none of an embedding; UMT5's queries carry its scores' scale as well."""
    if name == "shared.weight":
        return 1
    return math.prod(shape[1:]) * (HEAD_DIM if name.endswith("SelfAttention.q.weight") else 1)


TENSORS: Mapping[str, tuple[str, Callable[[Config], Iterator[Tensor]]]] = {
    "transformer": ("diffusion_pytorch_model", transformer_tensors),
    "vae": ("diffusion_pytorch_model", vae_tensors),
    "text_encoder": ("model", text_encoder_tensors),
}
