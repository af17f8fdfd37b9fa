"""Names of Wan's own code for its networks' tensors, as ComfyUI repackages them in single files.

Source of the names: Wan-Video/Wan2.1, `wan/modules/model.py`, `vae.py` and `t5.py`. Only names differ from diffusers'
and transformers' checkpoints, no tensor's values or layout. A file that has their names already is taken as it is.
"""

from __future__ import annotations

import re
from bisect import bisect
from collections.abc import Callable, Iterable, Mapping

from t2v_rt.export.config import CheckpointConfigs
from t2v_rt.export.single_files import SingleFiles
from t2v_rt.export.wan import published

Rules = tuple[tuple[str, str], ...]
# a tensor that tells the network: under Wan's names, and under those that need no change
MARKS: Mapping[str, tuple[str, str]] = {
    "text_encoder": ("token_embedding.weight", "encoder.final_layer_norm.weight"),
    "transformer": ("head.modulation", "condition_embedder.time_proj.weight"),
    "vae": ("decoder.middle.0.residual.0.gamma", "decoder.mid_block.resnets.0.norm1.gamma"),
}

TRANSFORMER: Rules = (
    (r"(patch_embedding\..*)", r"\1"),
    (r"text_embedding\.0\.(.*)", r"condition_embedder.text_embedder.linear_1.\1"),
    (r"text_embedding\.2\.(.*)", r"condition_embedder.text_embedder.linear_2.\1"),
    (r"time_embedding\.0\.(.*)", r"condition_embedder.time_embedder.linear_1.\1"),
    (r"time_embedding\.2\.(.*)", r"condition_embedder.time_embedder.linear_2.\1"),
    (r"time_projection\.1\.(.*)", r"condition_embedder.time_proj.\1"),
    (r"(blocks\.\d+)\.modulation", r"\1.scale_shift_table"),
    (r"(blocks\.\d+)\.self_attn\.([qkv])\.(.*)", r"\1.attn1.to_\2.\3"),
    (r"(blocks\.\d+)\.self_attn\.o\.(.*)", r"\1.attn1.to_out.0.\2"),
    (r"(blocks\.\d+)\.self_attn\.(norm_[qk]\..*)", r"\1.attn1.\2"),
    (r"(blocks\.\d+)\.cross_attn\.([qkv])\.(.*)", r"\1.attn2.to_\2.\3"),
    (r"(blocks\.\d+)\.cross_attn\.o\.(.*)", r"\1.attn2.to_out.0.\2"),
    (r"(blocks\.\d+)\.cross_attn\.(norm_[qk]\..*)", r"\1.attn2.\2"),
    (r"(blocks\.\d+)\.norm3\.(.*)", r"\1.norm2.\2"),  # numbered by their order of use, not of definition
    (r"(blocks\.\d+)\.ffn\.0\.(.*)", r"\1.ffn.net.0.proj.\2"),
    (r"(blocks\.\d+)\.ffn\.2\.(.*)", r"\1.ffn.net.2.\2"),
    (r"head\.modulation", r"scale_shift_table"),
    (r"head\.head\.(.*)", r"proj_out.\1"),
)
TEXT_ENCODER: Rules = (
    (r"token_embedding\.weight", r"shared.weight"),
    (r"blocks\.(\d+)\.norm1\.(.*)", r"encoder.block.\1.layer.0.layer_norm.\2"),
    (r"blocks\.(\d+)\.attn\.([qkvo])\.(.*)", r"encoder.block.\1.layer.0.SelfAttention.\2.\3"),
    (
        r"blocks\.(\d+)\.pos_embedding\.embedding\.(.*)",
        r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias.\2",
    ),
    (r"blocks\.(\d+)\.norm2\.(.*)", r"encoder.block.\1.layer.1.layer_norm.\2"),
    (r"blocks\.(\d+)\.ffn\.gate\.0\.(.*)", r"encoder.block.\1.layer.1.DenseReluDense.wi_0.\2"),
    (r"blocks\.(\d+)\.ffn\.fc1\.(.*)", r"encoder.block.\1.layer.1.DenseReluDense.wi_1.\2"),
    (r"blocks\.(\d+)\.ffn\.fc2\.(.*)", r"encoder.block.\1.layer.1.DenseReluDense.wo.\2"),
    (r"norm\.weight", r"encoder.final_layer_norm.weight"),
)
RESIDUAL: Rules = (
    (r"residual\.0\.(.*)", r"norm1.\1"),
    (r"residual\.2\.(.*)", r"conv1.\1"),
    (r"residual\.3\.(.*)", r"norm2.\1"),
    (r"residual\.6\.(.*)", r"conv2.\1"),
    (r"shortcut\.(.*)", r"conv_shortcut.\1"),
)
VAE: Rules = (
    (r"(encoder\..*|conv1\..*)", r"\1"),  # only decoding is exported
    (r"conv2\.(.*)", r"post_quant_conv.\1"),
    (r"decoder\.conv1\.(.*)", r"decoder.conv_in.\1"),
    (r"decoder\.middle\.1\.(.*)", r"decoder.mid_block.attentions.0.\1"),
    (r"decoder\.head\.0\.(.*)", r"decoder.norm_out.\1"),
    (r"decoder\.head\.2\.(.*)", r"decoder.conv_out.\1"),
)


