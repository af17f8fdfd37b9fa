"""`build_engines`: from a checkpoint to a bundle, the command as a call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from t2v_rt.build.needs import estimate_needs
from t2v_rt.build.work_folder import Work, open_work
from t2v_rt.engines.backends import backend_info, check_backend
from t2v_rt.engines.bundle.manifest import ComponentSpec, EmbeddingSpec, Manifest, from_plain
from t2v_rt.engines.bundle.profiles import Sizes
from t2v_rt.engines.bundle.store import Bundle, Stamps, check_bundle_place, open_bundle, read_manifest, write_manifest
from t2v_rt.engines.bundle.trust import built_here, remember_built
from t2v_rt.engines.tensorrt.library import check_targets
from t2v_rt.errors import BundleError, InputError, RequestError
from t2v_rt.progress import Shares, Tell
from t2v_rt.system.outputs import check_apart

if TYPE_CHECKING:
    from t2v_rt.build.job import BuildJob, Part
    from t2v_rt.export.checkpoint import Checkpoint


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
    force: bool = False,
    progress: Tell | None = None,
) -> Bundle:
    """Exports a checkpoint and builds its engines.

    The bundle is written under a temporary name and renamed: it is there whole or not at all. An existing bundle is
    reused when everything that went into it is unchanged; so are the finished parts of a build that was ended.

    Args:
        checkpoint: folder in diffusers layout, with `model_index.json` and a folder per component, safetensors only;
            or `owner/name` on the Hugging Face hub; or folder with a single safetensors file for each network, in Wan's
            own names; None where `files` has everything.
        output: folder of the bundle.
        files: `transformer`, `vae`, `text_encoder` (single safetensors files) and `tokenizer` (`tokenizer.json`) that
            take the place of the checkpoint's own.
        revision: of a checkpoint on the hub: branch, tag or commit.
        backend: `onnxruntime`, `tensorrt-rtx` (builds plans for named GPUs, needs none) or `tensorrt` (builds plans for
            the GPU it runs on).
        precision: of matmul and convolution operands: `fp32` or `fp16`, of plans `fp16` or `bf16` (denoiser and text
            encoder; not for sm75); None for the backend's own, `fp16` for plans.
        height: default height of requests in pixels, instead of the checkpoint's. Plans are built for it; for them it
            may be a range or several sizes, see `engines.plans.parse_profiles`.
        width: default width, likewise.
        num_frames: default number of frames, likewise.
        gpus: that TensorRT-RTX builds for, such as "sm86,sm89"; None for all from sm80 on.
        vram_budget: memory of the smallest card it is for, bytes or text such as `4GiB`: the text encoder comes in
            engines of which one at a time fits there; None for engines of 3 GB at most, which suits most cards.
        with_text_encoder: whether the bundle gets its text encoder; without it, videos are made from prompt embeddings
            (`t2v-rt encode`).
        text_encoder_weights: `int8` or `int4` stores its matrices so, and measures what that costs; None for neither.
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
    target = Path(output)
    inputs = {"the checkpoint": checkpoint, **dict(files or {})}
    check_apart({"the output": check_bundle_place(output)}, inputs)
    sizes = (height, width, num_frames)
    job, manifest = BuildRequest(
        checkpoint,
        files,
        revision,
        backend,
        precision,
        sizes,
        gpus,
        vram_budget,
        with_text_encoder,
        text_encoder_weights,
    ).prepare()
    if not force and (existing := _reusable(target, manifest)) is not None:
        return existing
    with open_work(target, manifest.fingerprint, fresh=force) as work:
        parts = job.parts(manifest)
        outline = job.outline(parts)
        needs = estimate_needs(job, outline)
        needs.check(target, work.finished_bytes)
        told = Shares(progress, [(part.name, spec.weights_bytes) for part, spec in zip(parts, outline, strict=True)])
        written = _build(job, parts, manifest, work, told)
    if backend_info(backend).native_code:
        remember_built(target)
    _remember_hashes(target, written)
    told("done")
    return open_bundle(target)


