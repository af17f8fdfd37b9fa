"""One request on its way: encode, denoise, decode."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t2v_rt.engines.contract import Component
from t2v_rt.errors import RequestError
from t2v_rt.runtime import wan
from t2v_rt.runtime.encoder import check_finite
from t2v_rt.runtime.guidance import guide, uses_guidance
from t2v_rt.runtime.noise import Generator
from t2v_rt.runtime.request import Request, make_noise
from t2v_rt.runtime.scheduler_base import Scheduler
from t2v_rt.runtime.stages import Progress, Stages

Array = NDArray[np.float32]
Callback = Callable[[int, float, dict[str, Any]], Mapping[str, Any] | None]
CALLBACK_TENSORS = ("latents", "prompt_embeds", "negative_prompt_embeds")


class Prompts:
    """The prompt embeddings of a run, and once for all steps what the denoiser takes of them.

    Args:
        embeds: float32 (B, L, D).
        negative_embeds: likewise, or None without guidance.
    """

    def __init__(self, embeds: Array, negative_embeds: Array | None) -> None:
        self.embeds = embeds
        self.negative_embeds = negative_embeds
        self.conditional = wan.text_context(embeds)
        self.unconditional = None if negative_embeds is None else wan.text_context(negative_embeds)


def _predict(denoiser: Component, sample: Array, t: float, context: wan.TextContext) -> Array:
    """One denoiser call for all videos of the batch."""
    prediction: Array = denoiser["model"].infer(
        {
            "hidden_states": np.ascontiguousarray(sample, np.float32),
            "timestep": np.full(len(sample), t, np.float32),
            "encoder_hidden_states": context.embeds,
            "encoder_attention_bias": context.bias,
        }
    )["noise_pred"]
    return prediction


class Run:
    """One request on its way through the stages.

    Args:
        stages: whose engines are used.
        scheduler: this run's own.
        request: what is asked for.
        callback: called as `f(step, timestep, tensors)` at each step's end, or None.
        callback_tensors: names of the tensors the callback is given.
        progress: of all stages, or None.
    """

    def __init__(
        self,
        stages: Stages,
        scheduler: Scheduler[Any],
        request: Request,
        callback: Callback | None = None,
        callback_tensors: Sequence[str] = (),
        progress: Progress | None = None,
    ) -> None:
        unknown = set(callback_tensors) - set(CALLBACK_TENSORS)
        if unknown:
            raise RequestError(
                f"callback tensors {sorted(unknown)} are unknown; expected {', '.join(CALLBACK_TENSORS)}"
            )
        self._stages = stages
        self._scheduler = scheduler
        self.request = request
        self._callback = callback
        self._callback_tensors = tuple(callback_tensors)
        self._progress = progress or (lambda stage, done, total: None)
        self.scheduler_settings = self._scheduler.settings()
        self.seconds: dict[str, float] = {"encode": 0.0, "denoise": 0.0, "decode": 0.0}
        self.step_calls: list[int] = []

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
            latents, generators = make_noise(self.request, self._latent_shape(), generator)
            return self._denoise(latents, conditional, unconditional, generators)

    def _latent_shape(self) -> tuple[int, ...]:
        request = self.request
        model = self._stages.manifest.model
        return wan.latent_shape(model, request.batch, request.height, request.width, request.num_frames)

    def _encode(self) -> tuple[Array, Array | None]:
        """Conditional and, with guidance, unconditional embeddings, one row per video."""
        request = self.request
        self._progress("encode", 0, 1)
        conditional, unconditional = request.prompt_embeds, None
        if conditional is None:
            conditional = self._stages.encode_prompt(request.prompts)
        if uses_guidance(request.guidance_scale):
            unconditional = request.negative_prompt_embeds
            if unconditional is None:
                unconditional = self._stages.encode_prompt(request.negative_prompts)
            unconditional = np.repeat(unconditional, request.num_videos_per_prompt, 0)
        self._progress("encode", 1, 1)
        return np.repeat(conditional, request.num_videos_per_prompt, 0), unconditional

    def _denoise(
        self, latents: Array, conditional: Array, unconditional: Array | None, generators: list[Generator]
    ) -> Array:
        request, scheduler = self.request, self._scheduler
        scheduler.set_timesteps(request.num_inference_steps)
        latents = latents * np.float32(scheduler.init_noise_sigma)
        generator = generators[0] if generators else None
        prompts = Prompts(conditional, unconditional)
        with self._stages.stage("transformer") as denoiser:
            for i, t in enumerate(scheduler.timesteps):
                sample = scheduler.scale_model_input(latents, t)
                prediction = _predict(denoiser, sample, t, prompts.conditional)
                if prompts.unconditional is not None:
                    against = _predict(denoiser, sample, t, prompts.unconditional)
                    prediction = guide(prediction, against, request.guidance_scale)
                check_finite(prediction, "denoise", f"step {i + 1} of the denoiser")
                latents = scheduler.step(prediction, t, latents, generator=generator).prev_sample
                self.step_calls.append(1 if prompts.unconditional is None else 2)
                if self._callback is not None:
                    latents, prompts = self._call_back(i, t, latents, prompts)
                self._progress("denoise", i + 1, len(scheduler.timesteps))
        return latents

    def _call_back(self, step: int, t: float, latents: Array, prompts: Prompts) -> tuple[Array, Prompts]:
        assert self._callback is not None
        tensors = dict(zip(CALLBACK_TENSORS, (latents, prompts.embeds, prompts.negative_embeds), strict=True))
        given = {name: tensors[name] for name in self._callback_tensors}
        returned = self._callback(step, t, given) or {}
        changed = dict(tensors)
        for name, value in returned.items():
            old = tensors.get(name)
            if old is None or np.shape(value) != old.shape:
                raise RequestError(
                    f"the step callback returned {name!r} of shape {list(np.shape(value))}; expected "
                    f"{list(old.shape) if old is not None else ', '.join(CALLBACK_TENSORS)}"
                )
            changed[name] = np.ascontiguousarray(value, np.float32)
        moved, embeds, negative = (changed[name] for name in CALLBACK_TENSORS)
        assert moved is not None
        assert embeds is not None
        same = embeds is prompts.embeds and negative is prompts.negative_embeds
        return moved, prompts if same else Prompts(embeds, negative)

    def chunks(self, latents: Array) -> Iterator[Array]:
        """Decodes one video's latents; chunks (f, H, W, 3) float32, the time of decoding counted."""
        chunks = self._stages.decode(latents, self._progress)
        while True:
            with self._timed("decode"):
                chunk = next(chunks, None)
            if chunk is None:
                return
            yield chunk


