"""The Wan2.1 text-to-video family: which graphs a checkpoint becomes, and what the manifest says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from t2v_rt.engines.bundle.manifest import BLOCKS, Defaults, TileSpec
from t2v_rt.engines.bundle.model import DecodeSchedule, LatentSpec, ModelSpec, TextSpec
from t2v_rt.engines.bundle.profiles import Accumulation, VideoProfile
from t2v_rt.engines.specs import StateSpec
from t2v_rt.errors import CheckpointError
from t2v_rt.export import tokenizer
from t2v_rt.export.config import INDEX, CheckpointConfigs
from t2v_rt.export.family import SHARD_BYTES, TEXT_ENCODER, Ranges
from t2v_rt.export.graph import GraphOptions, GraphWriter
from t2v_rt.export.precision import Precision
from t2v_rt.export.single_files import SingleFiles
from t2v_rt.export.tensors import CheckpointWeights
from t2v_rt.export.text_encoders.t5 import EMBEDDING, TextEncoderConfig, embedding_name, write_blocks
from t2v_rt.export.wan.contexts import text_encoder_context, transformer_context, vae_context
from t2v_rt.export.wan.names import SINGLE_FILES
from t2v_rt.export.wan.profiles import component_options, component_ranges, with_grids
from t2v_rt.export.wan.transformer import TEXT_LENGTH, TransformerConfig, write_transformer
from t2v_rt.export.wan.vae import VaeConfig, VaeDecoderGraph

NETWORKS: Mapping[str, str] = {TEXT_ENCODER: "text_encoder", "transformer": "transformer", "vae_decoder": "vae"}
DEFAULTS = Defaults(
    height=480,
    width=832,
    num_frames=81,
    fps=16.0,
    num_inference_steps=50,
    guidance_scale=5.0,
    negative_prompt="",
)
VAE_ROLES = ("head_first", "head_next", "tail")
# the other halves of the VAE and of the model that the text encoder was trained in, and the second name of its table
UNUSED: Mapping[str, tuple[str, ...]] = {
    "text_encoder": ("decoder.", "lm_head.", *EMBEDDING),
    "vae": ("encoder.", "quant_conv.", "conv1."),
}


@dataclass(frozen=True)
class WanConfigs:
    """The three networks' configs, checked against each other.

    Args:
        text_encoder: config.
        transformer: config.
        vae: config.
        shard_bytes: what an engine of the text encoder may take of a card.
    """

    text_encoder: TextEncoderConfig
    transformer: TransformerConfig
    vae: VaeConfig
    shard_bytes: int = SHARD_BYTES

    def __post_init__(self) -> None:
        pairs = (
            ("text_dim", self.transformer.text_dim, "the text encoder's d_model", self.text_encoder.dim),
            ("in_channels", self.transformer.in_channels, "the VAE's z_dim", self.vae.z_dim),
            ("out_channels", self.transformer.out_channels, "the VAE's z_dim", self.vae.z_dim),
        )
        for key, found, other, expected in pairs:
            if found != expected:
                raise CheckpointError(f"transformer/config.json: {key} is {found} but {other} is {expected}")
        if self.vae.out_channels != 3 or self.transformer.patch[0] != 1:
            raise CheckpointError(
                f"a VAE of {self.vae.out_channels} colour channels with patches of {self.transformer.patch[0]} latent "
                "frames is not supported; expected 3 and 1"
            )

    @property
    def text_blocks(self) -> dict[str, range]:
        """Role -> blocks of each engine of the text encoder; the same at any precision."""
        groups = self.text_encoder.groups(self.shard_bytes, TEXT_LENGTH)
        return {f"{BLOCKS}{i}": blocks for i, blocks in enumerate(groups)}

    def model(self) -> ModelSpec:
        vae, denoiser, text = self.vae, self.transformer, self.text_encoder
        one = np.float32(1.0)
        frames, rows, columns = denoiser.patch
        return ModelSpec(
            family="wan",
            latents=LatentSpec(
                channels=vae.z_dim,
                scale=tuple(float(one / np.float32(std)) for std in vae.latents_std),  # as the reference rounds it
                shift=vae.latents_mean,
                spatial_factor=vae.spatial_factor,
                most=(denoiser.rope_max * frames, denoiser.rope_max * rows, denoiser.rope_max * columns),
            ),
            decode=DecodeSchedule(first=((1, 1),), next=(1, vae.temporal_factor)),
            text=TextSpec(TEXT_LENGTH, denoiser.text_dim, text.buckets, text.max_distance),
            patch=denoiser.patch,
            heads=denoiser.heads,
            hidden_dim=denoiser.dim,
        )

    def units(self, component: str) -> tuple[tuple[str, ...], ...]:
        if component == TEXT_ENCODER:  # whose engines share no weights, and are loaded one at a time
            return tuple((role,) for role in self.text_blocks)
        return (VAE_ROLES,) if component == "vae_decoder" else (("model",),)

    def tiles(self, component: str, profiles: Sequence[VideoProfile] = ()) -> TileSpec | None:
        if component != "vae_decoder":
            return None
        return with_grids(self.vae.tiles, self.model(), profiles) if profiles else self.vae.tiles

    def ranges(self, profiles: Sequence[VideoProfile]) -> dict[str, dict[str, tuple[Ranges, ...]]]:
        model = self.model()
        tiles = with_grids(self.vae.tiles, model, profiles)
        return component_ranges(model, profiles, tiles, tuple(self.text_blocks))

    def graph_options(
        self,
        ranges: Mapping[str, Mapping[str, Sequence[Ranges]]],
        float32_matmul: bool,
        accumulation: Accumulation = "fp32",
    ) -> dict[str, dict[str, GraphOptions]]:
        return component_options(self.model(), ranges, self.transformer.ffn_dim, float32_matmul, accumulation)

    def plan_precision(self, component: str, wanted: Precision, turing: bool) -> Precision:
        """Half precision suits the text encoder, which overflows in fp16 unless parts of it are kept in float32, as
        bf16; the VAE decoder needs the finer steps of fp16, and its caches cross the engines' boundary, which NumPy has
        no bfloat16 for."""
        if component == "vae_decoder":
            return "fp16"
        return "bf16" if component == TEXT_ENCODER and not turing else wanted

    def write(self, component: str, role: str, g: GraphWriter) -> Sequence[StateSpec]:
        if component == TEXT_ENCODER:
            write_blocks(g, self.text_encoder, self.text_blocks[role])
            return ()
        if component == "transformer":
            write_transformer(g, self.transformer)
            return ()
        decoder = VaeDecoderGraph(g, self.vae, first=role == "head_first")
        return decoder.write_tail() if role == "tail" else decoder.write_head()

    def context(self, component: str, role: str, ranges: Ranges, options: GraphOptions | None) -> int:
        if component == TEXT_ENCODER:
            return text_encoder_context(self.text_encoder, ranges)
        if component == "transformer":
            return transformer_context(self.transformer, ranges, 1 if options is None else options.slices)
        return vae_context(self.vae, role, ranges)

    def embedding(self, weights: CheckpointWeights) -> tuple[str, tuple[int, int]]:
        return embedding_name(weights), (self.text_encoder.vocab, self.text_encoder.dim)

    @property
    def end_token(self) -> int:
        return self.text_encoder.end_token


class Wan:
    """The family."""

    networks: Mapping[str, str] = NETWORKS
    tokenizers: tuple[tuple[str, ...], ...] = (("tokenizer.json",),)
    defaults: Defaults = DEFAULTS
    unused: Mapping[str, tuple[str, ...]] = UNUSED
    single_files: SingleFiles | None = SINGLE_FILES

    def read_configs(self, configs: CheckpointConfigs, shard_bytes: int = SHARD_BYTES) -> WanConfigs:
        index, networks = configs.index, configs.networks
        if index.get("expand_timesteps") or any(index.get("transformer_2") or ()):
            raise CheckpointError(
                f"{configs.origin}: {INDEX} is that of a Wan2.2 model; supported: Wan2.1 text-to-video"
            )
        return WanConfigs(
            TextEncoderConfig.from_config(networks["text_encoder"]),
            TransformerConfig.from_config(networks["transformer"]),
            VaeConfig.from_config(networks["vae"]),
            shard_bytes,
        )

    def read_tokenizer(self, files: Sequence[Path]) -> str:
        return tokenizer.read_tokenizer(files[0])


FAMILY = Wan()
