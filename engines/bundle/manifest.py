"""The manifest, `bundle.json`: everything a bundle declares about its model and its engines."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, Self, TypeVar

from t2v_rt.engines.bundle.model import ModelSpec
from t2v_rt.engines.bundle.profiles import PlanSpec, VideoProfile
from t2v_rt.engines.specs import StateSpec, TensorSpec
from t2v_rt.errors import BundleError
from t2v_rt.system.outputs import MANIFEST_NAME

SCHEMA_VERSION = 5
BLOCKS = "blocks_"  # roles of engines that run one after another and of which each can be loaded alone
T = TypeVar("T")
EMBEDDING_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class GraphSpec:
    """One engine file of a component, and what crosses its boundary.

    Args:
        path: of an ONNX graph, or of a plan that was built ahead of time.
        inputs: that are fed, states apart.
        outputs: specs of the outputs, in their order.
        states: that stay on the device.
        plan: what is known of a plan, None for a graph.
        weights_bytes: bytes of the weights it reads, whether others read them too or not.
        tiled: whether a graph works through a video's tokens in parts, and holds neither a score of every two of them
            nor a feed-forward's values of all.
    """

    path: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    states: tuple[StateSpec, ...] = ()
    plan: PlanSpec | None = None
    weights_bytes: int = 0
    tiled: bool = False


# tiles from top to bottom and from left to right, in the order they are tried
GRIDS: tuple[tuple[int, int], ...] = ((1, 1), (1, 2), (2, 2), (2, 3), (3, 3), (3, 4), (4, 4))


@dataclass(frozen=True)
class TileSpec:
    """How the part of a decoder that sees only its neighbourhood can work on tiles.

    Args:
        scale: features per latent row and column.
        upscale: pixels per feature row and column.
        halo: how many features beyond its own a tile has to see on each side, so that it equals the whole.
        grids: tiles from top to bottom and from left to right that the engines were built for, the coarsest first; none
            where any will do.
    """

    scale: int
    upscale: int
    halo: int
    grids: tuple[tuple[int, int], ...] = ()

    def fed_length(self, length: int, count: int) -> int:
        """Features that each of `count` tiles is fed along an axis of `length`.

        No tile of two has a neighbour on both sides, so two tiles see the halo on one side only.
        """
        return min(length, -(-length // count) + min(count - 1, 2) * self.halo)


@dataclass(frozen=True)
class EmbeddingSpec:
    """A table of token embeddings that stays on the host: its rows are gathered there.

    Args:
        path: of the raw file, rows one after another, little endian.
        dtype: `float32`, `float16` or `bfloat16`: the checkpoint's own.
        rows: tokens.
        columns: values of a row.
    """

    path: str
    dtype: str
    rows: int
    columns: int

    def __post_init__(self) -> None:
        if self.dtype not in EMBEDDING_DTYPES:
            raise BundleError(f"embeddings are {self.dtype!r}; expected one of {', '.join(EMBEDDING_DTYPES)}")


@dataclass(frozen=True)
class ComponentSpec:
    """A component: its engines by role and their size.

    Args:
        graphs: role -> engine file: `model`; the text encoder has `blocks_0`, `blocks_1` … (consecutive groups of its
            blocks, in the order they run), the VAE decoder `head_first`, `head_next` (latents to features) and
            `tail` (features to frames).
        precision: of matmul and convolution operands.
        weights_bytes: bytes of weights, shared by the graphs.
        tiles: of the VAE decoder's tail.
        embedding: of the text encoder.
        weights: `int8` or `int4` where matrices are stored so, else empty.
        weights_error: what that costs: the largest difference of the self-test's answers, relative to the largest
            answer, as ONNX Runtime computes them; None where nothing was measured.
    """

    graphs: Mapping[str, GraphSpec]
    precision: str
    weights_bytes: int
    tiles: TileSpec | None = None
    embedding: EmbeddingSpec | None = None
    weights: str = ""
    weights_error: float | None = None

    @classmethod
    def joined(cls, shards: Sequence[Self]) -> Self:
        """The component of shards that were built one after another and share nothing."""
        graphs = {role: graph for shard in shards for role, graph in shard.graphs.items()}
        return replace(shards[0], graphs=graphs, weights_bytes=sum(shard.weights_bytes for shard in shards))

    @property
    def shards(self) -> tuple[Self, ...]:
        """The component in shards, of which one at a time has to be loaded: groups of blocks, or all of it."""
        if not all(role.startswith(BLOCKS) for role in self.graphs):
            return (self,)
        return tuple(
            replace(self, graphs={role: graph}, weights_bytes=graph.weights_bytes)
            for role, graph in self.graphs.items()
        )


@dataclass(frozen=True)
class Defaults:
    """What a request that leaves a setting out gets."""

    height: int
    width: int
    num_frames: int
    fps: float
    num_inference_steps: int
    guidance_scale: float
    negative_prompt: str


@dataclass(frozen=True)
class FileEntry:
    """Size and hash of one file of the bundle."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """The content of `bundle.json`.

    Args:
        backend: the backend its engines are for.
        precision: of the engines.
        fingerprint: hash of all that went into the build; an equal one means the bundle can be reused.
        builder: library -> version that built it.
        model: constants of the model.
        scheduler: the checkpoint's scheduler config, class name included.
        defaults: of a request.
        components: name -> component.
        targets: GPUs that its plans were built for, such as `sm89`; none where its engines are ONNX graphs.
        profiles: videos that its plans can make; none where the size is free.
        attention_accumulation: what attention of its plans was asked to add up in, `fp32` or `fp16`; empty where its
            engines are ONNX graphs.
        encoder_id: of the checkpoint's text encoder and tokenizer: prompt embeddings of an equal one fit.
        files: path inside the bundle -> size and hash, of every file but the manifest.
    """

    backend: str
    precision: str
    fingerprint: str
    builder: Mapping[str, str]
    model: ModelSpec
    scheduler: Mapping[str, Any]
    defaults: Defaults
    components: Mapping[str, ComponentSpec]
    targets: tuple[str, ...] = ()
    profiles: tuple[VideoProfile, ...] = ()
    attention_accumulation: str = ""
    encoder_id: str = ""
    files: Mapping[str, FileEntry] = field(default_factory=dict)

    def __post_init__(self) -> None:
        paths = [*self.files, *(graph.path for spec in self.components.values() for graph in spec.graphs.values())]
        paths += [spec.embedding.path for spec in self.components.values() if spec.embedding is not None]
        for path in paths:
            check_inside(path)
        for path in paths if self.files else ():  # while a bundle is being written, nothing is hashed yet
            if path not in self.files:
                raise BundleError(f"{MANIFEST_NAME} names the engine file {path!r} but gives no hash of it; rebuild it")

    def to_json(self) -> dict[str, Any]:
        """As a JSON object, `schema_version` and `bundle_id` included."""
        content = {"schema_version": SCHEMA_VERSION, **to_plain(self)}
        return {"bundle_id": _digest(content), **content}

    def with_components(self, components: Mapping[str, ComponentSpec]) -> Self:
        """The same manifest for other components; their files must be hashed before it is written."""
        return replace(self, components=components)

    @property
    def bundle_id(self) -> str:
        """A short hash of the whole content: two bundles with one id give the same videos."""
        return str(self.to_json()["bundle_id"])

    @classmethod
    def from_json(cls, content: object) -> Self:
        """Reads a manifest.

        Args:
            content: the parsed JSON.

        Raises:
            BundleError: not a manifest, of a newer schema, edited, or with a path that leaves the bundle.
        """
        if not isinstance(content, dict) or not isinstance(content.get("schema_version"), int):
            raise BundleError(f"{MANIFEST_NAME} has no schema_version; expected a bundle written by build-engines")
        if content["schema_version"] != SCHEMA_VERSION:
            raise BundleError(
                f"{MANIFEST_NAME} has schema {content['schema_version']}, this version reads {SCHEMA_VERSION}; "
                "use the t2v-rt that built it, or build the bundle again"
            )
        try:
            result = from_plain(content, cls)
            written_id = content["bundle_id"]
        except (KeyError, ValueError) as exc:
            if isinstance(exc.__cause__, BundleError):
                raise exc.__cause__ from exc
            raise BundleError(f"{MANIFEST_NAME} is damaged ({exc}); build the bundle again") from exc
        if _digest({key: value for key, value in content.items() if key != "bundle_id"}) != written_id:
            raise BundleError(f"{MANIFEST_NAME} was edited after it was built; build the bundle again")
        return result


def to_plain(value: object) -> Any:
    """Dataclasses, mappings and sequences as dicts and lists, as `json` writes them."""
    import msgspec  # here and below: importing the pipeline should not pay for it

    return msgspec.to_builtins(value)


def from_plain(content: object, kind: type[T]) -> T:
    """Makes a dataclass of plain JSON values.

    Args:
        content: as `json` reads it.
        kind: the dataclass, whose annotations say what is expected.

    Raises:
        ValueError: a value of another type than its annotation says, a missing field, or one that the class refuses;
            says where.
    """
    import msgspec

    return msgspec.convert(content, kind, strict=True)


def check_inside(path: str) -> None:
    """Refuses a path that is absolute, names a drive or climbs out of the bundle.

    Raises:
        BundleError: the path leaves the bundle.
    """
    posix, windows = PurePosixPath(path), PureWindowsPath(path)
    if not path or posix.is_absolute() or windows.anchor or ".." in windows.parts or ".." in posix.parts:
        raise BundleError(f"{MANIFEST_NAME} names {path!r}, which leaves the bundle; do not use a bundle like this")


def _digest(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