@dataclass(frozen=True)
class BuildRequest:
    """What is asked of a build; the fields are `build_engines`' arguments.

    Args:
        sizes: height, width and number of frames.
        estimate: whether it will not be built, so that nothing is downloaded and weights are not hashed.
    """

    checkpoint: str | Path | None
    files: Mapping[str, str | Path] | None = None
    revision: str | None = None
    backend: str = "onnxruntime"
    precision: str | None = None
    sizes: tuple[Sizes, Sizes, Sizes] = (None, None, None)
    gpus: str | Sequence[str] | None = None
    vram_budget: int | str | None = None
    with_text_encoder: bool = True
    text_encoder_weights: str | None = None
    estimate: bool = False

    def prepare(self) -> tuple[BuildJob, Manifest]:
        """Opens the checkpoint and checks all settings; raises as `build_engines`.

        Returns:
            The build, and the bundle's manifest but for its components.
        """
        check_backend(self.backend)
        targets = check_targets(self.backend, self.gpus)
        try:
            from t2v_rt.build.job import BuildJob
            from t2v_rt.export.wan import family as wan
        except ImportError as exc:
            raise InputError(f"building engines needs the package {exc.name!r}; install t2v-rt[build]") from exc
        precision = _precision(self.backend, self.precision)
        shard_bytes = _shard_bytes(self.vram_budget)
        with_encoder, weights = self.with_text_encoder, self.text_encoder_weights or ""
        job = BuildJob(self._open(), self.backend, precision, targets, shard_bytes, with_encoder, weights)
        wan.check_tokenizer(job.source, job.configs)
        manifest = job.manifest(self.sizes, estimate=self.estimate)
        _check_request(manifest)
        return job, manifest

    def _open(self) -> Checkpoint:
        from t2v_rt.export.checkpoint import open_checkpoint
        from t2v_rt.export.hub import fetch, is_hub_name

        place = self.checkpoint
        if place is not None and is_hub_name(place):
            place = fetch(str(place), self.revision, download=not self.estimate)
        elif self.revision is not None:
            raise RequestError(f"a revision is given, and {place} is not owner/name on the hub; leave it out")
        return open_checkpoint(place, self.files)


def _build(job: BuildJob, parts: Sequence[Part], manifest: Manifest, work: Work, told: Shares) -> Manifest:
    """Makes all parts that are not finished, and the manifest.

    A component is tested before the next one is built: its reference lies on the disk beside what there is by then.
    """
    components = {}
    for name in dict.fromkeys(part.component for part in parts):
        specs = []
        for part in (part for part in parts if part.component == name):
            told(part.name)
            made = work.part(part.name, partial(job.build_part, part, work, partial(told, part.name)))
            specs.append(from_plain(made, ComponentSpec))
        components[name] = ComponentSpec.joined(specs)
        told(f"self_test.{name}")
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
    told("hash")
    return write_manifest(work.bundle, manifest.with_components(components), work.files)


def _remember_hashes(target: Path, manifest: Manifest) -> None:
    """Spares the first opening the hashing of what was hashed while it was written."""
    stamps = Stamps(target)
    for path, entry in manifest.files.items():
        stamps.note(path, entry.sha256)
    stamps.save()


def _precision(backend: str, given: str | None) -> str:
    from t2v_rt.export.graph import check_precision

    info = backend_info(backend)
    precision = check_precision(given or info.precisions[0])
    if precision not in info.precisions:
        known = " or ".join(info.precisions)
        raise RequestError(f"precision is {precision!r}; backend {backend} takes {known}: {info.why_precisions}")
    return precision


def _shard_bytes(vram_budget: int | str | None) -> int:
    """What an engine of the text encoder may take of a card of that memory."""
    from t2v_rt.export.wan.family import SHARD_BYTES
    from t2v_rt.runtime.memory.plan import CARD_RESERVE, parse_bytes

    return SHARD_BYTES if vram_budget is None else min(SHARD_BYTES, parse_bytes(vram_budget) - CARD_RESERVE)


def _check_request(manifest: Manifest) -> None:
    """The defaults must make a valid request and the scheduler a known one, or the bundle could not be used."""
    from t2v_rt.runtime.request import make_request
    from t2v_rt.runtime.schedulers import get_scheduler

    make_request(manifest, prompt="", seed=0)
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
