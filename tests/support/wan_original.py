"""Checkpoints under the names of Wan's own code: listed as its modules define them, mapped by diffusers' converters.

Source: Wan-Video/Wan2.1, `wan/modules/model.py` (WanModel), `vae.py` (WanVAE_) and `t5.py` (T5Encoder). The text
encoder's mapping, which diffusers lacks, is by the place of each module in `T5SelfAttention.forward`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers
from safetensors.numpy import load_file, save_file

from tests.support.checkpoints import TinyWan

FILES = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


def _layer(name: str) -> Iterator[str]:
    yield from (f"{name}.weight", f"{name}.bias")


def transformer_names(config: TinyWan) -> Iterator[str]:
    for name in ("patch_embedding", "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2"):
        yield from _layer(name)
    yield from _layer("time_projection.1")
    for i in range(config.layers):
        for attention in ("self_attn", "cross_attn"):
            for part in "qkvo":
                yield from _layer(f"blocks.{i}.{attention}.{part}")
            yield from (f"blocks.{i}.{attention}.norm_{part}.weight" for part in "qk")
        if config.cross_attn_norm:
            yield from _layer(f"blocks.{i}.norm3")
        yield from (*_layer(f"blocks.{i}.ffn.0"), *_layer(f"blocks.{i}.ffn.2"))
        yield f"blocks.{i}.modulation"
    yield from _layer("head.head")
    yield "head.modulation"


def _residual(name: str, shortcut: bool) -> Iterator[str]:
    yield from (f"{name}.residual.0.gamma", *_layer(f"{name}.residual.2"))
    yield from (f"{name}.residual.3.gamma", *_layer(f"{name}.residual.6"))
    if shortcut:
        yield from _layer(f"{name}.shortcut")


def _middle(side: str) -> Iterator[str]:
    yield from _residual(f"{side}.middle.0", shortcut=False)
    yield f"{side}.middle.1.norm.gamma"
    yield from (*_layer(f"{side}.middle.1.to_qkv"), *_layer(f"{side}.middle.1.proj"))
    yield from _residual(f"{side}.middle.2", shortcut=False)
    yield f"{side}.head.0.gamma"
    yield from _layer(f"{side}.head.2")


def vae_names(config: TinyWan) -> Iterator[str]:
    yield from (*_layer("conv1"), *_layer("conv2"), *_layer("encoder.conv1"), *_layer("decoder.conv1"))
    widths = [1, *config.dim_mult]
    index = 0
    for level, (before, after) in enumerate(itertools.pairwise(widths)):
        for i in range(config.res_blocks):
            yield from _residual(f"encoder.downsamples.{index}", i == 0 and before != after)
            index += 1
        if level < len(config.dim_mult) - 1:
            yield from _layer(f"encoder.downsamples.{index}.resample.1")
            if config.down[level]:
                yield from _layer(f"encoder.downsamples.{index}.time_conv")
            index += 1
    widths = [config.dim_mult[-1], *reversed(config.dim_mult)]
    index = 0
    for level, (before, after) in enumerate(itertools.pairwise(widths)):
        for i in range(config.res_blocks + 1):
            yield from _residual(f"decoder.upsamples.{index}", i == 0 and (before / 2 if level else before) != after)
            index += 1
        if level < len(config.dim_mult) - 1:
            yield from _layer(f"decoder.upsamples.{index}.resample.1")
            if config.down[::-1][level]:
                yield from _layer(f"decoder.upsamples.{index}.time_conv")
            index += 1
    yield from (*_middle("encoder"), *_middle("decoder"))


def text_encoder_names(config: TinyWan) -> dict[str, str]:
    """Wan's name -> transformers'."""
    names = {"token_embedding.weight": "shared.weight", "norm.weight": "encoder.final_layer_norm.weight"}
    for i in range(config.text_layers):
        attention, feed_forward = (f"encoder.block.{i}.layer.{j}" for j in (0, 1))
        parts = {
            "norm1": f"{attention}.layer_norm",
            **{f"attn.{part}": f"{attention}.SelfAttention.{part}" for part in "qkvo"},
            "pos_embedding.embedding": f"{attention}.SelfAttention.relative_attention_bias",
            "norm2": f"{feed_forward}.layer_norm",
            "ffn.gate.0": f"{feed_forward}.DenseReluDense.wi_0",
            "ffn.fc1": f"{feed_forward}.DenseReluDense.wi_1",
            "ffn.fc2": f"{feed_forward}.DenseReluDense.wo",
        }
        names |= {f"blocks.{i}.{wan}.weight": f"{theirs}.weight" for wan, theirs in parts.items()}
    return names


def diffusers_names(config: TinyWan, network: str) -> dict[str, str]:
    """Wan's name -> diffusers' or transformers', of every tensor of a network."""
    if network == "text_encoder":
        return text_encoder_names(config)
    names = transformer_names(config) if network == "transformer" else vae_names(config)
    convert: Any = convert_wan_transformer_to_diffusers if network == "transformer" else convert_wan_vae_to_diffusers
    return {name: new for new, name in convert({name: name for name in names}).items()}


def write_single_files(config: TinyWan, checkpoint: Path, folder: Path) -> dict[str, Path]:
    """Writes a diffusers checkpoint's networks into single files under Wan's names; returns network -> file."""
    folder.mkdir()
    written = {}
    for network, stem in FILES.items():
        tensors = load_file(checkpoint / network / f"{stem}.safetensors")
        tensors.pop("encoder.embed_tokens.weight", None)  # which is the shared one
        names = {new: name for name, new in diffusers_names(config, network).items()}
        assert set(names) == set(tensors)
        written[network] = folder / f"{network}.safetensors"
        save_file({names[name]: tensor for name, tensor in tensors.items()}, written[network])
    return written
