"""`build_engines`: from a checkpoint to a bundle, the command as a call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from t2v_rt.build.needs import estimate_needs
from t2v_rt.build.options import BuildOptions
from t2v_rt.build.shares import Progress, Shares
from t2v_rt.build.work_folder import WorkFolder, open_work_folder
from t2v_rt.engines.backend_info import backend_info
from t2v_rt.engines.bundle.manifest import ComponentSpec, EmbeddingSpec, Manifest, from_plain
from t2v_rt.engines.bundle.profiles import Sizes
from t2v_rt.engines.bundle.store import Bundle, Stamps, check_bundle_place, open_bundle, read_manifest, write_manifest
from t2v_rt.engines.bundle.trust import built_here, remember_built
from t2v_rt.errors import BundleError, InputError, RequestError
from t2v_rt.options import documented_by
from t2v_rt.system.outputs import check_apart

if TYPE_CHECKING:
    from t2v_rt.build.job import BuildJob
    from t2v_rt.build.units import Unit
    from t2v_rt.export.checkpoint import Checkpoint


@documented_by(BuildOptions)
def build_engines(
    checkpoint: str | Path | None,
    output: str | Path,
    *,
    files: Mapping[str, str | Path] | None = None,
    revision: str | None = None,
    backend: str = "onnxruntime",
    precision: str | None = None,
    height: Sizes = None,
    width: Sizes = None,
    num_frames: Sizes = None,
    gpus: str | Sequence[str] | None = None,
    vram_budget: int | str | None = None,
    with_text_encoder: bool = True,
    text_encoder_weights: str | None = None,
    attention_accumulation: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Exports a checkpoint and builds its engines.

    The bundle is written under a temporary name and renamed: it is there whole or not at all. An existing bundle is
    reused when everything that went into it is unchanged; so are the finished parts of a build that was ended.

    Args:
        output: folder of the bundle.
        force: build anew even where an existing bundle, or parts of one, could be reused.
        progress: called as `f(step, done, total)`.

    Returns:
        The opened bundle.

    Raises:
        CheckpointError: the checkpoint is incomplete, damaged, pickled or of an unsupported architecture, or cannot be
            had from the hub.
        BundleError: something other than a bundle is at `output`, or something beside its files.
        BackendError: the backend is unknown or not available, or a GPU is.
        RequestError: a setting is invalid, the output folder, disk or memory cannot take the build, or another process
            builds the same output.
        EngineError: a plan cannot be built.
    """
    options = BuildOptions(
        checkpoint,
        files=files,
        revision=revision,
        backend=backend,
        precision=precision,
        height=height,
        width=width,
        num_frames=num_frames,
        gpus=gpus,
        vram_budget=vram_budget,
        with_text_encoder=with_text_encoder,
        text_encoder_weights=text_encoder_weights,
        attention_accumulation=attention_accumulation,
    )
    return build(options, output, force=force, progress=progress)


def build(
    options: BuildOptions, output: str | Path, *, force: bool = False, progress: Progress | None = None
) -> Bundle:
    """Builds what the options ask for; see `build_engines`.

    Args:
        options: all that decides what is in the bundle.
        output: folder of the bundle.
        force: build anew even where an existing bundle, or parts of one, could be reused.
        progress: called as `f(step, done, total)`.
    """
    target = Path(output)
    check_apart(
        {"the output": check_bundle_place(output)}, {"the checkpoint": options.checkpoint, **(options.files or {})}
    )
    job, manifest = prepare(options)
    if not force and (existing := _reusable(target, manifest)) is not None:
        return existing
    with open_work_folder(target, manifest.fingerprint, fresh=force) as work:
        units = job.units(manifest)
        outline = job.outline(units)
        needs = estimate_needs(job, outline)
        needs.check(target, work.finished_bytes)
        shares = Shares(progress, [(unit.name, spec.weights_bytes) for unit, spec in zip(units, outline, strict=True)])
        written = _build(job, units, manifest, work, shares)
    if backend_info(options.backend).native_code:
        remember_built(target)
    _remember_hashes(target, written)
    shares("done")
    return open_bundle(target)


