"""The generate command: a request from options, frames straight into the file, and a report."""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t2v_rt.engines.bundle.manifest import from_plain
from t2v_rt.errors import RequestError
from t2v_rt.runtime.array_file import check_array_path, load_arrays, save_arrays
from t2v_rt.runtime.frames import to_uint8
from t2v_rt.runtime.pipeline import StepCallback, TextToVideoPipeline
from t2v_rt.runtime.prompts.file import PromptEmbeds, load_prompt
from t2v_rt.runtime.prompts.tokenizer import check_text
from t2v_rt.runtime.run import FrameStream
from t2v_rt.runtime.schedulers import get_scheduler, scheduler_class, shift_name
from t2v_rt.runtime.video import check_output, check_png, contact_sheet, open_writer, side_files, write_png
from t2v_rt.system.outputs import check_apart
from t2v_rt.system.resources import peak_rss_bytes

Frame = NDArray[np.uint8]
Progress = Callable[[str, int, int], None]
SHEET_COLUMNS = 6
LATENTS = "latents"  # the array, and what errors call it
GUIDANCE_BATCH = {"auto": None, "on": True, "off": False}


@dataclass(frozen=True)
class VideoSize:
    """The size of the video that kept latents are of, among their settings."""

    height: int
    width: int
    num_frames: int


