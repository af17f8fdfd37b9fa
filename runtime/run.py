"""One request on its way: encode, denoise, decode."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Generator as FrameGenerator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t2v_rt.errors import EngineError, PreviewError, RequestError
from t2v_rt.runtime.cancel import check_cancelled, check_event
from t2v_rt.runtime.denoise.denoiser import Denoiser, Prompts
from t2v_rt.runtime.denoise.step_cache import StepCache
from t2v_rt.runtime.engine_pool import EnginePool
from t2v_rt.runtime.frames import to_uint8
from t2v_rt.runtime.memory.plan import MemoryPlan
from t2v_rt.runtime.noise import Generator
from t2v_rt.runtime.output import TextToVideoOutput
from t2v_rt.runtime.prompts.encoder import check_finite
from t2v_rt.runtime.request import Request, make_noise
from t2v_rt.runtime.schedulers.base import Scheduler
from t2v_rt.runtime.stages import Progress
from t2v_rt.runtime.step_callback import CALLBACK_TENSORS, StepCallback, changed_tensors
from t2v_rt.system.resources import peak_rss_bytes

logger = logging.getLogger(__name__)
Array = NDArray[np.float32]
RGB = 3
FrameIterator = FrameGenerator[NDArray[Any], None, None]


@dataclass(frozen=True)
class CallHooks:
    """What a call tells on its way, and what can change or end it.

    Args:
        callback_on_step_end: called as `f(pipe, step, timestep, tensors)` after each step; tensors it returns
            (`latents`, `prompt_embeds`, `negative_prompt_embeds`) replace the current ones.
        callback_on_step_end_tensor_inputs: names of the tensors that callback_on_step_end is given.
        progress: called as `f(stage, done, total)`.
        cancel: event that is looked at before each denoiser call and each chunk of the VAE; once it is set, the call,
            or the next frame that is asked for, ends in CancelledError.
        previews: whether callback_on_step_end asks for `pipe.preview`: then the VAE decoder is loaded beside the
            denoiser, and memory is planned for both. Without it a preview has to do with what is left, and may load
            the VAE decoder each time. One that fails never ends the call: it warns once.
    """

    callback_on_step_end: StepCallback | None = None
    callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",)
    progress: Progress | None = None
    cancel: threading.Event | None = None
    previews: bool = False


class Run:
    """One request on its way through the stages.

    Args:
        pool: whose engines are used.
        scheduler: this run's own.
        request: what is asked for.
        plan: of its memory, which it follows.
        hooks: what it tells, and what can change or end it.
        owner: the pipeline that the step callback is given.

    Raises:
        RequestError: an unknown callback tensor, no event, or timesteps or sigmas that the scheduler does not take.
    """

    def __init__(
        self,
        pool: EnginePool,
        scheduler: Scheduler[Any],
        request: Request,
        plan: MemoryPlan,
        hooks: CallHooks,
        owner: Any,
    ) -> None:
        unknown = set(hooks.callback_on_step_end_tensor_inputs) - set(CALLBACK_TENSORS)
        if unknown:
            raise RequestError(
                f"callback tensors {sorted(unknown)} are unknown; expected {', '.join(CALLBACK_TENSORS)}"
            )
        self._pool = pool
        self._stages = pool.sets[0].stages  # until it begins
        self._held: ExitStack | None = None  # what is given back at the run's end
        self._scheduler = scheduler
        self.request = request
        self.plan = plan
        self._hooks = hooks
        self._owner = owner
        self._progress = hooks.progress or (lambda stage, done, total: None)
        self._cancel = check_event(hooks.cancel)
        self.scheduler_settings = self._scheduler.settings()
        _set_timesteps(scheduler, request)
        self._warned = False  # of a callback that failed
        self._cache = StepCache(request.step_cache, len(scheduler.timesteps))
        self.seconds: dict[str, float] = {"encode": 0.0, "denoise": 0.0, "decode": 0.0}
        self.step_calls: list[int] = []
        self.latents: Array | None = None

    @property
    def skipped_calls(self) -> int:
        """Denoiser predictions that the step cache has avoided so far."""
        return self._cache.skipped

    def begin(self) -> None:
        """Waits until the run's memory can be had beside that of others, and keeps it until `end`.

        Raises:
            RequestError: it cannot.
            CancelledError: the run was cancelled meanwhile.
        """
        if self._held is None:
            with ExitStack() as stack:
                engines = stack.enter_context(self._pool.taken())
                self.plan = stack.enter_context(engines.admission.admitted(self.plan, self._cancel))
                stack.enter_context(engines.stages.components.following(self.plan))
                self._stages, self._held = engines.stages, stack.pop_all()

    def end(self) -> None:
        """Gives the run's memory back to others; ending twice is allowed."""
        held, self._held = self._held, None
        if held is not None:
            held.close()

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - start

    def sample(self, generator: Generator | Sequence[Generator] | None) -> Array:
        """Encodes the prompts and denoises; returns latents float32 (B, C, F, H, W)."""
        with self._timed("encode"):
            conditional, unconditional = self._encode()
        with self._timed("denoise"):
            latents, generators = make_noise(self.request, self._stages.manifest.model, generator)
            return self._denoise(latents, Prompts(conditional, unconditional), generators)

    def sampled(self, generator: Generator | Sequence[Generator] | None) -> Array:
        """Begins the run and samples, if that has not been done; what fails ends it."""
        if self.latents is None:
            self.begin()
            try:
                self.latents = self.sample(generator)
            except BaseException:
                self.end()
                raise
        return self.latents

    def frames(self, generator: Generator | Sequence[Generator] | None) -> FrameIterator:
        """The frames of the one video, in the form that was asked for; the run ends with them."""
        latents = self.sampled(generator)
        try:
            for chunk in self.chunks(latents):
                yield from to_uint8(chunk) if self.request.output_type == "uint8" else chunk
        finally:
            self.end()

    def _encode(self) -> tuple[Array, Array | None]:
        """Conditional and, with guidance, unconditional embeddings, one row per video."""
        request = self.request
        check_cancelled(self._cancel, "encode")
        self._progress("encode", 0, 1)
        conditional, unconditional = request.prompt_embeds, None
        prompts = request.prompts if conditional is None else ()
        negatives: Sequence[str] = ()
        if request.guidance.needs_negative:
            unconditional = request.negative_prompt_embeds
            negatives = request.negative_prompts if unconditional is None else ()
        if prompts or negatives:  # together, while the text encoder's weights are there
            embeds = self._stages.encode_prompt([*prompts, *negatives], self.plan)
            conditional = embeds[: len(prompts)] if prompts else conditional
            unconditional = embeds[len(prompts) :] if negatives else unconditional
        self._progress("encode", 1, 1)
        assert conditional is not None
        conditional = np.repeat(conditional, request.num_videos_per_prompt, 0)
        if unconditional is not None:
            unconditional = np.repeat(unconditional, request.num_videos_per_prompt, 0)
        return conditional, unconditional

    def _denoise(self, latents: Array, prompts: Prompts, generators: list[Generator]) -> Array:
        guidance, scheduler, cache = self.request.guidance, self._scheduler, self._cache
        generator = generators[0] if len(generators) == 1 else generators or None
        count = len(scheduler.timesteps)  # some samplers ask for more predictions than they make steps
        latents = latents * np.float32(scheduler.init_noise_sigma)
        with self._previews(), self._stages.components.stage("transformer", self.plan) as component:
            denoiser = Denoiser(component, self._stages.text, prompts, self.plan.one_batch, self._cancel)
            for i, t in enumerate(scheduler.timesteps):
                # 1. the denoiser's input, and how many predictions guidance makes of it: none, one or two
                check_cancelled(self._cancel, "denoise")
                sample = scheduler.scale_model_input(latents, t)
                passes = guidance.passes(i, count)
                # 2. the predictions: those of the step cache where they will do, else the denoiser's
                reused = cache.reuse(i, sample, passes) if passes else ()
                predictions = denoiser.predict(sample, t, passes) if reused is None else reused
                if reused is None:
                    cache.keep(sample, predictions)
                self.step_calls.append(passes if reused is None else 0)
                # 3. guidance, and the sampler's step
                prediction = guidance.combine(predictions) if passes else np.zeros_like(sample)
                check_finite(prediction, "denoise", f"step {i + 1} of the denoiser")
                latents = scheduler.step(prediction, t, latents, generator=generator).prev_sample
                # 4. the caller's turn: to look, to change tensors, to cancel
                if self._hooks.callback_on_step_end is not None:
                    latents, denoiser.prompts = self._call_back(i, t, latents, denoiser.prompts)
                self._progress("denoise", i + 1, count)
        return latents

    @contextmanager
    def _previews(self) -> Iterator[None]:
        """Keeps the VAE decoder loaded for previews while the denoiser works, where the plan has room for it."""
        with ExitStack() as held:
            if self.plan.preview is not None:
                try:
                    held.enter_context(self._stages.components.stage("vae_decoder", self.plan))
                except EngineError as exc:
                    self._warn(exc)
            yield

    def _warn(self, error: EngineError) -> None:
        """Warns of previews that fail, once in a run."""
        if not self._warned:
            logger.warning("there are no previews of this video, or not of all steps: %s", str(error))
        self._warned = True

    def _call_back(self, step: int, t: float, latents: Array, prompts: Prompts) -> tuple[Array, Prompts]:
        callback, names = self._hooks.callback_on_step_end, self._hooks.callback_on_step_end_tensor_inputs
        assert callback is not None
        tensors = dict(zip(CALLBACK_TENSORS, (latents, prompts.embeds, prompts.negative_embeds), strict=True))
        given = {name: tensors[name] for name in names}
        try:
            with self._pool.serving(self._stages):
                returned = callback(self._owner, step, t, given)
        except PreviewError as exc:
            self._warn(exc)
            returned = None
        changed = changed_tensors(returned, tensors)
        moved, embeds, negative = (changed[name] for name in CALLBACK_TENSORS)
        assert moved is not None
        assert embeds is not None
        if embeds is prompts.embeds and negative is prompts.negative_embeds:
            return moved, prompts
        self._cache.forget()  # what it kept was the answer to another prompt
        return moved, Prompts(embeds, negative)

    def chunks(self, latents: Array) -> Iterator[Array]:
        """Decodes one video's latents; chunks (f, H, W, 3) float32, the time of decoding counted."""
        chunks = self._stages.decode(latents, self.plan, self._progress, self._cancel)
        while True:
            with self._timed("decode"):
                chunk = next(chunks, None)
            if chunk is None:
                return
            yield chunk


def _set_timesteps(scheduler: Scheduler[Any], request: Request) -> None:
    """Prepares the schedule; that is done before anything else so that a refusal costs nothing."""
    if request.timesteps is not None:
        scheduler.set_timesteps(num_inference_steps=None, timesteps=list(request.timesteps))
    elif request.sigmas is not None:
        scheduler.set_timesteps(num_inference_steps=None, sigmas=list(request.sigmas))
    else:
        scheduler.set_timesteps(request.num_inference_steps)


class FrameStream(Iterator[NDArray[Any]]):
    """One video's frames as they are decoded; made by `TextToVideoPipeline.stream`.

    Args:
        run: of the request.
        generator: instead of the request's seed.

    Attributes:
        request: the validated request.
        settings: everything that determines the result, as plain JSON values.
    """

    def __init__(self, run: Run, generator: Generator | Sequence[Generator] | None = None) -> None:
        self._run = run
        self._generator = generator
        self.request = run.request
        self.settings = run.request.settings(run.scheduler_settings)
        self._frames = run.frames(generator)
        self._end = weakref.finalize(self, _finish, self._frames, run)  # also where nobody holds the stream any more

    @property
    def stage_seconds(self) -> Mapping[str, float]:
        """Wall time of each stage so far."""
        return self._run.seconds

    @property
    def step_calls(self) -> tuple[int, ...]:
        """Denoiser predictions made in each step so far."""
        return tuple(self._run.step_calls)

    @property
    def skipped_calls(self) -> int:
        """Denoiser predictions that the step cache has avoided so far."""
        return self._run.skipped_calls

    def __next__(self) -> NDArray[Any]:
        return next(self._frames)

    @property
    def latents(self) -> Array | None:
        """float32 (1, C, F, H, W) once sampling is done."""
        return self._run.latents

    def sample(self) -> Array:
        """Encodes and denoises, if that has not been done, and returns the latents."""
        return self._run.sampled(self._generator)

    def close(self) -> None:
        """Ends the video early and releases its state."""
        self._end()


def _finish(frames: FrameIterator, run: Run) -> None:
    """Ends a video where it stands, also one of which no frame was asked for."""
    frames.close()
    run.end()


def make_output(run: Run, generator: Generator | Sequence[Generator] | None) -> TextToVideoOutput:
    """Carries a run out, and gathers what a call gives back."""
    request, kind = run.request, run.request.output_type
    try:
        latents = run.sampled(generator)
        frames: Any = latents if kind == "latent" else collect(run, latents, kind)
    finally:
        run.end()
    seeds = list(request.seeds)
    return TextToVideoOutput(
        frames=frames,
        seed=None if not seeds else seeds[0] if len(seeds) == 1 else seeds,
        settings=request.settings(run.scheduler_settings),
        stage_seconds=run.seconds,
        step_calls=tuple(run.step_calls),
        skipped_calls=run.skipped_calls,
        peak_rss_bytes=peak_rss_bytes(),
    )


def collect(run: Run, latents: Array, output_type: str) -> Any:
    """All videos of a batch, in the form that was asked for: an array, or lists of PIL images."""
    request = run.request
    shape = (len(latents), request.num_frames, request.height, request.width, RGB)
    videos: NDArray[Any] = np.empty(shape, np.float32 if output_type == "np" else np.uint8)
    for video, frames in zip(latents, videos, strict=True):
        done = 0
        for chunk in run.chunks(video[None]):
            frames[done : done + len(chunk)] = chunk if output_type == "np" else to_uint8(chunk)
            done += len(chunk)
    if output_type != "pil":
        return videos
    try:
        from PIL import Image
    except ImportError as exc:
        raise RequestError("output_type 'pil' needs Pillow; install t2v-rt[pil], or ask for 'uint8'") from exc
    return [[Image.fromarray(frame) for frame in video] for video in videos]
