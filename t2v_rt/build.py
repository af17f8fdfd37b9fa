"""`build_engines`: from a checkpoint to a bundle, the command as a call."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from t2v_rt.engines import platform
from t2v_rt.engines.backends import check_backend, get_backend
from t2v_rt.engines.bundle import Bundle, new_bundle, open_bundle, read_manifest, write_manifest
from t2v_rt.engines.manifest import SCHEMA_VERSION, ComponentSpec, Defaults, Manifest, ModelSpec
from t2v_rt.errors import BundleError, InputError, RequestError

logger = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]
STEPS = ("text_encoder", "transformer", "vae_decoder", "self_test", "hash", "done")
REFERENCE_GROWTH = 2.5  # half weights become float32, and ONNX Runtime packs the largest matrices once more
DISK_MARGIN = 1.1  # of the weights' bytes: graphs and padding come on top


def build_engines(
    checkpoint: str | Path,
    output: str | Path,
    *,
    backend: str = "onnxruntime",
    precision: str = "fp32",
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Exports a checkpoint in diffusers layout and builds its engines.

    The bundle is written under a temporary name and renamed: it is there whole or not at all. An existing bundle is
    reused when everything that went into it is unchanged.

    Args:
        checkpoint: folder with `model_index.json` and a folder per component; safetensors only.
        output: folder of the bundle.
        backend: `onnxruntime`.
        precision: of matmul and convolution operands: `fp32` or `fp16`.
        height: default height of requests, instead of the checkpoint's.
        width: default width, likewise.
        num_frames: default number of frames, likewise.
        force: build even where an existing bundle could be reused.
        progress: called as `f(step, done, total)`.

    Returns:
        The opened bundle.

    Raises:
        CheckpointError: the checkpoint is incomplete, damaged, pickled or of an unsupported architecture.
        BundleError: something other than a bundle is at `output`.
        BackendError: the backend is unknown or not available.
        RequestError: a setting is invalid, or the output folder or disk cannot take the bundle.
    """
    check_backend(backend)
    try:
        from t2v_rt.export import wan
        from t2v_rt.export.checkpoint import open_checkpoint
        from t2v_rt.export.graph import check_precision
    except ImportError as exc:
        raise InputError(f"building engines needs the package {exc.name!r}; install t2v-rt[build]") from exc
    chosen, target = check_precision(precision), Path(output)
    platform.check_writable_parent(target)
    source = open_checkpoint(checkpoint)
    configs = wan.read_configs(source)
    defaults = _defaults(wan.read_defaults(source.generation), height, width, num_frames)
    manifest = Manifest(
        backend=backend,
        precision=precision,
        fingerprint=_fingerprint(source.digest(), backend, precision, defaults),
        builder=_versions("t2v-rt", "onnx"),
        model=wan.model_spec(configs),
        scheduler=source.scheduler,
        defaults=defaults,
        components={},
    )
    _check_request(manifest)
    if not force and (existing := _reusable(target, manifest.fingerprint)) is not None:
        return existing
    stored = sum(file.stat().st_size for w in source.weights.values() for file in w.files)
    _check_disk(target, stored)
    report = _reporter(progress)
    with new_bundle(target) as folder:
        components = wan.export_components(source, configs, folder, chosen, report)
        report("self_test")
        if _can_run_reference(folder, stored):
            _record_self_test(
                folder,
                manifest.model,
                components,
                lambda place: wan.export_components(source, configs, place, "fp32", lambda name: None),
            )
        (folder / "tokenizer").mkdir()
        shutil.copyfile(source.tokenizer, folder / "tokenizer" / "tokenizer.json")
        report("hash")
        write_manifest(folder, manifest.with_components(components))
    report("done")
    return open_bundle(target)


def _can_run_reference(folder: Path, stored: int) -> bool:
    """Whether the whole model fits memory and disk once more in float32; where it does not, that is said."""
    needed = int(stored * REFERENCE_GROWTH)
    room = min(platform.available_memory_bytes(), platform.free_disk_bytes(folder))
    if needed > room:
        logger.warning(
            "the bundle carries no self-test: its float32 reference needs %.1f GB of memory and disk, %.1f GB are free",
            needed / 1e9,
            room / 1e9,
        )
    return needed <= room


def _record_self_test(
    folder: Path,
    model: ModelSpec,
    components: Mapping[str, ComponentSpec],
    export_reference: Callable[[Path], Mapping[str, ComponentSpec]],
) -> None:
    """Runs the float32 graphs on the CPU, exported once more where the bundle has others, and keeps their answers."""
    from t2v_rt.runtime import self_test

    place, reference = folder, components
    if any(spec.precision != "fp32" for spec in components.values()):
        place = folder / "reference"
        place.mkdir()
        reference = export_reference(place)
    backend = get_backend("onnxruntime")
    try:
        for name, spec in reference.items():
            with backend.load(place, name, spec) as component:
                self_test.record(name, component, model, folder)
    finally:
        if place != folder:
            platform.remove_tree(place)


def _reporter(progress: Progress | None) -> Callable[[str], None]:
    """Turns the name of a step into how many are done."""

    def report(step: str) -> None:
        if progress is not None:
            progress(step, STEPS.index(step), len(STEPS) - 1)

    return report


def _defaults(base: Defaults, height: int | None, width: int | None, num_frames: int | None) -> Defaults:
    sizes = {"height": height, "width": width, "num_frames": num_frames}
    given = {name: value for name, value in sizes.items() if value is not None}
    return Defaults(**{**vars(base), **given})


def _check_request(manifest: Manifest) -> None:
    """The defaults must make a valid request and the scheduler a known one, or the bundle could not be used."""
    from t2v_rt.runtime.request import make_request
    from t2v_rt.runtime.schedulers import get_scheduler

    make_request(manifest, prompt="", seed=0)
    get_scheduler(str(manifest.scheduler.get("_class_name")), manifest.scheduler)


def _versions(*packages: str) -> dict[str, str]:
    from importlib import metadata  # takes long to import, and only building needs it

    return {name: metadata.version(name) for name in packages}


def _fingerprint(checkpoint: str, backend: str, precision: str, defaults: Defaults) -> str:
    """A hash of all that goes into a bundle: weights and configs, settings, and the code that writes the graphs."""
    import t2v_rt.export
    from t2v_rt.runtime import self_test

    code = hashlib.sha256()
    for file in (*sorted(Path(t2v_rt.export.__path__[0]).glob("*.py")), Path(self_test.__file__)):
        code.update(file.read_bytes())
    content = {
        "schema": SCHEMA_VERSION,
        "checkpoint": checkpoint,
        "backend": backend,
        "precision": precision,
        "defaults": vars(defaults),
        "export": code.hexdigest(),
        "versions": _versions("t2v-rt", "onnx", "onnxruntime"),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _reusable(target: Path, fingerprint: str) -> Bundle | None:
    """The bundle at `target` if it is intact and was made from exactly this, else None."""
    try:
        return open_bundle(target) if read_manifest(target).fingerprint == fingerprint else None
    except BundleError:
        return None


def _check_disk(target: Path, weights: int) -> None:
    needed, free = int(weights * DISK_MARGIN), platform.free_disk_bytes(target.absolute().parent)
    if needed > free:
        raise RequestError(
            f"{target}: the bundle needs about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; make room first"
        )
