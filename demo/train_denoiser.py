"""Training of the demo's denoiser together with its text encoder: flow matching on encoded clips."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import clips
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from state import load_state, save_state
from torch import Tensor, nn
from train_vae import CHANNELS
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

TEXT_LENGTH = 512  # positions the denoiser attends to, nearly all of them padding
TEXT_DIM = 96
TRANSFORMER: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 5,
    "attention_head_dim": 32,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "text_dim": TEXT_DIM,
    "freq_dim": 64,
    "ffn_dim": 640,
    "num_layers": 6,
    "rope_max_seq_len": 64,
}
BATCH, WARM_UP = 64, 200
MATRIX_RATE, RATE = 2e-3, 1e-3  # of the denoiser blocks' matrices (Muon), of everything else (AdamW)
TEXT_STEPS = 150  # at the start only the text encoder is trained, on naming what a prompt says
TEXT_WEIGHT = 0.02
DROPPED = 0.12  # share of prompts replaced by the empty one, for classifier-free guidance
FLOW_SHIFT = 3.0
HIDDEN = -1e4  # attention bias of a position that is not there
EMA = 0.9995
SAVE_SECONDS = 120.0
ATTRIBUTES = {
    "colour": list(clips.COLOURS),
    "shape": list(clips.SHAPES),
    "motion": list(clips.MOTIONS),
    "background": list(clips.COLOURS),
}


class BiasedCrossAttention:
    """Cross attention with a bias per position, so that one position can stand for all the padding.

    The 512 - L padded positions are alike: one of them, its score raised by log(512 - L), weighs as much. Training
    on L + 1 positions instead of 512 is many times cheaper and gives the same result.
    """

    bias: Tensor

    def __call__(self, attn: Any, x: Tensor, context: Tensor, *_: object, **__: object) -> Tensor:
        query, key, value = attn.norm_q(attn.to_q(x)), attn.norm_k(attn.to_k(context)), attn.to_v(context)
        q, k, v = (t.unflatten(2, (attn.heads, -1)).transpose(1, 2) for t in (query, key, value))
        attended = F.scaled_dot_product_attention(q, k, v.to(q.dtype), attn_mask=self.bias.to(q.dtype))
        result: Tensor = attn.to_out[0](attended.transpose(1, 2).flatten(2))
        return result


class AttributeHeads(nn.Module):
    """Names colour, shape, motion and background from a prompt's embeddings; only used in training."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(TEXT_DIM, len(kinds)) for name, kinds in ATTRIBUTES.items()})
        self.queries = nn.Parameter(torch.randn(len(ATTRIBUTES), TEXT_DIM) * 0.1)

    def forward(self, embeds: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Embeddings (B, L, D) and mask (B, L) -> logits (B, kinds) per attribute."""
        result = {}
        for query, (name, head) in zip(self.queries, self.heads.items(), strict=True):
            weight = (embeds @ query / TEXT_DIM**0.5).masked_fill(~mask, -1e9).softmax(-1)
            result[name] = head((weight[..., None] * embeds).sum(1))
        return result


@dataclass
class Networks:
    """What is trained."""

    text_encoder: UMT5EncoderModel
    transformer: WanTransformer3DModel
    heads: AttributeHeads
    cross: BiasedCrossAttention

    def modules(self) -> nn.ModuleList:
        return nn.ModuleList([self.text_encoder, self.transformer, self.heads])

    @classmethod
    def make(cls, vocabulary: int) -> Networks:
        config = UMT5Config(
            vocab_size=vocabulary,
            d_model=TEXT_DIM,
            d_kv=24,
            d_ff=192,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
        transformer = WanTransformer3DModel(**TRANSFORMER)
        result = cls(UMT5EncoderModel(config), transformer, AttributeHeads(), BiasedCrossAttention())
        for block in result.transformer.blocks:
            block.attn2.set_processor(result.cross)
        return result

    def text(self, sequences: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids -> embeddings (B, L + 1, D) with a row of padding, mask (B, L), bias (B, 1, 1, L + 1)."""
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        longest = int(lengths.max())
        ids = torch.zeros(len(sequences), longest, dtype=torch.long)
        for row, sequence in zip(ids, sequences, strict=True):
            row[: len(sequence)] = torch.tensor(sequence)
        mask = torch.arange(longest) < lengths[:, None]
        embeds = self.text_encoder(ids, attention_mask=mask.long()).last_hidden_state * mask[..., None]
        embeds = torch.cat([embeds, torch.zeros_like(embeds[:, :1])], 1)
        bias = torch.where(torch.arange(longest + 1) < lengths[:, None], 0.0, HIDDEN)
        bias[torch.arange(len(ids)), lengths] = torch.log(float(TEXT_LENGTH) - lengths)
        return embeds, mask, bias[:, None, None]


class Prompts:
    """Every phrasing of every training scene, tokenized."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.scenes = clips.scenes(held=False)
        self.empty: list[int] = tokenizer("").input_ids
        self.ids = [
            [tokenizer(text).input_ids for language in ("en", "zh") for text in clips.prompts(scene, language)]
            for scene in self.scenes
        ]
        self.labels = {
            name: torch.tensor([kinds.index(getattr(scene, name)) for scene in self.scenes])
            for name, kinds in ATTRIBUTES.items()
        }

    def draw(self, chosen: Tensor, dropped: Any, rng: np.random.Generator) -> list[list[int]]:
        """A random phrasing of each chosen scene, or the empty prompt where dropped."""
        return [
            self.empty if drop else self.ids[scene][rng.integers(len(self.ids[scene]))]
            for scene, drop in zip(chosen.tolist(), dropped, strict=True)
        ]


def step_loss(
    networks: Networks, prompts: Prompts, latents: Tensor, chosen: Tensor, rng: np.random.Generator, step: int
) -> tuple[Tensor, float]:
    """The loss of one batch, and its flow-matching part (arXiv:2210.02747: the velocity noise - x0)."""
    dropped = rng.random(len(chosen)) < DROPPED
    with torch.autocast("cpu", torch.bfloat16):
        embeds, mask, bias = networks.text(prompts.draw(chosen, dropped, rng))
        logits = networks.heads(embeds[:, :-1].float(), mask)
    kept = torch.from_numpy(~dropped)
    naming = torch.stack(
        [F.cross_entropy(logits[name].float()[kept], label[chosen][kept]) for name, label in prompts.labels.items()]
    ).sum()
    if step < TEXT_STEPS:
        return naming, math.nan
    u = torch.sigmoid(torch.randn(len(chosen))) if rng.random() < 0.5 else torch.rand(len(chosen))
    sigma = FLOW_SHIFT * u / (1 + (FLOW_SHIFT - 1) * u)
    noise, share = torch.randn_like(latents), sigma[:, None, None, None, None]
    networks.cross.bias = bias
    with torch.autocast("cpu", torch.bfloat16):
        noisy = (1 - share) * latents + share * noise
        velocity = networks.transformer(noisy, sigma * 1000, embeds, return_dict=False)[0]
    flow = F.mse_loss(velocity.float(), noise - latents)
    return flow + TEXT_WEIGHT * naming, flow.item()


class Training:
    """The denoiser's training and all of its state.

    Args:
        tokenizer: of the checkpoint.
        file: where the state is kept; an earlier state is continued.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, file: Path) -> None:
        self.networks, self.prompts, self.file = Networks.make(len(tokenizer)), Prompts(tokenizer), file
        self.trained = self.networks.modules()
        self.average = copy.deepcopy(self.trained)
        # Muon learns the matrices of the denoiser's blocks in fewer steps; AdamW does everything else
        matrices = [p for p in self.networks.transformer.blocks.parameters() if p.ndim == 2]
        chosen = {id(p) for p in matrices}
        others = [p for p in self.trained.parameters() if id(p) not in chosen]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=MATRIX_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=RATE, betas=(0.9, 0.98), weight_decay=0.01),
        ]
        self.step, self.done = 0, 0.0
        state = load_state(file)
        if state is not None:
            self.trained.load_state_dict(state["model"])
            self.average.load_state_dict(state["average"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            self.step, self.done = state["step"], state["done"]

    def save(self) -> None:
        """Writes the state, from which a later training continues."""
        save_state(
            self.file,
            model=self.trained.state_dict(),
            average=self.average.state_dict(),
            optimizers=[optimizer.state_dict() for optimizer in self.optimizers],
            step=self.step,
            done=self.done,
        )

    def advance(self, latents: Tensor, chosen: Tensor, rng: np.random.Generator, share: float) -> float:
        """One step on a batch, `share` of the training being done; returns the flow-matching loss."""
        fall = 0.02 + 0.49 * (1 + math.cos(math.pi * share))
        for optimizer, rate in zip(self.optimizers, (MATRIX_RATE, RATE), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (self.step + 1) / WARM_UP) * fall
        loss, flow = step_loss(self.networks, self.prompts, latents, chosen, rng, self.step)
        self.trained.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.trained.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        keep = min(EMA, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for slow, fast in zip(self.average.parameters(), self.trained.parameters(), strict=True):
                slow.lerp_(fast, 1 - keep)
        return flow


def train_denoiser(
    work: Path, seconds: float, tokenizer: PreTrainedTokenizerFast, data: dict[str, Tensor]
) -> tuple[UMT5EncoderModel, WanTransformer3DModel]:
    """Trains for `seconds`; continues from `work/denoiser.pt`.

    Args:
        work: folder of the training's state.
        seconds: of training, over which the learning rate falls.
        tokenizer: of the checkpoint.
        data: `latents` (N, C, f, h, w) of unit variance and `scenes` (N,), indices into the training scenes.

    Returns:
        Text encoder and denoiser, their weights averaged over the last steps.
    """
    # the fused attention's backward pass takes half of the time of a step on the CPU; the plain one is far quicker
    torch.backends.cuda.enable_flash_sdp(False)
    training = Training(tokenizer, work / "denoiser.pt")
    rng, losses = np.random.default_rng(training.step), [math.nan]
    last = saved = time.monotonic()
    while training.done < seconds:
        picked = torch.from_numpy(rng.integers(0, len(data["latents"]), BATCH))
        flow = training.advance(data["latents"][picked], data["scenes"][picked], rng, training.done / seconds)
        losses = [*losses[-199:], flow]
        now = time.monotonic()
        training.done, last = training.done + now - last, now
        if training.step % 100 == 0:
            print(f"denoiser {training.step} {training.done:.0f}s loss {np.nanmean(losses):.4f}", flush=True)
        if now - saved > SAVE_SECONDS or training.done >= seconds:
            saved = now
            training.save()
    return training.average[0], training.average[1]