def prepare(options: BuildOptions, *, estimate: bool = False) -> tuple[BuildJob, Manifest]:
    """Opens the checkpoint and checks the options against it.

    Args:
        options: what is asked for.
        estimate: whether it will not be built, so that nothing is downloaded and weights are not hashed.

    Returns:
        The build, and the bundle's manifest but for its components.

    Raises:
        InputError: the checkpoint cannot be exported, or an option does not suit it; `build_engines` tells the kinds.
    """
    try:
        from t2v_rt.build.job import BuildJob
        from t2v_rt.export.components import check_tokenizer
    except ImportError as exc:
        raise InputError(f"building engines needs the package {exc.name!r}; install t2v-rt[build]") from exc
    precision = _precision(options.backend, options.precision)
    shard_bytes = _shard_bytes(options.vram_budget)
    job = BuildJob(source=_open(options, estimate), options=options, precision=precision, shard_bytes=shard_bytes)
    check_tokenizer(job.source, job.configs)
    manifest = job.manifest(estimate=estimate)
    _check_request(manifest)
    return job, manifest


def _open(options: BuildOptions, estimate: bool) -> Checkpoint:
    from t2v_rt.export.checkpoint import open_checkpoint
    from t2v_rt.export.hub import fetch, is_hub_name

    place = options.checkpoint
    if place is not None and is_hub_name(place):
        place = fetch(str(place), options.revision, download=not estimate)
    elif options.revision is not None:
        raise RequestError(f"a revision is given, and {place} is not owner/name on the hub; leave it out")
    return open_checkpoint(place, options.files)


def _build(job: BuildJob, units: Sequence[Unit], manifest: Manifest, work: WorkFolder, shares: Shares) -> Manifest:
    """Makes all units and other parts that are not finished, and the manifest.

    A component is tested before the next one is built: its reference lies on the disk beside what there is by then.
    """
    components = {}
    for name in dict.fromkeys(unit.component for unit in units):
        specs = []
        for unit in (unit for unit in units if unit.component == name):
            shares(unit.name)
            made = work.part(unit.name, partial(job.build_unit, unit, work, partial(shares, unit.name)))
            specs.append(from_plain(made, ComponentSpec))
        components[name] = ComponentSpec.joined(specs)
        shares(f"self_test.{name}")
        if job.can_run_reference(name, components[name], work.bundle):
            arguments = (name, components[name], manifest, work)
            work.part(f"self_test.{name}", partial(job.record_self_test, *arguments))
            if components[name].weights:
                cost = work.part(f"weights.{name}", partial(job.measure_weights, *arguments))
                components[name] = replace(components[name], weights_error=cost["error"])
    if job.with_text_encoder:
        embedding = EmbeddingSpec(**work.part("embedding", partial(job.copy_embedding, work)))
        components["text_encoder"] = replace(components["text_encoder"], embedding=embedding)
    work.part("tokenizer", partial(job.copy_tokenizer, work))
    shares("hash")
    return write_manifest(work.bundle, manifest.with_components(components), work.files)


def _remember_hashes(target: Path, manifest: Manifest) -> None:
    """Spares the first opening the hashing of what was hashed while it was written."""
    stamps = Stamps(target)
    for path, entry in manifest.files.items():
        stamps.note(path, entry.sha256)
    stamps.save()


def _precision(backend: str, given: str | None) -> str:
    from t2v_rt.export.precision import check_precision

    info = backend_info(backend)
    precision = check_precision(given or info.precisions[0])
    if precision not in info.precisions:
        known = " or ".join(info.precisions)
        raise RequestError(f"precision is {precision!r}; backend {backend} takes {known}: {info.why_precisions}")
    return precision


def _shard_bytes(vram_budget: int | str | None) -> int:
    """What an engine of the text encoder may take of a card of that memory."""
    from t2v_rt.export.family import SHARD_BYTES
    from t2v_rt.runtime.memory.plan import CARD_RESERVE, parse_bytes

    return SHARD_BYTES if vram_budget is None else min(SHARD_BYTES, parse_bytes(vram_budget) - CARD_RESERVE)


def _check_request(manifest: Manifest) -> None:
    """The defaults must make a valid request and the scheduler a known one, or the bundle could not be used."""
    from t2v_rt.runtime.options import CallOptions
    from t2v_rt.runtime.request import make_request
    from t2v_rt.runtime.schedulers import get_scheduler

    make_request(manifest, CallOptions(prompt="", seed=0))
    for profile in manifest.profiles:
        for bound in ("min", "opt", "max"):
            sizes = (profile.height, profile.width, profile.num_frames)
            manifest.model.check_size(*(int(getattr(size, bound)) for size in sizes))
    get_scheduler(str(manifest.scheduler.get("_class_name")), manifest.scheduler)


def _reusable(target: Path, manifest: Manifest) -> Bundle | None:
    """The bundle at `target` if it is intact and was made from exactly this, native code by nobody else; else None."""
    native = backend_info(manifest.backend).native_code
    try:
        if read_manifest(target).fingerprint != manifest.fingerprint or (native and not built_here(target)):
            return None
        return open_bundle(target)
    except BundleError:
        return None