class FrameStream(Iterator[NDArray[Any]]):
    """One video's frames as they are decoded; made by `TextToVideoPipeline.stream`.

    Args:
        run: of the request.
        generator: instead of the request's seed.

    Attributes:
        request: the validated request.
        settings: everything that determines the result, as plain JSON values.
        latents: float32 (1, C, F, H, W) once sampling is done.
    """

    def __init__(self, run: Run, generator: Generator | None = None) -> None:
        self._run = run
        self._generator = generator
        self.request = run.request
        self.settings = run.request.settings(run.scheduler_settings)
        self.latents: Array | None = None
        self._frames = self._make()

    @property
    def stage_seconds(self) -> Mapping[str, float]:
        """Wall time of each stage so far."""
        return self._run.seconds

    @property
    def step_calls(self) -> tuple[int, ...]:
        """Denoiser calls of each step so far."""
        return tuple(self._run.step_calls)

    def __next__(self) -> NDArray[Any]:
        return next(self._frames)

    def sample(self) -> Array:
        """Encodes and denoises, if that has not been done, and returns the latents."""
        if self.latents is None:
            self.latents = self._run.sample(self._generator)
        return self.latents

    def _make(self) -> Iterator[NDArray[Any]]:
        for chunk in self._run.chunks(self.sample()):
            yield from wan.to_uint8(chunk) if self.request.output_type == "uint8" else chunk

    def close(self) -> None:
        """Ends the video early and releases its state."""
        self._frames.close()  # type: ignore[attr-defined]


def collect(run: Run, latents: Array, output_type: str) -> Any:
    """All videos of a batch, in the form that was asked for: an array, or lists of PIL images."""
    videos = []
    for video in latents:
        chunks = [chunk if output_type == "np" else wan.to_uint8(chunk) for chunk in run.chunks(video[None])]
        videos.append(np.concatenate(chunks))
    if output_type != "pil":
        return np.stack(videos)
    try:
        from PIL import Image
    except ImportError as exc:
        raise RequestError("output_type 'pil' needs Pillow; install t2v-rt[pil], or ask for 'uint8'") from exc
    return [[Image.fromarray(frame) for frame in video] for video in videos]