def generate(options: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Runs one `generate` command.

    Args:
        options: as the command line parsed them.
        progress: called as `f(stage, done, total)`.

    Returns:
        The report: output, seed, settings, hash of the frames, stage times, peak memory.

    Raises:
        T2VError: whatever is wrong with the request, the bundle or the output.
    """
    _check_options(options)
    pipe = TextToVideoPipeline.from_pretrained(
        options.engines,
        options.backend,
        options.vram_budget,
        provider=options.provider,
        threads=options.threads,
        trust=options.trust,
        prompt_cache=not options.no_prompt_cache,
        vae_tiles=options.vae_tiles,
    )
    _set_scheduler(pipe, options)
    if options.from_latents is None:
        embeds = None if options.prompt_embeds is None else load_prompt(options.prompt_embeds, pipe.manifest)
        stream = _start(pipe, options, embeds, progress)
        settings, frames = dict(stream.settings), iter(stream)
        if embeds is not None:
            settings |= {"prompt": embeds.prompt, "negative_prompt": embeds.negative_prompt}
        if options.output is None:
            return _sample_only(pipe, options, stream, settings)
    else:
        latents, settings = _read_latents(pipe, options.from_latents)
        stream = None
        frames = _decoded(pipe, latents, progress)
    fps = options.fps or pipe.manifest.defaults.fps
    metadata = {**settings, "fps": fps, "bundle_id": pipe.manifest.bundle_id}
    digest, seconds = _write(options, frames, fps, settings, metadata)
    stages = dict(stream.stage_seconds) if stream else {"encode": 0.0, "denoise": 0.0, "decode": seconds["decode"]}
    if options.save_latents and stream is not None and stream.latents is not None:
        save_arrays(options.save_latents, LATENTS, {LATENTS: stream.latents}, settings)
    return {
        "output": str(options.output),
        "frames_sha256": digest,
        **metadata,
        "stage_seconds": {**stages, "write": seconds["write"]},
        "step_calls": list(stream.step_calls) if stream else [],
        "skipped_calls": stream.skipped_calls if stream else 0,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def _check_options(options: argparse.Namespace) -> None:
    """What can be refused before the bundle is opened."""
    if [options.prompt, options.prompt_embeds, options.from_latents].count(None) != 2:
        raise RequestError("give one of PROMPT, --prompt-embeds FILE and --from-latents FILE")
    if options.prompt_embeds is not None and options.negative_prompt is not None:
        raise RequestError("--prompt-embeds has its negative prompt in the file; leave --negative-prompt out")
    if options.output is None and options.save_latents is None:
        raise RequestError("give --output FILE, or --save-latents FILE to stop after sampling")
    if options.from_latents is not None and options.save_latents is not None:
        raise RequestError("--save-latents and --from-latents exclude each other")
    if options.fps is not None and not 0 < options.fps <= 1000:
        raise RequestError(f"--fps is {options.fps}; expected more than 0 and at most 1000")
    if options.preview is not None and options.from_latents is not None:
        raise RequestError("--preview shows the steps of sampling, --from-latents has none; leave one of them out")
    check_text("PROMPT", options.prompt)
    check_text("--negative-prompt", options.negative_prompt)
    _check_outputs(options)


def _check_outputs(options: argparse.Namespace) -> None:
    """Every file that will be written can be, and is a file of its own."""
    outputs: dict[str, Path] = {}
    if options.output is not None:
        outputs["--output"] = check_output(options.output)
        for path in side_files(options.output):
            outputs["the metadata of --output"] = path
    if options.save_latents is not None:
        outputs["--save-latents"] = check_array_path(options.save_latents, LATENTS)
    if options.contact_sheet is not None:
        outputs["--contact-sheet"] = check_png(options.contact_sheet)
    if options.preview is not None:
        outputs["--preview"] = check_png(options.preview)
    inputs = {"--engines": options.engines, "--prompt-embeds": options.prompt_embeds}
    check_apart(outputs, {**inputs, "--from-latents": options.from_latents})


def _set_scheduler(pipe: TextToVideoPipeline, options: argparse.Namespace) -> None:
    config = pipe.manifest.scheduler
    name = options.scheduler or str(config["_class_name"])
    overrides: dict[str, Any] = {}
    if options.flow_shift is not None:
        key = shift_name(scheduler_class(name, config))
        if key is None:
            raise RequestError(f"scheduler {name} has no flow shift; leave --flow-shift out")
        overrides[key] = options.flow_shift
    pipe.scheduler = get_scheduler(name, config, **overrides)


def _start(
    pipe: TextToVideoPipeline, options: argparse.Namespace, embeds: PromptEmbeds | None, progress: Progress
) -> FrameStream:
    return pipe.stream(
        options.prompt,
        negative_prompt=options.negative_prompt,
        prompt_embeds=None if embeds is None else embeds.prompt_embeds,
        negative_prompt_embeds=None if embeds is None else embeds.negative_prompt_embeds,
        height=options.height,
        width=options.width,
        num_frames=options.num_frames,
        num_inference_steps=options.num_inference_steps,
        guidance_scale=options.guidance_scale,
        guidance_rescale=options.guidance_rescale,
        guidance_interval=options.guidance_interval,
        cfg_zero_star=options.cfg_zero_star,
        zero_init_steps=options.zero_init_steps,
        guidance_batch=GUIDANCE_BATCH[options.guidance_batch],
        step_cache=options.step_cache,
        timesteps=options.timesteps,
        sigmas=options.sigmas,
        seed=options.seed,
        output_type="uint8",
        progress=progress,
        callback_on_step_end=None if options.preview is None else _preview_writer(Path(options.preview)),
    )


def _preview_writer(path: Path) -> StepCallback:
    """A step callback that writes the video as it stands: one image for each latent frame, in the video's size."""

    def write(pipe: TextToVideoPipeline, step: int, t: float, tensors: dict[str, Any]) -> None:
        frames, factor = pipe.preview(tensors["latents"])[0], pipe.manifest.model.latents.spatial_factor
        write_png(path, contact_sheet(frames.repeat(factor, 1).repeat(factor, 2), SHEET_COLUMNS))

    return write


def _sample_only(
    pipe: TextToVideoPipeline, options: argparse.Namespace, stream: FrameStream, settings: dict[str, Any]
) -> dict[str, Any]:
    latents = stream.sample()
    save_arrays(options.save_latents, LATENTS, {LATENTS: latents}, settings)
    return {
        "output": str(options.save_latents),
        **settings,
        "bundle_id": pipe.manifest.bundle_id,
        "stage_seconds": dict(stream.stage_seconds),
        "step_calls": list(stream.step_calls),
        "skipped_calls": stream.skipped_calls,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def _read_latents(pipe: TextToVideoPipeline, path: str) -> tuple[NDArray[np.float32], dict[str, Any]]:
    maker = "t2v-rt generate … --save-latents"
    (latents,), settings = load_arrays(path, LATENTS, (LATENTS,), maker, dict[str, Any])
    try:
        size = from_plain(settings, VideoSize)
        same = latents.shape == pipe.manifest.model.latent_shape(1, size.height, size.width, size.num_frames)
    except ValueError:  # no size at all
        same = False
    if not same:
        raise RequestError(f"{path}: latents of shape {list(latents.shape)} are not this model's; use its own bundle")
    return latents.astype(np.float32, copy=False), settings


def _decoded(pipe: TextToVideoPipeline, latents: NDArray[np.float32], progress: Progress) -> Iterator[Frame]:
    for chunk in pipe.decode(latents, progress):
        yield from to_uint8(chunk)


def _write(
    options: argparse.Namespace,
    frames: Iterator[Frame],
    fps: float,
    settings: dict[str, Any],
    metadata: dict[str, Any],
) -> tuple[str, dict[str, float]]:
    """Frames into the file as they come; returns their hash and the seconds spent on making and on writing them."""
    digest, seconds = hashlib.sha256(), {"decode": 0.0, "write": 0.0}
    sheet: list[Frame] = []
    writer = open_writer(
        options.output,
        fps=fps,
        width=settings["width"],
        height=settings["height"],
        num_frames=settings["num_frames"],
        metadata=metadata,
    )
    with writer:
        while True:
            start = time.perf_counter()
            frame = next(frames, None)
            made = time.perf_counter()
            seconds["decode"] += made - start
            if frame is None:
                break
            digest.update(frame.tobytes())
            if options.contact_sheet is not None:
                sheet.append(frame)
            writer.write(frame)
            seconds["write"] += time.perf_counter() - made
    if sheet:
        write_png(Path(options.contact_sheet), contact_sheet(np.stack(sheet), SHEET_COLUMNS))
    return digest.hexdigest(), seconds