def renamed(network: str, names: Iterable[str]) -> dict[str, str | None]:
    """Each name with diffusers' for it, None for those that are not known."""
    given = list(names)
    if MARKS[network][1] in given:
        return {name: name for name in given}
    if network == "vae":
        return _each(given, _vae_rename(given))
    return _each(given, lambda name: _first_match(TEXT_ENCODER if network == "text_encoder" else TRANSFORMER, name))


def _each(names: Iterable[str], rename: Callable[[str], str | None]) -> dict[str, str | None]:
    return {name: rename(name) for name in names}


def _first_match(rules: Rules, name: str) -> str | None:
    for pattern, replacement in rules:
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    return None


def _vae_rename(names: Iterable[str]) -> Callable[[str], str | None]:
    """Wan numbers a decoder's residual blocks and upsamplers in one row, diffusers by level and kind."""
    matches = (re.match(r"decoder\.upsamples\.(\d+)\.resample\.", name) for name in names)
    ends = sorted({int(match[1]) for match in matches if match})  # a level ends with its upsampler

    def rename(name: str) -> str | None:
        if match := re.fullmatch(r"decoder\.middle\.([02])\.(.*)", name):
            place, rest = f"decoder.mid_block.resnets.{int(match[1]) // 2}", match[2]
        elif match := re.fullmatch(r"decoder\.upsamples\.(\d+)\.(.*)", name):
            index, rest = int(match[1]), match[2]
            level = bisect(ends, index - 1)
            if index in ends:
                return f"decoder.up_blocks.{level}.upsamplers.0.{rest}"
            place = f"decoder.up_blocks.{level}.resnets.{index - (ends[level - 1] + 1 if level else 0)}"
        else:
            return _first_match(VAE, name)
        inner = _first_match(RESIDUAL, rest)
        return None if inner is None else f"{place}.{inner}"

    return rename


SINGLE_FILES = SingleFiles(
    model="Wan2.1",
    configs=CheckpointConfigs("Wan2.1-T2V-1.3B", published.INDEX, published.CONFIGS, published.SCHEDULER, {}),
    repository="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    examples={
        "text_encoder": "umt5_xxl_fp16.safetensors",
        "transformer": "wan2.1_t2v_1.3B_fp16.safetensors",
        "vae": "wan_2.1_vae.safetensors",
    },
    marks=MARKS,
    others={
        "img_emb.": "an image-to-video model",
        "vace_blocks.": "a VACE model",
        "face_adapter.": "a Wan-Animate model",
        "control_adapter.": "a camera control model",
        "decoder.upsamples.0.upsamples.": "the VAE of Wan2.2-TI2V-5B",
    },
    no_weights=("spiece_model",),  # the tokenizer, which ComfyUI stores as a tensor
    renamed=renamed,
)
