"""The Wan2.1 text-to-video family: which graphs a checkpoint becomes, and what the manifest says of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from t2v_rt.engines.bundle.manifest import BLOCKS, ComponentSpec, Defaults, EmbeddingSpec, GraphSpec
from t2v_rt.engines.bundle.model import DecodeSchedule, LatentSpec, ModelSpec, TextSpec
from t2v_rt.engines.specs import StateSpec
from t2v_rt.errors import CheckpointError
from t2v_rt.export import tokenizer
from t2v_rt.export.checkpoint import INDEX, Checkpoint, CheckpointConfigs
from t2v_rt.export.graph import Form, GraphWriter, Precision
from t2v_rt.export.text_encoders.t5 import EMBEDDING, TextEncoderConfig, copy_embedding, embedding_name, write_blocks
from t2v_rt.export.wan.transformer import TransformerConfig, write_transformer
from t2v_rt.export.wan.vae import VaeConfig, VaeDecoderGraph
from t2v_rt.export.weight_file import WeightFile
from t2v_rt.numbers import as_integer, as_number

logger = logging.getLogger(__name__)
PIPELINE = "WanPipeline"
TEXT_LENGTH = 512  # the pipeline's max_sequence_length; the denoiser was trained on text padded to it
DEFAULTS = Defaults(
    height=480,
    width=832,
    num_frames=81,
    fps=16.0,
    num_inference_steps=50,
    guidance_scale=5.0,
    negative_prompt="",
)
COMPONENTS = ("text_encoder", "transformer", "vae_decoder")
VAE_ROLES = ("head_first", "head_next", "tail")
# network -> beginnings of the names of tensors that making videos does without: the other halves of the VAE and of the
# model that the text encoder was trained in, and the second name of its table
UNUSED: Mapping[str, tuple[str, ...]] = {
    "text_encoder": ("decoder.", "lm_head.", *EMBEDDING),
    "vae": ("encoder.", "quant_conv.", "conv1."),
}
NAMED = 3  # of unused tensors
SHARD_BYTES = 3_000_000_000  # of a card, for one group of the text encoder's blocks: beside a desktop it fits on 4 GB


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

    def roles(self, component: str) -> tuple[str, ...]:
        """The roles of a component's engines, in the order they run."""
        if component == "text_encoder":
            return tuple(self.text_blocks)
        return ("model",) if component == "transformer" else VAE_ROLES

    def parts(self, component: str) -> tuple[tuple[str, ...], ...]:
        """Its roles in groups that share weights, and so are exported together."""
        roles = self.roles(component)
        return tuple((role,) for role in roles) if component == "text_encoder" else (roles,)


def read_configs(configs: CheckpointConfigs, shard_bytes: int = SHARD_BYTES) -> WanConfigs:
    """Checks the configs; raises CheckpointError for an architecture this family does not cover."""
    pipeline, index = configs.index.get("_class_name"), configs.index
    if pipeline != PIPELINE:
        raise CheckpointError(f"{configs.origin}: {INDEX} names the pipeline {pipeline!r}; supported: {PIPELINE}")
    if index.get("expand_timesteps") or any(index.get("transformer_2") or ()):
        raise CheckpointError(f"{configs.origin}: {INDEX} is that of a Wan2.2 model; supported: Wan2.1 text-to-video")
    return WanConfigs(
        TextEncoderConfig.from_config(configs.networks["text_encoder"]),
        TransformerConfig.from_config(configs.networks["transformer"]),
        VaeConfig.from_config(configs.networks["vae"]),
        shard_bytes,
    )


def model_spec(configs: WanConfigs) -> ModelSpec:
    """The model's constants for the manifest."""
    vae, denoiser, text = configs.vae, configs.transformer, configs.text_encoder
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


def read_defaults(generation: Mapping[str, Any]) -> Defaults:
    """Request defaults: the checkpoint's `generation_config.json` over the family's own.

    Raises:
        CheckpointError: a value of the wrong kind.
    """
    values: dict[str, Any] = {}
    for key, family_value in vars(DEFAULTS).items():
        given, kind = generation.get(key, family_value), type(family_value)
        readers = {int: as_integer, float: as_number}
        value: Any = readers[kind](given) if kind in readers else given
        if not isinstance(value, kind) or (not isinstance(value, str) and value <= 0):
            raise CheckpointError(f"generation_config.json: {key} is {given!r}; expected a positive {kind.__name__}")
        values[key] = value
    return Defaults(**values)


