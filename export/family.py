"""The border of model families on the exporter's side: what each declares and does, and who has them.

A family is a module under `t2v_rt/export/<family>/` with an object `FAMILY`. Everything else of the exporter and of a
build reaches it through the registry below. What a family does at run time is behind `t2v_rt.runtime.families`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from t2v_rt.engines.bundle.manifest import Defaults, TileSpec
from t2v_rt.engines.bundle.model import ModelSpec
from t2v_rt.engines.bundle.profiles import Accumulation, Range, VideoProfile
from t2v_rt.engines.specs import StateSpec
from t2v_rt.errors import CheckpointError
from t2v_rt.export.config import INDEX, CheckpointConfigs
from t2v_rt.export.precision import Precision
from t2v_rt.export.single_files import SingleFiles
from t2v_rt.export.tensors import CheckpointWeights

if TYPE_CHECKING:  # it imports onnx, which looking at a checkpoint needs not
    from t2v_rt.export.graph import GraphOptions, GraphWriter

SHARD_BYTES = 3_000_000_000  # of a card, for one engine of a text encoder: beside a desktop it fits on 4 GB
TEXT_ENCODER = "text_encoder"  # the component that a bundle may do without
FAMILIES: Mapping[str, str] = {  # pipeline class of a checkpoint's model_index.json -> module
    "WanPipeline": "t2v_rt.export.wan.family",
}
Ranges = Mapping[str, Range]


class Configs(Protocol):
    """The configs of one checkpoint's networks, checked against each other, and what a build asks of them."""

    def model(self) -> ModelSpec:
        """The model's constants for the manifest."""
        ...

    def units(self, component: str) -> tuple[tuple[str, ...], ...]:
        """Roles of a component's engines in the order they run, in groups that share weights.

        A group is exported, and built, together. Checkpoints and components alike, equal roles are equal engines.
        """
        ...

    def tiles(self, component: str, profiles: Sequence[VideoProfile] = ()) -> TileSpec | None:
        """How a component works on tiles, None where it does not; with profiles, the tiles that plans are built for."""
        ...

    def ranges(self, profiles: Sequence[VideoProfile]) -> Mapping[str, Mapping[str, tuple[Ranges, ...]]]:
        """Component -> role -> ranges of the symbols of a plan's inputs, for each of its shape profiles."""
        ...

    def graph_options(
        self,
        ranges: Mapping[str, Mapping[str, Sequence[Ranges]]],
        float32_matmul: bool,
        accumulation: Accumulation = "fp32",
    ) -> Mapping[str, Mapping[str, GraphOptions]]:
        """Component -> role -> how the graph of a plan is written.

        Args:
            ranges: from `ranges`.
            float32_matmul: whether all GPUs can multiply float32 matrices.
            accumulation: what attention adds up in: `fp32`, or `fp16` where half operands and much work allow it.
        """
        ...

    def plan_precision(self, component: str, wanted: Precision, turing: bool) -> Precision:
        """The half precision of a component's plans.

        Args:
            component: its name.
            wanted: what was asked for.
            turing: whether a GPU of the sm75 is among those that are built for, which multiplies no bfloat16.
        """
        ...

    def write(self, component: str, role: str, g: GraphWriter) -> Sequence[StateSpec]:
        """Writes the graph of a role; returns its states.

        Raises:
            CheckpointError: a tensor is missing or has the wrong shape.
        """
        ...

    def context(self, component: str, role: str, ranges: Ranges, options: GraphOptions | None) -> int:
        """Bytes of memory that a half-precision plan works in, by a rule of thumb, for before it is built.

        Args:
            component: its name.
            role: of the engine.
            ranges: symbol -> range of the shape profile.
            options: of the engine's graph; None for ONNX Runtime's.
        """
        ...

    def embedding(self, weights: CheckpointWeights) -> tuple[str, tuple[int, int]]:
        """Name and shape of the text encoder's table of token embeddings, which stays on the host."""
        ...

    @property
    def end_token(self) -> int:
        """The token that closes every prompt."""
        ...


class Family(Protocol):
    """What is known of a family before a checkpoint of it is opened."""

    @property
    def networks(self) -> Mapping[str, str]:
        """Component -> folder of the checkpoint that has its network, in the order they run."""
        ...

    @property
    def tokenizers(self) -> tuple[tuple[str, ...], ...]:
        """Files of the folder `tokenizer` that a tokenizer is made of, and others that do in their place."""
        ...

    @property
    def defaults(self) -> Defaults:
        """Of requests, where a checkpoint has none."""
        ...

    @property
    def unused(self) -> Mapping[str, tuple[str, ...]]:
        """Network -> beginnings of the names of tensors that making videos does without."""
        ...

    @property
    def single_files(self) -> SingleFiles | None:
        """Its networks in single files, where it is known in that options."""
        ...

    def read_configs(self, configs: CheckpointConfigs, shard_bytes: int = SHARD_BYTES) -> Configs:
        """Checks the configs.

        Args:
            configs: of a checkpoint of this family.
            shard_bytes: what one engine of the text encoder may take of a card.

        Raises:
            CheckpointError: an architecture that this family does not cover.
        """
        ...

    def read_tokenizer(self, files: Sequence[Path]) -> str:
        """The tokenizer as the text of a `tokenizer.json`.

        Args:
            files: of one of `tokenizers`, in its order.

        Raises:
            CheckpointError: one cannot be read.
        """
        ...


def families() -> list[Family]:
    """All families."""
    return [_load(module) for module in FAMILIES.values()]


def family_of(configs: Mapping[str, object], origin: str | Path) -> Family:
    """The family of a checkpoint.

    Args:
        configs: its `model_index.json`.
        origin: where it is from, for the error.

    Raises:
        CheckpointError: a pipeline that no family has.
    """
    pipeline = configs.get("_class_name")
    if not isinstance(pipeline, str) or pipeline not in FAMILIES:
        raise CheckpointError(f"{origin}: {INDEX} names the pipeline {pipeline!r}; supported: {', '.join(FAMILIES)}")
    return _load(FAMILIES[pipeline])


def networks_of(family: Family) -> tuple[str, ...]:
    """Folders of a checkpoint's networks, each once."""
    return tuple(dict.fromkeys(family.networks.values()))


def _load(module: str) -> Family:
    found: Family = importlib.import_module(module).FAMILY
    return found
