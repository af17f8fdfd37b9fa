"""The text-to-video pipeline: a bundle opened once, called many times."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from t2v_rt.engines import platform
from t2v_rt.engines.backends import Backend, check_backend, get_backend
from t2v_rt.engines.bundle import Bundle, open_bundle
from t2v_rt.engines.contract import Component
from t2v_rt.engines.manifest import Manifest
from t2v_rt.errors import BackendError, RequestError
from t2v_rt.runtime import memory, wan
from t2v_rt.runtime.encoder import PromptEncoder, check_finite
from t2v_rt.runtime.guidance import guide, uses_guidance
from t2v_rt.runtime.noise import Generator
from t2v_rt.runtime.output import TextToVideoOutput
from t2v_rt.runtime.prompt import PromptTokenizer
from t2v_rt.runtime.request import Prompt, Request, make_noise, make_request
from t2v_rt.runtime.scheduler_base import Scheduler
from t2v_rt.runtime.schedulers import get_scheduler

logger = logging.getLogger(__name__)
Array = NDArray[np.float32]
StepCallback = Callable[["TextToVideoPipeline", int, float, dict[str, Any]], Mapping[str, Any] | None]
Progress = Callable[[str, int, int], None]
CALLBACK_TENSORS = ("latents", "prompt_embeds", "negative_prompt_embeds")


class TextToVideoPipeline:
    """Prompt in, frames out; made by `from_pretrained`.

    Engines are loaded at their first use and kept, unless `vram_budget` is too small for all at once. Calls from
    several threads do not mix: a call works on its own copy of `scheduler` and its own engine state.

    Args:
        bundle: the opened bundle.
        backend: loads its engines.
        vram_budget: bytes the engines may take together, or None.
    """

    def __init__(self, bundle: Bundle, backend: Backend, vram_budget: int | None = None) -> None:
        self.bundle = bundle
        manifest = bundle.manifest
        self.scheduler: Scheduler[Any] = get_scheduler(str(manifest.scheduler.get("_class_name")), manifest.scheduler)
        self.vram_budget = vram_budget
        self._backend = backend
        self._components: dict[str, Component] = {}
        self._lock = threading.Lock()
        weights = sum(spec.weights_bytes for spec in manifest.components.values())
        self._keep = vram_budget is None or weights <= vram_budget
        tokenizer = PromptTokenizer(bundle.folder / "tokenizer" / "tokenizer.json", manifest.model.text_length)
        self._encoder = PromptEncoder(manifest.model, tokenizer, lambda: self._component("text_encoder"))

    @classmethod
    def from_pretrained(
        cls,
        bundle_dir: str | Path,
        backend: str | None = None,
        vram_budget: int | str | None = None,
        *,
        provider: str = "cpu",
        threads: int | None = None,
    ) -> Self:
        """Opens a bundle; its files are checked, no engine is loaded yet.

        Args:
            bundle_dir: the directory that build-engines wrote.
            backend: must be the one the bundle was built for; None takes that one.
            vram_budget: memory the engines may take, bytes or text such as `8GiB`; None for no limit.
            provider: of ONNX Runtime, `cpu` or `cuda`.
            threads: per engine on the CPU; None for as many as there are cores.

        Raises:
            BundleError: the bundle is missing, damaged, edited or too new.
            BackendError: the backend is unknown, not usable here, or not the bundle's.
            RequestError: the budget cannot be read.
        """
        if backend is not None:
            check_backend(backend)
        bundle = open_bundle(bundle_dir)
        built_for = bundle.manifest.backend
        if backend not in (None, built_for):
            raise BackendError(f"{bundle_dir} was built for {built_for}, not {backend}; build it for {backend}")
        budget = None if vram_budget is None else memory.parse_bytes(vram_budget)
        return cls(bundle, get_backend(built_for, provider=provider, threads=threads), budget)

    @property
    def manifest(self) -> Manifest:
        """What the bundle declares."""
        return self.bundle.manifest

    # -- calls -------------------------------------------------------------------------------------------------------

    def __call__(
        self,
        prompt: Prompt | None = None,
        negative_prompt: Prompt | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_videos_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        generator: Generator | Sequence[Generator] | None = None,
        latents: NDArray[Any] | None = None,
        prompt_embeds: NDArray[Any] | None = None,
        negative_prompt_embeds: NDArray[Any] | None = None,
        output_type: str = "np",
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        progress: Progress | None = None,
    ) -> TextToVideoOutput:
        """Makes videos; what is left out takes the bundle's default.

        Args:
            prompt: one text, or a list of them.
            negative_prompt: what to steer away from; one for all prompts or one for each.
            height: in pixels, a multiple of the model's patch.
            width: in pixels, likewise.
            num_frames: a multiple of the temporal factor, plus one.
            num_inference_steps: steps of the scheduler.
            guidance_scale: classifier-free guidance; 1 turns it off and halves the denoiser calls.
            num_videos_per_prompt: videos of each prompt.
            seed: one for all videos, or a list with one for each; None draws one (see the result's `seed`).
            generator: instead of seed, one or a list.
            latents: float (B, C, F, H, W) to start from instead of noise; they set the video's size.
            prompt_embeds: float (B, L, D) instead of prompt.
            negative_prompt_embeds: float (B, L, D) instead of negative_prompt.
            output_type: "np", "uint8", "pil" or "latent".
            callback_on_step_end: called as `f(pipe, step, timestep, tensors)` after each step; tensors it returns
                (`latents`, `prompt_embeds`, `negative_prompt_embeds`) replace the current ones.
            callback_on_step_end_tensor_inputs: names of the tensors it is given.
            progress: called as `f(stage, done, total)`.

        Returns:
            Frames, seed, settings, stage times and memory.

        Raises:
            RequestError: a setting is invalid, or the request does not fit in memory.
            EngineError: an engine failed or gave values that are not finite.
        """
        request = make_request(
            self.manifest,
            prompt=prompt,
            negative_prompt=negative_prompt,
            height=height,
            width=width,
            num_frames=num_frames,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            num_videos_per_prompt=num_videos_per_prompt,
            seed=seed,
            generator=generator,
            latents=latents,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            output_type=output_type,
        )
        self.check_memory(request, kept_frames=0 if output_type == "latent" else request.batch * request.num_frames)
        run = Run(self, request, callback_on_step_end, callback_on_step_end_tensor_inputs, progress)
        sampled = run.sample(generator)
        frames: Any = sampled if output_type == "latent" else _collect(run, sampled, output_type)
        seeds = list(request.seeds)
        return TextToVideoOutput(
            frames=frames,
            seed=None if not seeds else seeds[0] if len(seeds) == 1 else seeds,
            settings=request.settings(run.scheduler_settings),
            stage_seconds=run.seconds,
            step_calls=tuple(run.step_calls),
            peak_rss_bytes=platform.peak_rss_bytes(),
        )

    generate = __call__

    def stream(
        self,
        prompt: Prompt | None = None,
        *,
        output_type: str = "np",
        progress: Progress | None = None,
        generator: Generator | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **settings: Any,
    ) -> FrameStream:
        """Makes one video and yields its frames as the VAE decodes them; only one chunk is held at a time.

        Args:
            prompt: one text.
            output_type: "np" yields float32 frames (H, W, 3) in [0, 1], "uint8" yields uint8 ones.
            progress: called as `f(stage, done, total)`.
            generator: instead of seed.
            callback_on_step_end: as in the call.
            callback_on_step_end_tensor_inputs: as in the call.
            settings: the call's other arguments.

        Returns:
            An iterator over frames that also tells seed, settings, latents and times. The request is validated at
            once; sampling begins with the first frame asked for.

        Raises:
            RequestError: an invalid setting, more than one video, or another output type.
        """
        request = make_request(self.manifest, prompt=prompt, generator=generator, output_type=output_type, **settings)
        if request.batch != 1 or output_type not in ("np", "uint8"):
            raise RequestError(
                f"stream makes one video of output_type np or uint8; {request.batch} of {output_type!r} were asked for"
            )
        self.check_memory(request, kept_frames=self.manifest.model.temporal_factor)
        run = Run(self, request, callback_on_step_end, callback_on_step_end_tensor_inputs, progress)
        return FrameStream(run, generator)

    def check_memory(self, request: Request, kept_frames: int) -> None:
        """Refuses a request that cannot fit, before anything is allocated; `kept_frames` are held at once.

        Raises:
            RequestError: more is needed than there is, or than the budget allows.
        """
        shape = self.latent_shape(request)
        needed = memory.estimate(self.manifest, shape, kept_frames)
        memory.check_fits(needed, platform.available_memory_bytes(), "the memory available")
        if self.vram_budget is not None:
            memory.check_fits(memory.estimate(self.manifest, shape, 0), self.vram_budget, "the budget")

    def latent_shape(self, request: Request) -> tuple[int, ...]:
        """(B, C, F, H, W) of a request's latents."""
        return wan.latent_shape(
            self.manifest.model, request.batch, request.height, request.width, request.num_frames
        )

    # -- stages ------------------------------------------------------------------------------------------------------

    def encode_prompt(self, texts: Sequence[str]) -> Array:
        """Prompt embeddings float32 (B, L, D) of texts, padded with zeros; remembered for later calls."""
        return self._encoder.encode(texts)

    def decode(self, latents: Array, progress: Progress | None = None) -> Iterator[Array]:
        """Decodes one video's latents, one latent frame at a time.

        Args:
            latents: float32 (1, C, F, H, W), as sampled (output_type "latent").
            progress: called as `f("decode", done, total)`.

        Returns:
            An iterator over chunks (f, H, W, 3) float32 in [0, 1]: one frame, then `temporal_factor` frames each.

        Raises:
            EngineError: the VAE failed or gave values that are not finite.
        """
        model = self.manifest.model
        _, _, count, height, width = latents.shape
        with self._stage("vae_decoder") as vae:
            state = vae.new_state(height=height, width=width)
            for i in range(count):
                chunk = wan.denormalize(model, latents[:, :, i : i + 1])
                engine = vae["first" if i == 0 else "next"]
                frames = engine.infer({"latents": np.ascontiguousarray(chunk)}, state)["frames"]
                check_finite(frames, "decode", "the VAE decoder")
                if progress is not None:
                    progress("decode", i + 1, count)
                yield wan.to_unit_range(frames)

    def _component(self, name: str) -> Component:
        with self._lock:
            if name not in self._components:
                spec = self.manifest.components[name]
                self._components[name] = self._backend.load(self.bundle.folder, name, spec)
            return self._components[name]

    @contextmanager
    def _stage(self, name: str) -> Iterator[Component]:
        """A component for one stage; released afterwards, also after an error, where not all fit the budget."""
        try:
            yield self._component(name)
        finally:
            if not self._keep:
                self._release(name)

    def _release(self, name: str) -> None:
        with self._lock:
            component = self._components.pop(name, None)
        if component is not None:
            component.close()

    def close(self) -> None:
        """Releases all engines; a later call loads them again."""
        for name in list(self._components):
            self._release(name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Run:
    """One request on its way through the stages.

    Args:
        pipe: whose engines are used.
        request: what is asked for.
        callback: of each step's end, or None.
        callback_tensors: names of the tensors the callback is given.
        progress: of all stages, or None.
    """

    def __init__(
        self,
        pipe: TextToVideoPipeline,
        request: Request,
        callback: StepCallback | None = None,
        callback_tensors: Sequence[str] = (),
        progress: Progress | None = None,
    ) -> None:
        unknown = set(callback_tensors) - set(CALLBACK_TENSORS)
        if unknown:
            raise RequestError(f"callback tensors {sorted(unknown)} are unknown; expected {', '.join(CALLBACK_TENSORS)}")
        self._pipe = pipe
        self.request = request
        self._callback = callback
        self._callback_tensors = tuple(callback_tensors)
        self._progress = progress or (lambda stage, done, total: None)
        self._scheduler = pipe.scheduler.copy()
        self.scheduler_settings = {"_class_name": type(self._scheduler).__name__, **self._scheduler.config}
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
            latents, generators = make_noise(self.request, self._pipe.latent_shape(self.request), generator)
            return self._denoise(latents, conditional, unconditional, generators)

    def _encode(self) -> tuple[Array, Array | None]:
        """Conditional and unconditional embeddings, one row per video."""
        request = self.request
        self._progress("encode", 0, 1)
        conditional = request.prompt_embeds
        if conditional is None:
            conditional = self._pipe.encode_prompt(request.prompts)
        unconditional = request.negative_prompt_embeds
        if uses_guidance(request.guidance_scale) and unconditional is None:
            unconditional = self._pipe.encode_prompt(request.negative_prompts)
        if not self._pipe._keep:
            self._pipe._release("text_encoder")
        self._progress("encode", 1, 1)
        repeats = request.num_videos_per_prompt
        return np.repeat(conditional, repeats, 0), None if unconditional is None else np.repeat(unconditional, repeats, 0)

    def _denoise(
        self, latents: Array, conditional: Array, unconditional: Array | None, generators: list[Generator]
    ) -> Array:
        request, scheduler = self.request, self._scheduler
        guided = uses_guidance(request.guidance_scale)
        scheduler.set_timesteps(request.num_inference_steps)
        latents = latents * np.float32(scheduler.init_noise_sigma)
        total = len(scheduler.timesteps)
        with self._pipe._stage("transformer") as denoiser:
            for i, t in enumerate(scheduler.timesteps):
                sample = scheduler.scale_model_input(latents, t)
                prediction = self._predict(denoiser, sample, t, conditional)
                if guided and unconditional is not None:
                    against = self._predict(denoiser, sample, t, unconditional)
                    prediction = guide(prediction, against, request.guidance_scale)
                latents = scheduler.step(
                    prediction, t, latents, generator=generators[0] if generators else None
                ).prev_sample
                check_finite(latents, "denoise", f"step {i + 1} of the denoiser")
                self.step_calls.append(2 if guided else 1)
                if self._callback is not None:
                    latents, conditional, unconditional = self._call_back(i, t, latents, conditional, unconditional)
                self._progress("denoise", i + 1, total)
        return latents

    def _predict(self, denoiser: Component, sample: Array, t: float, prompt_embeds: Array) -> Array:
        context = wan.text_context(prompt_embeds)
        prediction: Array = denoiser["model"].infer(
            {
                "hidden_states": np.ascontiguousarray(sample, np.float32),
                "timestep": np.full(len(sample), t, np.float32),
                "encoder_hidden_states": context.embeds,
                "encoder_attention_bias": context.bias,
            }
        )["noise_pred"]
        return prediction

    def _call_back(
        self, step: int, t: float, latents: Array, conditional: Array, unconditional: Array | None
    ) -> tuple[Array, Array, Array | None]:
        assert self._callback is not None
        tensors = dict(zip(CALLBACK_TENSORS, (latents, conditional, unconditional), strict=True))
        given = {name: tensors[name] for name in self._callback_tensors}
        for name, value in (self._callback(self._pipe, step, t, given) or {}).items():
            old = tensors.get(name)
            if old is None or np.shape(value) != old.shape:
                raise RequestError(
                    f"the step callback returned {name!r} of shape {list(np.shape(value))}; expected "
                    f"{list(old.shape) if old is not None else ', '.join(CALLBACK_TENSORS)}"
                )
            tensors[name] = np.ascontiguousarray(value, np.float32)
        return tensors["latents"], tensors["prompt_embeds"], tensors["negative_prompt_embeds"]  # type: ignore[return-value]

    def chunks(self, latents: Array) -> Iterator[Array]:
        """Decodes one video's latents; chunks (f, H, W, 3) float32, the time of decoding counted."""
        chunks = self._pipe.decode(latents, self._progress)
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


def _collect(run: Run, latents: Array, output_type: str) -> Any:
    """All videos of a batch, in the form that was asked for."""
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
