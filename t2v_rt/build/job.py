"""One build: what it is made from, and how each of its parts is made."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from t2v_rt.build.work_folder import Work
from t2v_rt.engines.backends import backend_info, get_backend
from t2v_rt.engines.bundle.manifest import SCHEMA_VERSION, ComponentSpec, Manifest, TileSpec, to_plain
from t2v_rt.engines.bundle.profiles import Range, Sizes, VideoProfile, parse_profiles
from t2v_rt.engines.tensorrt.library import load_library
from t2v_rt.errors import RequestError
from t2v_rt.export.checkpoint import Checkpoint
from t2v_rt.export.graph import Form, Precision, check_precision
from t2v_rt.export.quantize import Quantization
from t2v_rt.export.tokenizer import read_tokenizer
from t2v_rt.export.wan import family as wan
from t2v_rt.export.wan.profiles import component_forms, component_ranges, with_grids
from t2v_rt.export.weight_file import WeightFile, WeightSizes
from t2v_rt.system.files import free_disk_bytes, remove_tree
from t2v_rt.system.resources import available_memory_bytes

logger = logging.getLogger(__name__)
FULL_SIZE = {"fp32": 1, "fp16": 2, "bf16": 2, "int8": 4, "int4": 7}  # of float32 weights, in units of those stored
REFERENCE_GROWTH = 2.2  # of float32 weights in memory: ONNX Runtime packs the largest matrices once more
# modules of the exporter that find and check what is read, and change no byte of what is written
FINDERS = frozenset(
    ["altering.py", "checkpoint.py", "config.py", "found_instead.py", "hub.py", "tokenizer.py", "weight_names.py"]
)
Report = Callable[[float], None]
Result = Mapping[str, Any]


@dataclass(frozen=True)
class Part:
    """Engines that share weights, and so are made together.

    Args:
        component: its name.
        roles: of the engines.
        precision: of matmul and convolution operands.
        forms: role -> how the backend wants the graph; None for ONNX Runtime's.
        ranges: role -> sizes of each shape profile of a plan.
        tiles: of the VAE decoder's plans.
    """

    component: str
    roles: tuple[str, ...]
    precision: Precision
    forms: Mapping[str, Form] | None = None
    ranges: Mapping[str, Sequence[Mapping[str, Range]]] = field(default_factory=dict)
    tiles: TileSpec | None = None

    @property
    def name(self) -> str:
        return f"{self.component}.{self.roles[0]}"


def code_files(makes_plans: bool) -> list[Path]:
    """The modules that decide what bytes are in a bundle, in a fixed order.

    Args:
        makes_plans: whether plans are built.
    """
    import t2v_rt.engines.tensorrt
    import t2v_rt.export
    import t2v_rt.runtime

    export, runtime = (Path(package.__path__[0]) for package in (t2v_rt.export, t2v_rt.runtime))
    files = [file for file in sorted(export.rglob("*.py")) if file.relative_to(export).as_posix() not in FINDERS]
    files += [runtime / "self_test.py", *sorted((runtime / "families").glob("*.py"))]
    if makes_plans:
        plans = Path(t2v_rt.engines.tensorrt.__path__[0])
        files += [plans / f"{name}.py" for name in ("builder", "library", "worker")]
    return files


@dataclass(frozen=True)
class BuildJob:
    """What is built from what.

    Args:
        source: the opened checkpoint.
        backend: a known one.
        precision: a known one.
        targets: GPUs by name, or none.
        shard_bytes: what an engine of the text encoder may take of a card.
        with_text_encoder: whether it is in the bundle.
        text_weights: `int8` or `int4` for its matrices, or empty.
    """

    source: Checkpoint
    backend: str
    precision: str
    targets: tuple[str, ...]
    shard_bytes: int
    with_text_encoder: bool = True
    text_weights: str = ""

    def __post_init__(self) -> None:
        if self.text_weights:
            Quantization(self.text_weights, "MatMulNBits")
        if self.precision == "bf16" and "sm75" in self.targets:
            raise RequestError(
                "precision is 'bf16', which sm75 does not multiply; use fp16, or leave sm75 out of --gpu"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """Components of the bundle."""
        return tuple(name for name in wan.COMPONENTS if self.with_text_encoder or name != "text_encoder")

    @cached_property
    def configs(self) -> wan.WanConfigs:
        return wan.read_configs(self.source.configs, self.shard_bytes)

    @property
    def makes_plans(self) -> bool:
        return backend_info(self.backend).ahead_of_time

    def manifest(self, sizes: tuple[Sizes, Sizes, Sizes], *, estimate: bool = False) -> Manifest:
        """The bundle's manifest but for its components and, of an estimate, its fingerprint."""
        defaults = wan.read_defaults(self.source.configs.generation)
        profiles = parse_profiles(*sizes, (defaults.height, defaults.width, defaults.num_frames))
        best = {name: ranges.opt for name, ranges in vars(profiles[0]).items()}
        if not self.makes_plans and (len(profiles) > 1 or not all(r.fixed for r in vars(profiles[0]).values())):
            raise RequestError("ONNX Runtime's engines take any size: give one height, width and number of frames")
        library = {self.backend: load_library(self.backend).version} if self.makes_plans else {}
        builder = {**_versions("t2v-rt", "onnx"), **library}
        return Manifest(
            backend=self.backend,
            precision=self.precision,
            fingerprint="" if estimate else self._fingerprint(builder, profiles),
            builder=builder,
            model=wan.model_spec(self.configs),
            scheduler=self.source.configs.scheduler,
            defaults=replace(defaults, **best),
            components={},
            targets=self.targets,
            profiles=profiles if self.makes_plans else (),
            encoder_id="" if estimate else self.source.encoder_digest()[:16],
        )

    def _fingerprint(self, builder: Mapping[str, str], profiles: Sequence[VideoProfile]) -> str:
        """A hash of all that goes into a bundle: weights and configs, settings, and the code that builds."""
        files = code_files(self.makes_plans)
        code = hashlib.sha256(b"".join(file.read_bytes() for file in files))
        content = {
            "schema": SCHEMA_VERSION,
            "checkpoint": self.source.digest(),
            "backend": self.backend,
            "precision": self.precision,
            "targets": self.targets,
            "text_weights": self.text_weights,
            "components": self.names,
            "profiles": to_plain(profiles),
            "text_encoder": {role: [blocks.start, blocks.stop] for role, blocks in self.configs.text_blocks.items()},
            "code": code.hexdigest(),
            "versions": {**builder, **_versions("onnxruntime")},
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def parts(self, manifest: Manifest) -> tuple[Part, ...]:
        """The parts of all components, in the order they are made."""
        configs, precision = self.configs, check_precision(self.precision)
        if not self.makes_plans:
            return tuple(self._graphs(name, roles) for name in self.names for roles in configs.parts(name))
        turing = "sm75" in self.targets  # which multiplies neither float32 nor bfloat16
        tiles = with_grids(configs.vae.tiles, manifest.model, manifest.profiles)
        ranges = component_ranges(manifest.model, manifest.profiles, tiles, configs.roles("text_encoder"))
        forms = component_forms(manifest.model, ranges, configs.transformer.ffn_dim, not turing)
        if self.text_weights:
            scheme = Quantization(self.text_weights, "DequantizeLinear")
            encoder = {role: replace(form, quantization=scheme) for role, form in forms["text_encoder"].items()}
            forms = {**forms, "text_encoder": encoder}
        return tuple(
            Part(
                name,
                roles,
                _plan_precision(name, precision, turing),
                forms[name],
                ranges[name],
                tiles if name == "vae_decoder" else None,
            )
            for name in self.names
            for roles in configs.parts(name)
        )

    def _graphs(self, name: str, roles: tuple[str, ...]) -> Part:
        """A part of ONNX Runtime's graphs; quantized matrices are multiplied in float32 only."""
        if name != "text_encoder" or not self.text_weights:
            return Part(name, roles, check_precision(self.precision))
        form = Form(quantization=Quantization(self.text_weights, "MatMulNBits"))
        return Part(name, roles, "fp32", dict.fromkeys(roles, form))

    def _export(self, part: Part, folder: Path, store_type: type[WeightFile] = WeightFile) -> ComponentSpec:
        spec = wan.export_component(
            part.component, self.source, self.configs, folder, part.precision, part.forms, part.roles, store_type
        )
        if part.component == "text_encoder":
            spec = replace(spec, weights=self.text_weights)
        return spec if part.tiles is None else replace(spec, tiles=part.tiles)

    def outline(self, parts: Sequence[Part]) -> tuple[ComponentSpec, ...]:
        """What each part will be, its weights counted but not read.

        Tensors that no part uses are named in a warning.

        Raises:
            CheckpointError: one is missing.
        """
        with tempfile.TemporaryDirectory() as folder:
            outline = tuple(self._export(part, Path(folder), WeightSizes) for part in parts)
        wan.warn_of_unused(self.source, self.names)
        return outline

    def build_part(self, part: Part, work: Work, report: Report) -> Result:
        """Makes the engines of a part; returns its component spec as JSON."""
        if not self.makes_plans:
            return dict(to_plain(self._export(part, work.bundle)))
        from t2v_rt.commands.inspect import count_nodes
        from t2v_rt.engines.tensorrt.builder import PlanBuilder

        spec = self._export(part, work.scratch)
        nodes = {role: count_nodes(work.scratch / graph.path) for role, graph in spec.graphs.items()}
        builder = PlanBuilder(self.backend, self.targets)
        return dict(to_plain(builder.build_component(work.scratch, work.bundle, spec, part.ranges, nodes, report)))

    def copy_embedding(self, work: Work) -> Result:
        """Copies the text encoder's table; returns its spec as JSON."""
        return asdict(wan.export_embedding(self.source, self.configs, work.bundle))

    def copy_tokenizer(self, work: Work) -> Result:
        (work.bundle / "tokenizer").mkdir()
        text = read_tokenizer(self.source.tokenizer)
        (work.bundle / "tokenizer" / "tokenizer.json").write_bytes(text.encode())
        return {}

    def can_run_reference(self, name: str, built: ComponentSpec, folder: Path) -> bool:
        """Whether the largest part of a component fits memory and disk in float32; where it does not, that is said."""
        largest = max(part.weights_bytes for part in built.parts)
        needed = int(largest * REFERENCE_GROWTH) * (
            FULL_SIZE[built.weights] if built.weights else FULL_SIZE[built.precision]
        )
        room = min(available_memory_bytes(), free_disk_bytes(folder))
        if needed > room:
            logger.warning(
                "the bundle carries no self-test of %s: its float32 reference needs %.1f GB of memory and disk of %.1f",
                name,
                needed / 1e9,
                room / 1e9,
            )
        return needed <= room

    def record_self_test(self, name: str, built: ComponentSpec, manifest: Manifest, work: Work) -> Result:
        """Runs a component's float32 graphs on the CPU, anew where the bundle has others; keeps what they answer."""
        from t2v_rt.runtime import self_test

        again = self.precision != "fp32" or bool(built.weights)
        place = work.scratch if again else work.bundle
        answers = []
        for part in built.parts:
            spec = part
            if again:
                spec = wan.export_component(name, self.source, self.configs, place, "fp32", roles=tuple(part.graphs))
            with get_backend("onnxruntime").load(place, name, spec) as component:
                answers += self_test.run_calls(name, component, manifest.model, built)
            if again:
                remove_tree(place / name)
        self_test.record(name, answers, work.bundle)
        return {}

    def measure_weights(self, name: str, built: ComponentSpec, manifest: Manifest, work: Work) -> Result:
        """What quantized weights cost, run by ONNX Runtime: plans as the graphs that they were built from, at fp32."""
        from t2v_rt.runtime import self_test

        results = []
        scheme = Quantization(self.text_weights, "DequantizeLinear")
        for part in built.parts:
            place, spec = work.bundle, part
            if self.makes_plans:
                place, forms = work.scratch, dict.fromkeys(part.graphs, Form(quantization=scheme))
                spec = wan.export_component(name, self.source, self.configs, place, "fp32", forms, tuple(part.graphs))
            with get_backend("onnxruntime").load(place, name, spec) as component:
                results += self_test.run_calls(name, component, manifest.model, built)
            if self.makes_plans:
                remove_tree(place / name)
        return {"error": self_test.largest_error(name, results, work.bundle)}


def _plan_precision(component: str, wanted: Precision, turing: bool) -> Precision:
    """The half precision that suits a component of plans.

    The text encoder overflows in fp16 unless parts of it are kept in float32; the VAE decoder needs the finer steps of
    fp16, and its caches cross the engines' boundary, which NumPy has no bfloat16 for.
    """
    if component == "vae_decoder":
        return "fp16"
    return "bf16" if component == "text_encoder" and not turing else wanted


def _versions(*packages: str) -> dict[str, str]:
    from importlib import metadata  # takes long to import, and only building needs it

    return {name: metadata.version(name) for name in packages}
