"""Random tiny Wan checkpoints in diffusers layout, made without torch; diffusers' own pipeline on one."""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from t2v_rt.benchmarks.wan_tensors import CONFIGS, INDEX, TENSORS
from t2v_rt.export.wan import published as wan_published

ENGLISH = ("a the red green blue ball square cat dog runs jumps over on under lazy quick brown fox").split()
WORDS = [*ENGLISH, *"红绿蓝球猫狗在上跳"]


@dataclass(frozen=True)
class TinyWan:
    """A configuration of a tiny checkpoint; the fields are those that change a graph's structure."""

    name: str
    layers: int = 2
    heads: int = 2
    head_dim: int = 16
    ffn_dim: int = 48
    freq_dim: int = 32
    cross_attn_norm: bool = True
    z_dim: int = 4
    vae_dim: int = 8
    dim_mult: tuple[int, ...] = (1, 2, 2, 2)
    res_blocks: int = 1
    down: tuple[bool, ...] = (False, True, True)
    text_dim: int = 24
    text_layers: int = 2
    text_heads: int = 2
    text_head_dim: int = 8
    seed: int = 0

    def transformer(self) -> dict[str, Any]:
        return {
            "patch_size": [1, 2, 2],
            "num_attention_heads": self.heads,
            "attention_head_dim": self.head_dim,
            "in_channels": self.z_dim,
            "out_channels": self.z_dim,
            "text_dim": self.text_dim,
            "freq_dim": self.freq_dim,
            "ffn_dim": self.ffn_dim,
            "num_layers": self.layers,
            "cross_attn_norm": self.cross_attn_norm,
        }

    def vae(self) -> dict[str, Any]:
        return {
            "base_dim": self.vae_dim,
            "z_dim": self.z_dim,
            "dim_mult": list(self.dim_mult),
            "num_res_blocks": self.res_blocks,
            "temperal_downsample": list(self.down),
            "latents_mean": [0.1 * i - 0.2 for i in range(self.z_dim)],
            "latents_std": [1.0 + 0.25 * i for i in range(self.z_dim)],
        }

    def text_encoder(self) -> dict[str, Any]:
        return {
            "vocab_size": len(WORDS) + 3,
            "d_model": self.text_dim,
            "d_kv": self.text_head_dim,
            "d_ff": 40,
            "num_layers": self.text_layers,
            "num_heads": self.text_heads,
        }

    def configs(self) -> dict[str, dict[str, Any]]:
        """The `config.json` of each network."""
        own = {"transformer": self.transformer(), "vae": self.vae(), "text_encoder": self.text_encoder()}
        return {network: {**CONFIGS[network], **config} for network, config in own.items()}


TINY = (
    TinyWan("narrow"),
    TinyWan(
        "one-head", layers=1, heads=1, head_dim=24, cross_attn_norm=False, z_dim=16, vae_dim=4, text_heads=3, seed=1
    ),
    TinyWan(
        "deep", layers=3, heads=3, head_dim=12, res_blocks=2, dim_mult=(1, 2, 4, 4), text_dim=40, text_layers=3, seed=2
    ),
)


def write_tokenizer(folder: Path) -> None:
    """A word-level tokenizer with UMT5's special tokens: `</s>` closes every prompt."""
    vocab = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(pattern=Regex(r"\p{Han}"), behavior="isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, **special}
    write_json(folder / "tokenizer_config.json", config)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def make_checkpoint(config: TinyWan, folder: Path) -> Path:
    """Writes a random checkpoint; its weights are spread enough for prompts to move the video."""
    rng = np.random.default_rng(config.seed)
    configs = config.configs()
    for network, (stem, tensors) in TENSORS.items():
        (folder / network).mkdir(parents=True)
        write_json(folder / network / "config.json", configs[network])
        weights = {name: random_weights(name, shape, rng) for name, shape in tensors(configs[network])}
        save_file(weights, folder / network / f"{stem}.safetensors", {"format": "pt"})
    write_json(folder / "model_index.json", INDEX)
    (folder / "scheduler").mkdir()
    write_json(folder / "scheduler" / "scheduler_config.json", wan_published.SCHEDULER)
    write_tokenizer(folder / "tokenizer")
    generation = {"height": 32, "width": 48, "num_frames": 5, "fps": 8, "num_inference_steps": 4}
    write_json(folder / "generation_config.json", generation)
    return folder


def random_weights(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.float32]:
    """Random values of a scale that keeps activations near one through the depth, and lets the prompt show.

    Of 512 text positions all but a few are padding: only sharp attention (large query and key norms) tells a prompt
    from another.
    """
    noise = rng.standard_normal(shape, np.float32)
    if "attn2.norm" in name:
        return np.float32(2.5) + np.float32(0.1) * noise
    if len(shape) >= 2 and "scale_shift_table" not in name:
        is_table = "shared" in name or "relative_attention_bias" in name
        gain = 1.0 if is_table else math.prod(shape[1:]) ** -0.5
        gain *= 3.0 if "attn2.to_out" in name else 0.3 if name.startswith("proj_out") else 1.0
        return noise * np.float32(gain)
    if "norm" in name or "gamma" in name:
        return np.float32(1.0) + np.float32(0.1) * noise
    return np.float32(0.2) * noise


def load_reference(folder: Path) -> Any:
    """Diffusers' pipeline on a checkpoint, in float32, without its progress bar."""
    with warnings.catch_warnings():  # diffusers' and transformers' own, on import and load
        warnings.simplefilter("ignore")
        import torch
        from diffusers import WanPipeline

        logging.getLogger("diffusers").setLevel(logging.ERROR)
        pipe = WanPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe
