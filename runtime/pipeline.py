"""The text-to-video pipeline: a bundle opened once, called many times."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from t2v_rt.engines.backend_info import check_backend
from t2v_rt.engines.backends import Backend, backend_of
from t2v_rt.engines.bundle.manifest import Manifest
from t2v_rt.engines.bundle.profiles import check_profiles
from t2v_rt.engines.bundle.store import Bundle, open_bundle
from t2v_rt.errors import RequestError
from t2v_rt.options import documented_by
from t2v_rt.runtime.decode.tiles import Grid, parse_grid
from t2v_rt.runtime.diffusers_habits import DiffusersHabits, scheduler_refusal
from t2v_rt.runtime.engine_pool import EnginePool, check_count
from t2v_rt.runtime.memory.advice import check_room, warn_of_spilling
from t2v_rt.runtime.memory.device_memory import memory_of
from t2v_rt.runtime.memory.plan import MemoryPlan, parse_bytes
from t2v_rt.runtime.memory.planner import Planner
from t2v_rt.runtime.noise import Generator
from t2v_rt.runtime.options import BackendOptions, CallOptions, Prompt
from t2v_rt.runtime.output import TextToVideoOutput
from t2v_rt.runtime.preview import preview
from t2v_rt.runtime.request import CallArrays, Request, check_latents, make_request
from t2v_rt.runtime.run import CallHooks, FrameStream, Run, make_output
from t2v_rt.runtime.schedulers import get_scheduler
from t2v_rt.runtime.schedulers.base import Scheduler
from t2v_rt.runtime.stages import Progress, Stages
from t2v_rt.runtime.step_callback import StepCallback
from t2v_rt.runtime.tuning import tuned_backend
from t2v_rt.runtime.warmup import Preparation

Array = NDArray[np.float32]


class TextToVideoPipeline(DiffusersHabits, Preparation):
    """Prompt in, frames out; made by `from_pretrained`.

    Engines are loaded at their first use and kept, as many as fit the memory of the card or `vram_budget`. Calls from
    several threads do not mix: a call works on its own copy of `scheduler` and its own engine state.

    A pickled or deeply copied pipeline opens its bundle again and loads engines of its own; `copy.copy` gives one that
    shares the engines and has a scheduler of its own. A forked process loads its own engines at its first call.

    Args:
        bundle: the opened bundle.
        backend: loads its engines.
        vram_budget: bytes the engines may take together; None for what the card has free when a call begins.
        vae_tiles: tiles of the VAE decoder, from top to bottom and from left to right; None for as few as the budget
            allows.
        prompt_cache: whether prompt embeddings are kept in the user's cache.
        waits: whether a call that does not fit the budget beside those on their way waits for them to end.
        engines: sets of engines, so that as many calls of several threads have engines of their own.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        vram_budget: int | None = None,
        vae_tiles: Grid | None = None,
        prompt_cache: bool = False,
        waits: bool = True,
        engines: int = 1,
    ) -> None:
        self.bundle = bundle
        self.backend = backend
        manifest = bundle.manifest
        self._scheduler = get_scheduler(str(manifest.scheduler.get("_class_name")), manifest.scheduler)
        self._options = (backend, vram_budget, vae_tiles, prompt_cache, waits, engines)
        self._memory = memory_of(backend)  # shared with other pipelines
        self._pool = EnginePool(Stages(bundle, backend, prompt_cache), engines, vram_budget, waits, self._memory)
        self._planner = Planner(manifest, backend, self._memory, self._pool.budget, vae_tiles, engines)
        self.stages, self.admission = self._pool.sets[0].stages, self._pool.sets[0].admission

    @classmethod
    @documented_by(BackendOptions)
    def from_pretrained(
        cls,
        bundle_dir: str | Path,
        backend: str | None = None,
        vram_budget: int | str | None = None,
        *,
        provider: str | None = None,
        threads: int | None = None,
        device: int | None = None,
        vae_tiles: str | Sequence[int] | None = None,
        trust: bool = False,
        prompt_cache: bool = True,
        waits: bool = True,
        engines: int = 1,
        tuned: bool = False,
    ) -> Self:
        """Opens a bundle; its files are checked, no engine is loaded yet.

        Args:
            bundle_dir: the directory that build-engines wrote.
            vram_budget: memory the engines may take, bytes or text such as `8GiB`; None for what the
                card has free when a call begins, and no limit without a card.
            vae_tiles: tiles of the VAE decoder, `2x3` or (2, 3) for two from top to bottom and three from left to
                right: less memory, the same frames. None for as few as the budget allows.
            prompt_cache: whether prompt embeddings are kept in the user's cache, in private files, so that a text is
                encoded once on a machine.
            waits: whether a call that does not fit the budget beside those on their way (of other threads, or streams
                that are not at their end) waits for them to end; False refuses it at once.
            engines: sets of engines, each with weights of its own, among which vram_budget is divided: so many calls
                of several threads run with engines of their own, on the CPU best with `threads` to share its cores.
            tuned: whether engines get the settings that `tune` has found for this bundle on this machine.

        Raises:
            BundleError: the bundle is missing, damaged, edited or of another schema.
            BackendError: the backend is unknown, not usable here, not the bundle's, or lacks an option that is given.
            RequestError: the budget or the tiles cannot be read.
        """
        if backend is not None:
            check_backend(backend)
        bundle = open_bundle(bundle_dir)
        budget = None if vram_budget is None else parse_bytes(vram_budget)
        grid = None if vae_tiles is None else parse_grid(vae_tiles)
        opened = backend_of(bundle, backend, provider=provider, threads=threads, device=device, trust=trust)
        if tuned:
            opened = tuned_backend(bundle, opened, threads)
        return cls(bundle, opened, budget, grid, prompt_cache, waits, check_count(engines))

    @property
    def manifest(self) -> Manifest:
        """What the bundle declares."""
        return self.bundle.manifest

    @property
    def scheduler(self) -> Scheduler[Any]:
        """The sampler; a call works on a copy of it. Setting one that is not of t2v-rt raises RequestError."""
        return self._scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Scheduler[Any]) -> None:
        if not isinstance(scheduler, Scheduler):
            raise scheduler_refusal(scheduler)
        self._scheduler = scheduler

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.bundle, *self._options), {"scheduler": self.scheduler}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.scheduler = state["scheduler"]

    def __copy__(self) -> Self:
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__, _scheduler=self.scheduler.copy())
        return twin

    @property
    def vram_budget(self) -> int | None:
        """Bytes that the engines of all calls may take together, at most all of a card's; None for no limit."""
        _, budget, *_ = self._options
        return self.backend.memory_bytes if budget is None else budget

    @documented_by(CallOptions, CallArrays, CallHooks)
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
        *,
        guidance_rescale: float = 0.0,
        guidance_interval: Sequence[float] | None = None,
        cfg_zero_star: bool = False,
        zero_init_steps: int | None = None,
        guidance_batch: bool | None = None,
        step_cache: float | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        cancel: threading.Event | None = None,
        previews: bool = False,
    ) -> TextToVideoOutput:
        """Makes videos; what is left out takes the bundle's default.

        Returns:
            Frames, seed, settings, stage times and memory.

        Raises:
            RequestError: a setting is invalid, or the request does not fit in memory.
            CancelledError: `cancel` was set; the pipeline can be called again.
            EngineError: an engine failed or gave values that are not finite.
        """
        options = CallOptions(
            prompt=prompt,
            negative_prompt=negative_prompt,
            height=height,
            width=width,
            num_frames=num_frames,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            num_videos_per_prompt=num_videos_per_prompt,
            seed=seed,
            output_type=output_type,
            guidance_rescale=guidance_rescale,
            guidance_interval=guidance_interval,
            cfg_zero_star=cfg_zero_star,
            zero_init_steps=zero_init_steps,
            guidance_batch=guidance_batch,
            step_cache=step_cache,
            timesteps=timesteps,
            sigmas=sigmas,
        )
        arrays = CallArrays(generator, latents, prompt_embeds, negative_prompt_embeds)
        hooks = CallHooks(callback_on_step_end, callback_on_step_end_tensor_inputs, progress, cancel, previews)
        request = make_request(self.manifest, options, arrays)
        kept_frames = 0 if output_type == "latent" else request.batch * request.num_frames
        return make_output(self._run(request, kept_frames, hooks), generator)

    generate = __call__

    @documented_by(CallOptions, CallArrays, CallHooks)
    def stream(
        self,
        prompt: Prompt | None = None,
        *,
        negative_prompt: Prompt | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_videos_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        generator: Generator | None = None,
        latents: NDArray[Any] | None = None,
        prompt_embeds: NDArray[Any] | None = None,
        negative_prompt_embeds: NDArray[Any] | None = None,
        output_type: str = "np",
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        progress: Progress | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: Sequence[float] | None = None,
        cfg_zero_star: bool = False,
        zero_init_steps: int | None = None,
        guidance_batch: bool | None = None,
        step_cache: float | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        cancel: threading.Event | None = None,
        previews: bool = False,
    ) -> FrameStream:
        """Makes one video and yields its frames as the VAE decodes them; only one chunk is held at a time.

        Args:
            output_type: "np" yields float32 frames (H, W, 3) in [0, 1], "uint8" yields uint8 ones.

        Returns:
            An iterator over frames that also tells seed, settings, latents and times. The request is validated at
            once; sampling begins with the first frame asked for.

        Raises:
            RequestError: an invalid setting, more than one video, or another output type.
        """
        options = CallOptions(
            prompt=prompt,
            negative_prompt=negative_prompt,
            height=height,
            width=width,
            num_frames=num_frames,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            num_videos_per_prompt=num_videos_per_prompt,
            seed=seed,
            output_type=output_type,
            guidance_rescale=guidance_rescale,
            guidance_interval=guidance_interval,
            cfg_zero_star=cfg_zero_star,
            zero_init_steps=zero_init_steps,
            guidance_batch=guidance_batch,
            step_cache=step_cache,
            timesteps=timesteps,
            sigmas=sigmas,
        )
        arrays = CallArrays(generator, latents, prompt_embeds, negative_prompt_embeds)
        hooks = CallHooks(callback_on_step_end, callback_on_step_end_tensor_inputs, progress, cancel, previews)
        return self.open_stream(options, arrays, hooks)

    def open_stream(self, options: CallOptions, arrays: CallArrays, hooks: CallHooks) -> FrameStream:
        """Makes one video as `stream` does, for callers that hold its arguments as values.

        Args:
            options: what is asked for.
            arrays: what takes the place of prompts, noise or the seed.
            hooks: what the stream tells on its way, and what can change or end it.
        """
        request, kind = make_request(self.manifest, options, arrays), options.output_type
        if request.batch != 1 or kind not in ("np", "uint8"):
            raise RequestError(
                f"stream makes one video of output_type np or uint8; {request.batch} of {kind!r} were asked for"
            )
        _, kept_frames = self.manifest.model.decode.next
        return FrameStream(self._run(request, kept_frames, hooks), arrays.generator)

    def plan(self, request: Request, kept_frames: int = 0, previews: bool = False) -> MemoryPlan:
        """What a request takes in each stage under the budget, what stays loaded when, and how guidance is made.

        Args:
            request: from `make_request`.
            kept_frames: frames that are held at once as float32 results.
            previews: whether the VAE decoder makes previews between the steps.
        """
        return self._planner.plan(request, kept_frames, previews)

    def encode_prompt(self, texts: Sequence[str]) -> Array:
        """Prompt embeddings float32 (B, L, D) of texts, or of one, padded with zeros; remembered for later calls."""
        plan = self.plan(make_request(self.manifest, CallOptions(prompt="", seed=0))).of_stage("encode")
        with self._pool.taken() as one, one.admission.admitted(plan) as plan, one.stages.components.following(plan):
            return one.stages.encode_prompt([texts] if isinstance(texts, str) else texts, plan)

    def decode(self, latents: Array, progress: Progress | None = None) -> Iterator[Array]:
        """Decodes one video's latents, chunk by chunk.

        Args:
            latents: float32 (1, C, F, H, W), as sampled (output_type "latent").
            progress: called as `f("decode", done, total)`.

        Returns:
            An iterator over chunks (f, H, W, 3) float32 in [0, 1], as many frames each as the model's schedule says.

        Raises:
            RequestError: latents of another shape, or more than there is memory for.
            EngineError: the VAE failed or gave values that are not finite.
        """
        return self._decode(check_latents(self.manifest.model, latents, videos=1), progress)

    def _decode(self, latents: Array, progress: Progress | None) -> Iterator[Array]:
        plan = self._planner.of_latents(latents.shape).of_stage("decode")
        with self._pool.taken() as one, one.admission.admitted(plan) as plan, one.stages.components.following(plan):
            yield from one.stages.decode(latents, plan, progress)

    def preview(self, latents: NDArray[Any]) -> NDArray[np.uint8]:
        """A quick look at latents, for `callback_on_step_end`; see `t2v_rt.runtime.preview`.

        Args:
            latents: float (B, C, F, h, w), at any step.

        Returns:
            uint8 (B, F, h, w, 3), one small image for each latent frame.

        Raises:
            RequestError: not such an array.
            PreviewError: the VAE failed; a step callback may leave it uncaught, the call warns once and goes on with
                its tensors as they were.
        """
        return preview(self._pool.stages, check_latents(self.manifest.model, latents))

    def _run(self, request: Request, kept_frames: int, hooks: CallHooks) -> Run:
        """A run of a request that fits, on its own copy of the scheduler."""
        check_profiles(self.manifest.profiles, request.height, request.width, request.num_frames)
        plan = self.plan(request, kept_frames, hooks.previews)
        check_room(self.manifest, request, plan, self.backend.own_memory)
        warn_of_spilling(plan, self._memory.room.free_bytes)
        request = replace(request, guidance_batch=plan.one_batch)
        return Run(self._pool, self.scheduler.copy(), request, plan, hooks, owner=self)

    def _with_backend(self, backend: Backend) -> Self:
        """Another pipeline of the bundle, with one set of engines that are loaded by another backend."""
        _, budget, tiles, prompt_cache, waits, _ = self._options
        return type(self)(self.bundle, backend, budget, tiles, prompt_cache, waits)

    def close(self) -> None:
        """Releases all engines; a later call loads them again. What a run on its way uses goes when that ends."""
        self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
