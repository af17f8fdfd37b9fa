"""Random tiny Wan checkpoints in diffusers layout, made with diffusers and transformers themselves."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

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

    def text_encoder(self) -> UMT5Config:
        return UMT5Config(
            vocab_size=len(WORDS) + 3,
            d_model=self.text_dim,
            d_kv=self.text_head_dim,
            d_ff=40,
            num_layers=self.text_layers,
            num_heads=self.text_heads,
            relative_attention_num_buckets=32,
            relative_attention_max_distance=128,
            feed_forward_proj="gated-gelu",
        )


TINY = (
    TinyWan("narrow"),
    TinyWan(
        "one-head", layers=1, heads=1, head_dim=24, cross_attn_norm=False, z_dim=16, vae_dim=4, text_heads=3, seed=1
    ),
    TinyWan(
        "deep", layers=3, heads=3, head_dim=12, res_blocks=2, dim_mult=(1, 2, 4, 4), text_dim=40, text_layers=3, seed=2
    ),
)


def tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer with UMT5's special tokens: `</s>` closes every prompt."""
    vocab = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    raw = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    raw.normalizer = normalizers.Lowercase()
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(pattern=_ideograph(), behavior="isolated")]
    )
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def _ideograph() -> Any:
    from tokenizers import Regex

    return Regex(r"\p{Han}")


def make_checkpoint(config: TinyWan, folder: Path) -> Path:
    """Writes a random checkpoint; its weights are spread enough for prompts to move the video."""
    torch.manual_seed(config.seed)
    parts = {
        "transformer": WanTransformer3DModel(**config.transformer()),
        "vae": AutoencoderKLWan(**config.vae()),
        "text_encoder": UMT5EncoderModel(config.text_encoder()),
    }
    with torch.no_grad():
        for part in parts.values():
            for name, parameter in part.named_parameters():
                _fill(name, parameter)
    pipe = WanPipeline(
        tokenizer=tokenizer(),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        **parts,
    )
    pipe.save_pretrained(folder, safe_serialization=True)
    generation = {"height": 32, "width": 48, "num_frames": 5, "fps": 8, "num_inference_steps": 4}
    (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    return folder


def _fill(name: str, parameter: torch.nn.Parameter) -> None:
    """Random values of a scale that keeps activations near one through the depth, and lets the prompt show.

    Of 512 text positions all but a few are padding: only sharp attention (large query and key norms) tells a prompt
    from another.
    """
    noise = torch.randn_like(parameter)
    if "attn2.norm" in name:
        parameter.copy_(2.5 + 0.1 * noise)
    elif parameter.ndim >= 2 and "scale_shift_table" not in name:
        fan_in = parameter[0].numel()
        gain = (
            1.0 if any(key in name for key in ("shared", "embed_tokens", "relative_attention_bias")) else fan_in**-0.5
        )
        gain *= 3.0 if "attn2.to_out" in name else 0.3 if name.startswith("proj_out") else 1.0
        parameter.copy_(noise * gain)
    elif "norm" in name or "gamma" in name:
        parameter.copy_(1.0 + 0.1 * noise)
    else:
        parameter.copy_(0.2 * noise)


def load_reference(folder: Path) -> WanPipeline:
    """Diffusers' pipeline on a checkpoint, in float32, without its progress bar."""
    pipe = WanPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe
