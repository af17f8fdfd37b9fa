"""`build_engines`: from a checkpoint to a bundle, the command as a call."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from t2v_rt.engines import platform
from t2v_rt.engines.backends import check_backend, get_backend
from t2v_rt.engines.bundle import Bundle, new_bundle, open_bundle, read_manifest, write_manifest
from t2v_rt.engines.manifest import SCHEMA_VERSION, ComponentSpec, Manifest
from t2v_rt.engines.plans import Sizes, VideoProfile, parse_profiles
from t2v_rt.engines.tensorrt_library import check_targets, load_library
from t2v_rt.engines.trust import built_here, remember_built
from t2v_rt.errors import BundleError, InputError, RequestError

if TYPE_CHECKING:
    from t2v_rt.export.checkpoint import Checkpoint
    from t2v_rt.export.wan import WanConfigs

logger = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]
Report = Callable[[str, float], None]
STEPS = ("text_encoder", "transformer", "vae_decoder", "self_test", "hash", "done")
REFERENCE_GROWTH = 2.2  # of float32 weights in memory: ONNX Runtime packs the largest matrices once more
PER_STEP = 100  # what progress counts in
DISK_MARGIN = 1.1  # of the weights' bytes: graphs and padding come on top
PRECISIONS = {"onnxruntime": "fp32"}  # of a backend where none is given; plans are half precision


def build_engines(
    checkpoint: str | Path,
    output: str | Path,
    *,
    backend: str = "onnxruntime",
    precision: str | None = None,
    height: Sizes = None,
    width: Sizes = None,
    num_frames: Sizes = None,
    gpus: str | Sequence[str] | None = None,
    vram_budget: int | str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Exports a checkpoint in diffusers layout and builds its engines.

    The bundle is written under a temporary name and renamed: it is there whole or not at all. An existing bundle is
    reused when everything that went into it is unchanged.

    Args:
        checkpoint: folder with `model_index.json` and a folder per component; safetensors only.
        output: folder of the bundle.
        backend: `onnxruntime`, `tensorrt-rtx` (builds plans for named GPUs, needs none) or `tensorrt` (builds plans for
            the GPU it runs on).
        precision: of matmul and convolution operands: `fp32` or `fp16`; None for the backend's own, `fp16` for plans.
        height: default height of requests in pixels, instead of the checkpoint's. Plans are built for it; for them it
            may be a range or several sizes, see `engines.plans.parse_profiles`.
        width: default width, likewise.
        num_frames: default number of frames, likewise.
        gpus: that TensorRT-RTX builds for, such as "sm86,sm89"; None for all from sm80 on.
        vram_budget: memory of the smallest card it is for, bytes or text such as `4GiB`: the text encoder comes in
            engines of which one at a time fits there; None for engines of 3 GB at most, which suits most cards.
        force: build even where an existing bundle could be reused.
        progress: called as `f(step, done, total)`.

    Returns:
        The opened bundle.

    Raises:
        CheckpointError: the checkpoint is incomplete, damaged, pickled or of an unsupported architecture.
        BundleError: something other than a bundle is at `output`.
        BackendError: the backend is unknown or not available, or a GPU is.
        RequestError: a setting is invalid, or the output folder or disk cannot take the bundle.
        EngineError: a plan cannot be built.
    """
    check_backend(backend)
    targets = check_targets(backend, gpus)
    try:
        from t2v_rt.export.checkpoint import open_checkpoint
    except ImportError as exc:
        raise InputError(f"building engines needs the package {exc.name!r}; install t2v-rt[build]") from exc
    target = Path(output)
    platform.check_writable_parent(target)
    job = _Build(
        open_checkpoint(checkpoint), backend, _precision(backend, precision), targets, _shard_bytes(vram_budget)
    )
    manifest = job.manifest((height, width, num_frames))
    _check_request(manifest)
    if not force and (existing := _reusable(target, manifest)) is not None:
        return existing
    _check_disk(target, job.source_bytes)
    report = _reporter(progress)
    with new_bundle(target) as folder:
        components = job.components(manifest, folder, report)
        report("self_test", 0.0)
        for name, spec in components.items():
            if job.can_run_reference(name, spec, folder):
                job.record_self_test(name, spec, manifest, folder)
        (folder / "tokenizer").mkdir()
        shutil.copyfile(job.source.tokenizer, folder / "tokenizer" / "tokenizer.json")
        report("hash", 0.0)
        write_manifest(folder, manifest.with_components(components))
    if job.makes_plans:
        remember_built(target)
    report("done", 0.0)
    return open_bundle(target)


@dataclass(frozen=True)
class _Build:
    """What is built from what.

    Args:
        source: the opened checkpoint.
        backend: a known one.
        precision: a known one.
        targets: GPUs by name, or none.
        shard_bytes: what an engine of the text encoder may take of a card.
    """

    source: Checkpoint
    backend: str
    precision: str
    targets: tuple[str, ...]
    shard_bytes: int

    @cached_property
    def configs(self) -> WanConfigs:
        from t2v_rt.export import wan

        return wan.read_configs(self.source, self.shard_bytes)

    @property
    def makes_plans(self) -> bool:
        return self.backend != "onnxruntime"

    @property
    def source_bytes(self) -> int:
        return sum(file.stat().st_size for weights in self.source.weights.values() for file in weights.files)

    def manifest(self, sizes: tuple[Sizes, Sizes, Sizes]) -> Manifest:
        """The bundle's manifest but for its components."""
        from t2v_rt.export import wan

        defaults = wan.read_defaults(self.source.generation)
        profiles = parse_profiles(*sizes, (defaults.height, defaults.width, defaults.num_frames))
        best = {name: ranges.opt for name, ranges in vars(profiles[0]).items()}
        if not self.makes_plans and (len(profiles) > 1 or not all(r.fixed for r in vars(profiles[0]).values())):
            raise RequestError("ONNX Runtime's engines take any size: give one height, width and number of frames")
        library = {self.backend: load_library(self.backend).version} if self.makes_plans else {}
        builder = {**_versions("t2v-rt", "onnx"), **library}
        return Manifest(
            backend=self.backend,
            precision=self.precision,
            fingerprint=self._fingerprint(builder, profiles),
            builder=builder,
            model=wan.model_spec(self.configs),
            scheduler=self.source.scheduler,
            defaults=replace(defaults, **best),
            components={},
            targets=self.targets,
            profiles=profiles if self.makes_plans else (),
        )

    def _fingerprint(self, builder: Mapping[str, str], profiles: Sequence[VideoProfile]) -> str:
        """A hash of all that goes into a bundle: weights and configs, settings, and the code that builds."""
        import t2v_rt.engines
        import t2v_rt.export
        from t2v_rt.runtime import self_test

        files = [*sorted(Path(t2v_rt.export.__path__[0]).glob("*.py")), Path(self_test.__file__)]
        if self.makes_plans:
            files += sorted(Path(t2v_rt.engines.__path__[0]).glob("tensorrt_*.py"))
        code = hashlib.sha256(b"".join(file.read_bytes() for file in files))
        content = {
            "schema": SCHEMA_VERSION,
            "checkpoint": self.source.digest(),
            "backend": self.backend,
            "precision": self.precision,
            "targets": self.targets,
            "profiles": [profile.to_json() for profile in profiles],
            "text_encoder": {role: [blocks.start, blocks.stop] for role, blocks in self.configs.text_blocks.items()},
            "code": code.hexdigest(),
            "versions": {**builder, **_versions("onnxruntime")},
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def components(self, manifest: Manifest, folder: Path, report: Report) -> dict[str, ComponentSpec]:
        """Writes the engines of all components into the bundle's folder; raises as `build_engines`."""
        from t2v_rt.export import wan
        from t2v_rt.export.graph import check_precision

        if self.makes_plans:
            result = self._plans(manifest, folder, report)
        else:
            result, precision = {}, check_precision(self.precision)
            for name in wan.COMPONENTS:
                report(name, 0.0)
                result[name] = wan.export_component(name, self.source, self.configs, folder, precision)
        embedding = wan.export_embedding(self.source, self.configs, folder)
        return {**result, "text_encoder": replace(result["text_encoder"], embedding=embedding)}

    def _plans(self, manifest: Manifest, folder: Path, report: Report) -> dict[str, ComponentSpec]:
        """Builds the plans of all components: graphs are exported and built from in turn, so that few lie on disk."""
        from t2v_rt.engines.tensorrt_builder import PlanBuilder, report_part
        from t2v_rt.export import wan
        from t2v_rt.export.graph import check_precision
        from t2v_rt.export.wan_profiles import component_forms, component_ranges, with_grids
        from t2v_rt.inspect import count_nodes

        configs, turing = self.configs, "sm75" in self.targets  # Turing multiplies neither float32 nor bfloat16
        tiles = with_grids(configs.vae.tiles, manifest.model, manifest.profiles)
        ranges = component_ranges(manifest.model, manifest.profiles, tiles, configs.roles("text_encoder"))
        forms = component_forms(manifest.model, ranges, configs.transformer.ffn_dim, not turing)
        builder, result = PlanBuilder(self.backend, self.targets), {}
        for name in wan.COMPONENTS:
            report(name, 0.0)
            precision = "bf16" if name == "text_encoder" and not turing else check_precision(self.precision)
            parts, built = configs.parts(name), []
            for i, roles in enumerate(parts):
                graphs = folder / "graphs"
                graphs.mkdir()
                spec = wan.export_component(name, self.source, configs, graphs, precision, forms[name], roles)
                spec = replace(spec, tiles=tiles if spec.tiles else None)
                nodes = {role: count_nodes(graphs / graph.path) for role, graph in spec.graphs.items()}
                told = partial(report_part, partial(report, name), i, len(parts))
                built.append(builder.build_component(graphs, folder, spec, ranges[name], nodes, told))
                platform.remove_tree(graphs)
            result[name] = ComponentSpec.joined(built)
        return result

    def can_run_reference(self, name: str, built: ComponentSpec, folder: Path) -> bool:
        """Whether the largest part of a component fits memory and disk in float32; where it does not, that is said."""
        largest = max(part.weights_bytes for part in built.parts)
        needed = int(largest * REFERENCE_GROWTH) * (1 if self.precision == "fp32" else 2)
        room = min(platform.available_memory_bytes(), platform.free_disk_bytes(folder))
        if needed > room:
            logger.warning(
                "the bundle carries no self-test of %s: its float32 reference needs %.1f GB of memory and disk of %.1f",
                name,
                needed / 1e9,
                room / 1e9,
            )
        return needed <= room

    def record_self_test(self, name: str, built: ComponentSpec, manifest: Manifest, folder: Path) -> None:
        """Runs a component's float32 graphs on the CPU, exported once more where the bundle has others; keeps what they
        answer."""
        from t2v_rt.export import wan
        from t2v_rt.runtime import self_test

        again = self.precision != "fp32"
        place = folder / "reference" if again else folder
        answers = []
        for part in built.parts:
            spec = part
            if again:
                place.mkdir()
                spec = wan.export_component(name, self.source, self.configs, place, "fp32", roles=tuple(part.graphs))
            with get_backend("onnxruntime").load(place, name, spec) as component:
                answers += self_test.run_calls(name, component, manifest.model, built)
            if again:
                platform.remove_tree(place)
        self_test.record(name, answers, folder)


def _versions(*packages: str) -> dict[str, str]:
    from importlib import metadata  # takes long to import, and only building needs it

    return {name: metadata.version(name) for name in packages}


def _precision(backend: str, given: str | None) -> str:
    from t2v_rt.export.graph import check_precision

    precision = check_precision(given or PRECISIONS.get(backend, "fp16"))
    if backend != "onnxruntime" and precision != "fp16":
        raise RequestError(f"precision is {precision!r}; backend {backend} has fused attention for fp16 only")
    return precision


def _shard_bytes(vram_budget: int | str | None) -> int:
    """What an engine of the text encoder may take of a card of that memory."""
    from t2v_rt.export.wan import SHARD_BYTES
    from t2v_rt.runtime.memory_plan import CARD_RESERVE, parse_bytes

    return SHARD_BYTES if vram_budget is None else min(SHARD_BYTES, parse_bytes(vram_budget) - CARD_RESERVE)


def _reporter(progress: Progress | None) -> Report:
    """Turns a step's name and the fraction of it that is done into how much of all is done."""

    def report(step: str, fraction: float) -> None:
        if progress is not None:
            progress(step, int(PER_STEP * (STEPS.index(step) + fraction)), PER_STEP * (len(STEPS) - 1))

    return report


def _check_request(manifest: Manifest) -> None:
    """The defaults must make a valid request and the scheduler a known one, or the bundle could not be used."""
    from t2v_rt.runtime.request import make_request
    from t2v_rt.runtime.schedulers import get_scheduler
    from t2v_rt.runtime.wan import check_size

    make_request(manifest, prompt="", seed=0)
    for profile in manifest.profiles:
        for bound in ("min", "opt", "max"):
            sizes = (profile.height, profile.width, profile.num_frames)
            check_size(manifest.model, *(int(getattr(size, bound)) for size in sizes))
    get_scheduler(str(manifest.scheduler.get("_class_name")), manifest.scheduler)


def _reusable(target: Path, manifest: Manifest) -> Bundle | None:
    """The bundle at `target` if it is intact and was made from exactly this, and plans by nobody else; else None."""
    try:
        if read_manifest(target).fingerprint != manifest.fingerprint or (manifest.profiles and not built_here(target)):
            return None
        return open_bundle(target)
    except BundleError:
        return None


def _check_disk(target: Path, weights: int) -> None:
    needed, free = int(weights * DISK_MARGIN), platform.free_disk_bytes(target.absolute().parent)
    if needed > free:
        raise RequestError(
            f"{target}: the bundle needs about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; make room first"
        )