def export_component(
    name: str,
    checkpoint: Checkpoint,
    configs: WanConfigs,
    folder: Path,
    precision: Precision,
    forms: Mapping[str, Form] | None = None,
    roles: Sequence[str] | None = None,
    store_type: type[WeightFile] = WeightFile,
) -> ComponentSpec:
    """Writes graphs and weights of one component.

    Args:
        name: one of `COMPONENTS`.
        checkpoint: the opened checkpoint.
        configs: from `read_configs`.
        folder: of the bundle; a folder of the component's name is made in it where there is none.
        precision: of matmul and convolution operands.
        forms: how the backend wants the graph of each role; None for ONNX Runtime's.
        roles: of the graphs to write; None for all.
        store_type: `WeightSizes` leaves the weights out.

    Returns:
        What the manifest says of it, but for the table of the text encoder (see `export_embedding`).

    Raises:
        CheckpointError: a tensor is missing or has the wrong shape.
    """
    weights = checkpoint.weights[_network(name)]
    place = folder / name
    place.mkdir(exist_ok=True)
    graphs: dict[str, GraphSpec] = {}

    def writer(role: str, store: WeightFile) -> GraphWriter:
        label = name if role == "model" else f"{name}.{role}"
        return GraphWriter(label, weights, store, precision, Form() if forms is None else forms[role])

    if name == "text_encoder":  # whose engines share no weights, and are loaded one at a time: a file for each
        for role in roles or configs.roles(name):
            with store_type(place / f"{role}.data") as store:
                g = writer(role, store)
                write_blocks(g, configs.text_encoder, configs.text_blocks[role])
                graphs[role] = _saved(g, store, role)
        return ComponentSpec(graphs, precision, sum(graph.weights_bytes for graph in graphs.values()))
    with store_type(place / "weights.data") as store:
        for role in roles or configs.roles(name):
            g = writer(role, store)
            states: Sequence[StateSpec] = ()
            if name == "transformer":
                write_transformer(g, configs.transformer)
            else:
                decoder = VaeDecoderGraph(g, configs.vae, first=role == "head_first")
                states = decoder.write_tail() if role == "tail" else decoder.write_head()
            graphs[role] = _saved(g, store, role, states)
    tiles = configs.vae.tiles if name == "vae_decoder" else None
    return ComponentSpec(graphs, precision, store.nbytes, tiles)


def check_tokenizer(checkpoint: Checkpoint, configs: WanConfigs) -> None:
    """Holds the tokenizer against the text encoder; raises CheckpointError where they do not belong together."""
    config, weights = configs.text_encoder, checkpoint.weights["text_encoder"]
    weights.check(embedding_name(weights), (config.vocab, config.dim))
    tokenizer.check_tokenizer(checkpoint.tokenizer, config.vocab, config.end_token)


def warn_of_unused(checkpoint: Checkpoint, components: Sequence[str]) -> None:
    """Names, once, the tensors that were not asked for while graphs of these components were written or outlined."""
    for component in components:
        network = _network(component)
        weights = checkpoint.weights[network]
        unused = [name for name in weights.unasked() if not name.startswith(UNUSED.get(network, ()))]
        if unused:
            listed = ", ".join(repr(name) for name in unused[:NAMED]) + (" …" if len(unused) > NAMED else "")
            logger.warning("%s: %d tensors are not used: %s", weights.place, len(unused), listed)


def export_embedding(checkpoint: Checkpoint, configs: WanConfigs, folder: Path) -> EmbeddingSpec:
    """Writes the table of token embeddings into the text encoder's folder; raises as `export_component`."""
    (folder / "text_encoder").mkdir(exist_ok=True)
    path = "text_encoder/embedding.data"
    return copy_embedding(checkpoint.weights["text_encoder"], configs.text_encoder, folder, path)


def _network(component: str) -> str:
    return "vae" if component == "vae_decoder" else component


def _saved(g: GraphWriter, store: WeightFile, role: str, states: Sequence[StateSpec] = ()) -> GraphSpec:
    """Saves a graph beside its weights; its states are declared apart from its inputs and outputs."""
    path = store.path.with_name(f"{role}.onnx")
    g.save(path)
    hidden = {name for state in states for name in (state.input, state.output)}
    return GraphSpec(
        f"{path.parent.name}/{path.name}",
        tuple(spec for spec in g.inputs if spec.name not in hidden),
        tuple(spec for spec in g.outputs if spec.name not in hidden),
        tuple(states),
        weights_bytes=g.weights_bytes,
    )
