"""One build: what it is made from, and how each of its units is made."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2v_rt.build.options import BuildOptions
from t2v_rt.build.units import Unit, graph_units, plan_units
from t2v_rt.build.work_folder import WorkFolder
from t2v_rt.engines.backend_info import backend_info
from t2v_rt.engines.backends import get_backend
from t2v_rt.engines.bundle.manifest import SCHEMA_VERSION, ComponentSpec, Manifest, to_plain
from t2v_rt.engines.bundle.profiles import VideoProfile, count_nodes, parse_profiles
from t2v_rt.engines.tensorrt.libraries import load_library
from t2v_rt.errors import RequestError
from t2v_rt.export import components
from t2v_rt.export.checkpoint import Checkpoint
from t2v_rt.export.config import read_defaults
from t2v_rt.export.family import FAMILIES, TEXT_ENCODER, Configs
from t2v_rt.export.graph import GraphOptions
from t2v_rt.export.precision import check_precision
from t2v_rt.export.quantize import Quantization
from t2v_rt.export.weight_file import WeightFile, WeightSizes
from t2v_rt.system.files import free_disk_bytes, remove_tree
from t2v_rt.system.resources import available_memory_bytes

if TYPE_CHECKING:
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)
FULL_SIZE = {"fp32": 1, "fp16": 2, "bf16": 2, "int8": 4, "int4": 7}  # of float32 weights, in units of those stored
REFERENCE_GROWTH = 2.2  # of float32 weights in memory: ONNX Runtime packs the largest matrices once more
# modules of the exporter that find and check what is read, and change no byte of what is written
FINDERS = frozenset(
    ["altering.py", "checkpoint.py", "config.py", "found_instead.py", "hub.py", "tokenizer.py", "weight_names.py"]
)
Report = Callable[[float], None]
Result = Mapping[str, Any]


def code_files(makes_plans: bool, module: str, family: str) -> list[Path]:
    """The modules that decide what bytes are in a bundle, in a fixed order; those of other families are left out.

    Args:
        makes_plans: whether plans are built.
        module: of the family that exports, one of `FAMILIES`.
        family: its name in the manifest.
    """
    import t2v_rt.engines.tensorrt
    import t2v_rt.export
    import t2v_rt.runtime

    export, runtime = (Path(package.__path__[0]) for package in (t2v_rt.export, t2v_rt.runtime))
    _, *others = dict.fromkeys([_folder(module), *map(_folder, FAMILIES.values())])
    files = [
        file
        for file in sorted(export.rglob("*.py"))
        if file.relative_to(export).as_posix() not in FINDERS and file.relative_to(export).parts[0] not in others
    ]
    files += [runtime / "self_test.py", runtime / "families" / "__init__.py"]
    files += [file for file in [runtime / "families" / f"{family}.py"] if file.is_file()]  # a program may bring its own
    if makes_plans:
        plans = Path(t2v_rt.engines.tensorrt.__path__[0])
        files += [plans / f"{name}.py" for name in ("attention", "builder", "libraries", "plan_text", "worker")]
    return files


def _folder(module: str) -> str:
    """The folder of the exporter that a family's module lies in."""
    return module.removeprefix("t2v_rt.export.").partition(".")[0]


