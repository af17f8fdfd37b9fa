"""The manifest, `bundle.json`: everything a bundle declares about its model and its engines."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any, Self

from t2v_rt.engines.plans import PlanSpec, VideoProfile
from t2v_rt.engines.specs import StateSpec, TensorSpec
from t2v_rt.errors import BundleError

SCHEMA_VERSION = 3
MANIFEST_NAME = "bundle.json"
BLOCKS = "blocks_"  # roles of engines that run one after another and of which each can be loaded alone
EMBEDDING_DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class GraphSpec:
    """One engine file of a component, and what crosses its boundary.

    Args:
        path: of an ONNX graph, or of a plan that was built ahead of time.
        inputs: that are fed, states apart.
        outputs: likewise.
        states: that stay on the device.
        plan: what is known of a plan, None for a graph.
        weights_bytes: bytes of the weights it reads, whether others read them too or not.
    """

    path: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    states: tuple[StateSpec, ...] = ()
    plan: PlanSpec | None = None
    weights_bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        content = {
            "path": self.path,
            "inputs": [spec.to_json() for spec in self.inputs],
            "outputs": [spec.to_json() for spec in self.outputs],
            "states": [spec.to_json() for spec in self.states],
            "weights_bytes": self.weights_bytes,
        }
        return content if self.plan is None else {**content, "plan": self.plan.to_json()}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        return cls(
            str(fields["path"]),
            tuple(TensorSpec.from_json(spec) for spec in fields["inputs"]),
            tuple(TensorSpec.from_json(spec) for spec in fields["outputs"]),
            tuple(StateSpec.from_json(spec) for spec in fields["states"]),
            PlanSpec.from_json(fields["plan"]) if "plan" in fields else None,
            int(fields["weights_bytes"]),
        )


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

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        return cls(**{**fields, "grids": tuple((int(rows), int(columns)) for rows, columns in fields["grids"])})

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
    def joined(cls, parts: Sequence[Self]) -> Self:
        """The component of parts that were built one after another and share nothing."""
        graphs = {role: graph for part in parts for role, graph in part.graphs.items()}
        return replace(parts[0], graphs=graphs, weights_bytes=sum(part.weights_bytes for part in parts))

    @property
    def parts(self) -> tuple[Self, ...]:
        """The component in parts of which one at a time has to be loaded: groups of blocks, or all of it."""
        if not all(role.startswith(BLOCKS) for role in self.graphs):
            return (self,)
        return tuple(
            replace(self, graphs={role: graph}, weights_bytes=graph.weights_bytes)
            for role, graph in self.graphs.items()
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "graphs": {role: graph.to_json() for role, graph in self.graphs.items()},
            "precision": self.precision,
            "weights_bytes": self.weights_bytes,
            "tiles": None if self.tiles is None else asdict(self.tiles),
            "embedding": None if self.embedding is None else asdict(self.embedding),
            "weights": self.weights,
            "weights_error": self.weights_error,
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        graphs = {str(role): GraphSpec.from_json(graph) for role, graph in fields["graphs"].items()}
        tiles = None if fields["tiles"] is None else TileSpec.from_json(fields["tiles"])
        embedding = None if fields["embedding"] is None else EmbeddingSpec(**fields["embedding"])
        error = fields["weights_error"]
        return cls(
            graphs,
            str(fields["precision"]),
            int(fields["weights_bytes"]),
            tiles,
            embedding,
            str(fields["weights"]),
            None if error is None else float(error),
        )


@dataclass(frozen=True)
class ModelSpec:
    """What the pipeline must know of a model: families differ in these values, not in code paths of the pipeline.

    Args:
        family: names the module of the runtime that knows the family, e.g. `wan`.
        latent_channels: C of the latents (B, C, F, H, W).
        latents_mean: per channel; decoded latents are `z * std + mean`.
        latents_std: per channel.
        spatial_factor: pixels per latent row and column.
        temporal_factor: frames per latent frame; frames are a multiple of it, plus one.
        patch: latent frames, rows and columns per token of the denoiser.
        max_patches: tokens that fit along one axis.
        heads: attention heads of the denoiser, for the memory estimate.
        hidden_dim: width of the denoiser, for the memory estimate.
        text_length: positions the prompt is padded or cut to.
        text_dim: D of the prompt embeddings (B, L, D).
        relative_buckets: number of relative-position buckets of the text encoder.
        relative_max_distance: distance from which all positions share the last bucket.
    """

    family: str
    latent_channels: int
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]
    spatial_factor: int
    temporal_factor: int
    patch: tuple[int, int, int]
    max_patches: int
    heads: int
    hidden_dim: int
    text_length: int
    text_dim: int
    relative_buckets: int
    relative_max_distance: int

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        tuples = {key: tuple(fields[key]) for key in ("latents_mean", "latents_std", "patch")}
        return cls(**{**fields, **tuples})


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

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        return cls(**fields)


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
        content = {
            "schema_version": SCHEMA_VERSION,
            "backend": self.backend,
            "precision": self.precision,
            "fingerprint": self.fingerprint,
            "builder": dict(self.builder),
            "model": asdict(self.model),
            "scheduler": dict(self.scheduler),
            "defaults": asdict(self.defaults),
            "components": {name: spec.to_json() for name, spec in self.components.items()},
            "targets": list(self.targets),
            "profiles": [profile.to_json() for profile in self.profiles],
            "encoder_id": self.encoder_id,
            "files": {path: asdict(entry) for path, entry in sorted(self.files.items())},
        }
        content = json.loads(json.dumps(content))
        return {"schema_version": SCHEMA_VERSION, "bundle_id": _digest(content), **content}

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
            result = cls(
                backend=str(content["backend"]),
                precision=str(content["precision"]),
                fingerprint=str(content["fingerprint"]),
                builder=dict(content["builder"]),
                model=ModelSpec.from_json(content["model"]),
                scheduler=dict(content["scheduler"]),
                defaults=Defaults.from_json(content["defaults"]),
                components={str(k): ComponentSpec.from_json(v) for k, v in content["components"].items()},
                targets=tuple(str(target) for target in content.get("targets", ())),
                profiles=tuple(VideoProfile.from_json(profile) for profile in content.get("profiles", ())),
                encoder_id=str(content["encoder_id"]),
                files={str(path): FileEntry(**entry) for path, entry in content["files"].items()},
            )
            written_id = content["bundle_id"]
        except (KeyError, TypeError, ValueError, AttributeError) as exc:
            if isinstance(exc, BundleError):
                raise
            raise BundleError(f"{MANIFEST_NAME} is damaged ({exc!r}); build the bundle again") from exc
        if _digest({key: value for key, value in content.items() if key != "bundle_id"}) != written_id:
            raise BundleError(f"{MANIFEST_NAME} was edited after it was built; build the bundle again")
        return result


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
