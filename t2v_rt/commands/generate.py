"""The generate command: a request from options, frames straight into the file, and a report.

A program calls it as `generate(GenerateOptions(prompt="a red ball", engines="build/demo", output="ball.mp4"))`.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t2v_rt.commands.bars import Bars
from t2v_rt.commands.parsing import declare_options, given_options
from t2v_rt.commands.previews import SHEET_COLUMNS, preview_writer
from t2v_rt.engines.bundle.manifest import Manifest, from_plain
from t2v_rt.errors import RequestError
from t2v_rt.numbers import as_number
from t2v_rt.options import option
from t2v_rt.runtime.array_file import check_array_path, load_arrays, save_arrays
from t2v_rt.runtime.frames import to_uint8
from t2v_rt.runtime.options import BackendOptions, CallOptions, call_settings, digest_name
from t2v_rt.runtime.pipeline import TextToVideoPipeline
from t2v_rt.runtime.prompts.file import PromptEmbeds, load_prompt
from t2v_rt.runtime.prompts.tokenizer import check_text
from t2v_rt.runtime.request import NO_ARRAYS, CallArrays
from t2v_rt.runtime.run import CallHooks, FrameStream
from t2v_rt.runtime.schedulers import get_scheduler, scheduler_class, shift_name
from t2v_rt.runtime.schedulers.base import Scheduler
from t2v_rt.runtime.video import (
    check_output,
    check_png,
    contact_sheet,
    open_writer,
    read_metadata,
    side_files,
    write_png,
)
from t2v_rt.system.outputs import check_apart
from t2v_rt.system.resources import peak_rss_bytes

Frame = NDArray[np.uint8]
Progress = Callable[[str, int, int], None]
LATENTS = "latents"  # the array, and what errors call it
FILE_SETTINGS = ("fps", "bundle_id")  # what metadata holds beside a request's settings
STEPS = frozenset(("num_inference_steps", "timesteps", "sigmas"))  # each says how many there are: one replaces all
SHIFTS = ("flow_shift", "shift")  # what configs call it
EXAMPLE = 'example: t2v-rt generate "a red ball bouncing" --engines build/demo --output ball.mp4 --seed 7'


@dataclass(frozen=True)
class VideoSize:
    """The size of the video that kept latents are of, among their settings."""

    height: int
    width: int
    num_frames: int


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(CallOptions, BackendOptions):
    """What is asked of the command: a call's options, where its engines run, and the files it reads and writes.

    Args:
        engines: folder that build-engines wrote.
        output: video file that is written: .mp4, .webm, .gif, .npy, or a name without extension for a folder of png.
        fps: frames per second of the file; the bundle's default where it is left out.
        scheduler: short name or class name of the sampler, such as unipc or euler; the checkpoint's own where it is
            left out.
        flow_shift: shift of the noise schedule; the scheduler's own where it is left out.
        prompt_embeds: file of a prompt and a negative prompt that `t2v-rt encode` wrote, instead of both texts.
        prompt_cache: whether embeddings are looked up and kept in the user's cache.
        vram_budget: memory the engines may take, such as `8GiB`; what the card has free where it is left out.
        vae_tiles: tiles of the VAE decoder, such as `2x3`; as few as fit where it is left out.
        contact_sheet: png file that all frames are written to as well, side by side.
        preview: png file that is written anew after each step.
        save_latents: .npz file that keeps what was sampled; without an output, the work stops there.
        from_latents: .npz file that `t2v-rt generate --save-latents` wrote; it is decoded, and no prompt is given.
        scheduler_config: saved config of the sampler, instead of the bundle's.
        bundle_id: id of the only bundle that will do; any where it is left out.

    Raises:
        RequestError: an option is invalid by itself, or two of them contradict each other.
    """

    engines: str | Path = option(metavar="BUNDLE")
    output: str | Path | None = option(None, metavar="FILE")
    output_type: str = "uint8"  # what a file takes
    fps: float | None = option(None, read=float, metavar="RATE")
    scheduler: str | None = option(None, metavar="NAME")
    flow_shift: float | None = option(None, read=float, metavar="SHIFT")
    prompt_embeds: str | Path | None = option(None, metavar="FILE")
    prompt_cache: bool = option(
        True, flag="--no-prompt-cache", help="neither look up nor keep embeddings in the user's cache"
    )
    vram_budget: int | str | None = option(None, metavar="SIZE")
    vae_tiles: str | None = option(None, metavar="RxC")
    contact_sheet: str | Path | None = option(None, metavar="FILE")
    preview: str | Path | None = option(None, metavar="FILE")
    save_latents: str | Path | None = option(None, metavar="FILE")
    from_latents: str | Path | None = option(None, metavar="FILE")
    scheduler_config: Mapping[str, Any] | None = None
    bundle_id: str | None = None

    def __post_init__(self) -> None:
        if [self.prompt, self.prompt_embeds, self.from_latents].count(None) != 2:
            raise RequestError("give one of PROMPT, --prompt-embeds FILE and --from-latents FILE")
        if self.prompt_embeds is not None and self.negative_prompt is not None:
            raise RequestError("--prompt-embeds has its negative prompt in the file; leave --negative-prompt out")
        if self.output is None and self.save_latents is None:
            raise RequestError("give --output FILE, or --save-latents FILE to stop after sampling")
        if self.from_latents is not None and self.save_latents is not None:
            raise RequestError("--save-latents and --from-latents exclude each other")
        fps = None if self.fps is None else as_number(self.fps)
        if self.fps is not None and (fps is None or not 0 < fps <= 1000):
            raise RequestError(f"--fps is {self.fps}; expected more than 0 and at most 1000")
        if self.preview is not None and self.from_latents is not None:
            raise RequestError("--preview shows the steps of sampling, --from-latents has none; leave one of them out")
        if self.output_type != "uint8":
            raise RequestError(f"output_type is {self.output_type!r}; a file takes 'uint8', leave it out")
        for name, text in (("PROMPT", self.prompt), ("--negative-prompt", self.negative_prompt)):
            if isinstance(text, str):
                check_text(name, text)
        super().__post_init__()

    def outputs(self) -> dict[str, Path]:
        """Every file that will be written, by what it is called; raises RequestError for one that cannot be."""
        outputs: dict[str, Path] = {}
        if self.output is not None:
            outputs["--output"] = check_output(self.output)
            for path in side_files(self.output):
                outputs["the metadata of --output"] = path
        if self.save_latents is not None:
            outputs["--save-latents"] = check_array_path(self.save_latents, LATENTS)
        if self.contact_sheet is not None:
            outputs["--contact-sheet"] = check_png(self.contact_sheet)
        if self.preview is not None:
            outputs["--preview"] = check_png(self.preview)
        return outputs


def declare(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.epilog = EXAMPLE
    declare_options(parser, GenerateOptions)
    parser.add_argument(
        "--repeat",
        metavar="VIDEO",
        help="make a video that t2v-rt wrote once more, with the settings in its metadata; options that are given as "
        "well replace them",
    )


def run(parsed: argparse.Namespace) -> dict[str, Any]:
    """Makes the video; returns the report."""
    given = given_options(GenerateOptions, parsed)
    if parsed.repeat is None:
        options = GenerateOptions(**given)
    else:
        options = repeated(parsed.repeat, given)
        check_apart(options.outputs(), {"--repeat": parsed.repeat})
    with Bars() as bars:
        return generate(options, bars.update)


def describe(report: Mapping[str, Any]) -> list[str]:
    """The report for a person."""
    return [
        f"output   {report['output']}",
        f"seed     {report['seed']}",
        "seconds  " + "  ".join(f"{stage} {value:.2f}" for stage, value in report["stage_seconds"].items()),
        f"memory   {report['peak_rss_bytes'] / 1e6:.0f} MB at most",
    ]


def generate(options: GenerateOptions, progress: Progress | None = None) -> dict[str, Any]:
    """Makes a video file.

    Args:
        options: what is asked for.
        progress: called as `f(stage, done, total)`.

    Returns:
        The report: output, seed, settings, hash of the frames, stage times, peak memory.

    Raises:
        T2VError: whatever is wrong with the request, the bundle or the output.
    """
    inputs = {"--engines": options.engines, "--prompt-embeds": options.prompt_embeds}
    check_apart(options.outputs(), {**inputs, "--from-latents": options.from_latents})
    pipe = TextToVideoPipeline.from_pretrained(
        options.engines,
        options.backend,
        options.vram_budget,
        provider=options.provider,
        threads=options.threads,
        device=options.device,
        trust=options.trust,
        prompt_cache=options.prompt_cache,
        vae_tiles=options.vae_tiles,
    )
    _check_bundle(pipe.manifest, options)
    pipe.scheduler = _scheduler(pipe.manifest.scheduler, options)
    if options.from_latents is None:
        embeds = None if options.prompt_embeds is None else load_prompt(options.prompt_embeds, pipe.manifest)
        stream = _start(pipe, options, embeds, progress)
        settings, frames = dict(stream.settings), iter(stream)
        if embeds is not None:
            settings |= {"prompt": embeds.prompt, "negative_prompt": embeds.negative_prompt}
        if options.output is None:
            assert options.save_latents is not None  # as the options' own checks say
            return _sample_only(pipe, options.save_latents, stream, settings)
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


def repeated(video: str | Path, changes: Mapping[str, Any]) -> GenerateOptions:
    """The options that a video was made with, which make the same bytes again.

    Args:
        video: that t2v-rt wrote, with its metadata in it or in the file beside it.
        changes: options that take the place of the video's own; `engines` and an output among them.

    Returns:
        All options; `bundle_id` is that of the video's bundle.

    Raises:
        RequestError: the video has no metadata of t2v-rt, it was made from what metadata does not hold, or an option is
            invalid.
    """
    if changes.get("from_latents") is not None:
        raise RequestError("--repeat samples anew, --from-latents does not sample; leave one of them out")
    recorded = read_metadata(video)
    try:
        own = {name: recorded[name] for name in FILE_SETTINGS}
        values = call_settings({name: recorded[name] for name in recorded.keys() - own.keys()})
        CallOptions(**values)  # refuses what is no setting, before others take its place
    except KeyError as exc:
        raise RequestError(f"{video}: its metadata has no {exc.args[0]}; expected a video of t2v-rt generate") from exc
    except RequestError as exc:
        raise RequestError(f"{video}: {exc}") from exc
    if changes.get("prompt_embeds") is not None:
        values |= {"prompt": None, "negative_prompt": None}
    elif {"prompt", "negative_prompt"} & {name for name in values.keys() - changes.keys() if values[name] is None}:
        raise RequestError(
            f"{video} was made from prompt embeddings; give the same --prompt-embeds FILE, or PROMPT and "
            "--negative-prompt"
        )
    if digest_name("latents") in recorded or (values["seed"] == [] and "seed" not in changes):
        raise RequestError(
            f"{video} was made from given noise, which its metadata does not hold; it cannot be repeated"
        )
    if STEPS & changes.keys():
        values |= dict.fromkeys(STEPS)
    return GenerateOptions(**{**values, **own, "scheduler_config": recorded["scheduler"], **changes})


def _check_bundle(manifest: Manifest, options: GenerateOptions) -> None:
    if options.bundle_id not in (None, manifest.bundle_id):
        raise RequestError(
            f"{options.engines} is the bundle {manifest.bundle_id}, and the video to repeat was made by "
            f"{options.bundle_id}; give that one for --engines"
        )


def _scheduler(config: Mapping[str, Any], options: GenerateOptions) -> Scheduler[Any]:
    """The sampler that is asked for; a new one takes the flow shift of the config that it replaces.

    Args:
        config: the bundle's.
        options: whose config takes its place.
    """
    saved = options.scheduler_config
    if saved is not None and options.scheduler is None:
        config = saved
    elif saved is not None and (key := next((key for key in SHIFTS if key in saved), None)):
        config = {**{name: value for name, value in config.items() if name not in SHIFTS}, key: saved[key]}
    name = options.scheduler or str(config["_class_name"])
    overrides: dict[str, Any] = {}
    if options.flow_shift is not None:
        key = shift_name(scheduler_class(name, config))
        if key is None:
            raise RequestError(f"scheduler {name} has no flow shift; leave --flow-shift out")
        overrides[key] = options.flow_shift
    return get_scheduler(name, config, **overrides)


def _start(
    pipe: TextToVideoPipeline, options: GenerateOptions, embeds: PromptEmbeds | None, progress: Progress | None
) -> FrameStream:
    arrays = NO_ARRAYS
    if embeds is not None:
        arrays = CallArrays(prompt_embeds=embeds.prompt_embeds, negative_prompt_embeds=embeds.negative_prompt_embeds)
    callback = None if options.preview is None else preview_writer(Path(options.preview))
    return pipe.open_stream(options, arrays, CallHooks(callback, progress=progress, previews=callback is not None))


def _sample_only(
    pipe: TextToVideoPipeline, path: str | Path, stream: FrameStream, settings: dict[str, Any]
) -> dict[str, Any]:
    latents = stream.sample()
    save_arrays(path, LATENTS, {LATENTS: latents}, settings)
    return {
        "output": str(path),
        **settings,
        "bundle_id": pipe.manifest.bundle_id,
        "stage_seconds": dict(stream.stage_seconds),
        "step_calls": list(stream.step_calls),
        "skipped_calls": stream.skipped_calls,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def _read_latents(pipe: TextToVideoPipeline, path: str | Path) -> tuple[NDArray[np.float32], dict[str, Any]]:
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


def _decoded(pipe: TextToVideoPipeline, latents: NDArray[np.float32], progress: Progress | None) -> Iterator[Frame]:
    for chunk in pipe.decode(latents, progress):
        yield from to_uint8(chunk)


def _write(
    options: GenerateOptions,
    frames: Iterator[Frame],
    fps: float,
    settings: dict[str, Any],
    metadata: dict[str, Any],
) -> tuple[str, dict[str, float]]:
    """Frames into the file as they come; returns their hash and the seconds spent on making and on writing them."""
    assert options.output is not None  # as the options' own checks say
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
    if options.contact_sheet is not None:
        write_png(Path(options.contact_sheet), contact_sheet(np.stack(sheet), SHEET_COLUMNS))
    return digest.hexdigest(), seconds