@dataclass(frozen=True, kw_only=True)
class BuildJob:
    """What is built from what.

    Args:
        source: the opened checkpoint.
        options: what is asked for.
        precision: that of the options, or the backend's own.
        shard_bytes: what an engine of the text encoder may take of a card.
    """

    source: Checkpoint
    options: BuildOptions
    precision: str
    shard_bytes: int

    @property
    def backend(self) -> str:
        return self.options.backend

    @property
    def targets(self) -> tuple[str, ...]:
        """GPUs by name, or none."""
        return self.options.targets

    @property
    def with_text_encoder(self) -> bool:
        return self.options.with_text_encoder

    @property
    def text_weights(self) -> str:
        """`int8` or `int4` for the text encoder's matrices, or empty."""
        return self.options.text_encoder_weights or ""

    @property
    def names(self) -> tuple[str, ...]:
        """Components of the bundle."""
        known = self.source.family.networks
        return tuple(name for name in known if self.with_text_encoder or name != TEXT_ENCODER)

    @cached_property
    def configs(self) -> Configs:
        return self.source.family.read_configs(self.source.configs, self.shard_bytes)

    @property
    def makes_plans(self) -> bool:
        return backend_info(self.backend).ahead_of_time

    def manifest(self, *, estimate: bool = False) -> Manifest:
        """The bundle's manifest but for its components and, of an estimate, its fingerprint."""
        defaults = read_defaults(self.source.configs.generation, self.source.family.defaults)
        sizes = self.options.height, self.options.width, self.options.num_frames
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
            model=self.configs.model(),
            scheduler=self.source.configs.scheduler,
            defaults=replace(defaults, **best),
            components={},
            targets=self.targets,
            profiles=profiles if self.makes_plans else (),
            attention_accumulation=self.options.accumulation if self.makes_plans else "",
            encoder_id="" if estimate else self.source.encoder_digest()[:16],
        )

    def _fingerprint(self, builder: Mapping[str, str], profiles: Sequence[VideoProfile]) -> str:
        """A hash of all that goes into a bundle: weights and configs, settings, and the code that builds."""
        family = self.source.family
        files = code_files(self.makes_plans, type(family).__module__, self.configs.model().family)
        code = hashlib.sha256(b"".join(file.read_bytes() for file in files))
        content = {
            "schema": SCHEMA_VERSION,
            "checkpoint": self.source.digest(),
            "backend": self.backend,
            "precision": self.precision,
            "targets": self.targets,
            "text_weights": self.text_weights,
            "attention_accumulation": self.options.accumulation if self.makes_plans else "",
            "profiles": to_plain(profiles),
            "units": {name: self.configs.units(name) for name in self.names},
            "code": code.hexdigest(),
            "versions": {**builder, **_versions("onnxruntime")},
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def units(self, manifest: Manifest) -> tuple[Unit, ...]:
        """The units of all components, in the order they are made."""
        asked = (self.configs, self.names, check_precision(self.precision), self.text_weights)
        if not self.makes_plans:
            return graph_units(*asked, defaults=manifest.defaults)
        turing = "sm75" in self.targets
        return plan_units(*asked, profiles=manifest.profiles, turing=turing, accumulation=self.options.accumulation)

    def _export(self, unit: Unit, folder: Path, store_type: type[WeightFile] = WeightFile) -> ComponentSpec:
        spec = components.export_component(
            unit.component,
            self.source,
            self.configs,
            folder,
            unit.precision,
            unit.graph_options,
            unit.roles,
            store_type,
        )
        return replace(spec, tiles=unit.tiles, weights=self.text_weights if unit.component == TEXT_ENCODER else "")

    def outline(self, units: Sequence[Unit]) -> tuple[ComponentSpec, ...]:
        """What each unit will be, its weights counted but not read.

        Tensors that no unit uses are named in a warning.

        Raises:
            CheckpointError: one is missing.
        """
        with tempfile.TemporaryDirectory() as folder:
            outline = tuple(self._export(unit, Path(folder), WeightSizes) for unit in units)
        components.warn_of_unused(self.source, self.names)
        return outline

    def build_unit(self, unit: Unit, work: WorkFolder, report: Report) -> Result:
        """Makes the engines of a unit; returns its component spec as JSON."""
        if not self.makes_plans:
            return dict(to_plain(self._export(unit, work.bundle)))
        from t2v_rt.engines.tensorrt.builder import PlanBuilder

        spec = self._export(unit, work.scratch)
        nodes = {role: count_nodes(work.scratch / graph.path) for role, graph in spec.graphs.items()}
        sums = {role: graph_options.accumulation for role, graph_options in (unit.graph_options or {}).items()}
        builder = PlanBuilder(self.backend, self.targets)
        built = builder.build_component(work.scratch, work.bundle, spec, unit.ranges, nodes, sums, report)
        return dict(to_plain(built))

    def copy_embedding(self, work: WorkFolder) -> Result:
        """Copies the text encoder's table; returns its spec as JSON."""
        return asdict(components.export_embedding(self.source, self.configs, work.bundle))

    def copy_tokenizer(self, work: WorkFolder) -> Result:
        (work.bundle / "tokenizer").mkdir()
        text = components.read_tokenizer(self.source)
        (work.bundle / "tokenizer" / "tokenizer.json").write_bytes(text.encode())
        return {}

    def can_run_reference(self, name: str, built: ComponentSpec, folder: Path) -> bool:
        """Whether the largest part of a component fits memory and disk in float32; where it does not, that is said."""
        largest = max(shard.weights_bytes for shard in built.shards)
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

    def record_self_test(self, name: str, built: ComponentSpec, manifest: Manifest, work: WorkFolder) -> Result:
        """Runs a component's float32 graphs on the CPU, anew where the bundle has others; keeps what they answer."""
        from t2v_rt.runtime import self_test

        again = self.precision != "fp32" or bool(built.weights)
        place = work.scratch if again else work.bundle
        answers: dict[str, NDArray[Any]] = {}
        for shard in built.shards:
            spec = shard
            if again:
                spec = components.export_component(
                    name, self.source, self.configs, place, "fp32", roles=tuple(shard.graphs)
                )
            with get_backend("onnxruntime").load(place, name, spec) as component:
                calls = self_test.make_calls(name, component, manifest.model, built)
                answers |= {made.call.label: made.result for made in calls}
            if again:
                remove_tree(place / name)
        self_test.record(name, answers, work.bundle)
        return {}

    def measure_weights(self, name: str, built: ComponentSpec, manifest: Manifest, work: WorkFolder) -> Result:
        """What quantized weights cost, run by ONNX Runtime: plans as the graphs that they were built from, at fp32."""
        from t2v_rt.runtime import self_test

        results: dict[str, NDArray[Any]] = {}
        scheme = Quantization(self.text_weights, "DequantizeLinear")
        for shard in built.shards:
            place, spec = work.bundle, shard
            if self.makes_plans:
                place, graph_options = work.scratch, dict.fromkeys(shard.graphs, GraphOptions(quantization=scheme))
                spec = components.export_component(
                    name, self.source, self.configs, place, "fp32", graph_options, tuple(shard.graphs)
                )
            with get_backend("onnxruntime").load(place, name, spec) as component:
                calls = self_test.make_calls(name, component, manifest.model, built)
                results |= {made.call.label: made.result for made in calls}
            if self.makes_plans:
                remove_tree(place / name)
        return {"error": self_test.largest_error(name, results, work.bundle)}


def _versions(*packages: str) -> dict[str, str]:
    from importlib import metadata  # takes long to import, and only building needs it

    return {name: metadata.version(name) for name in packages}
