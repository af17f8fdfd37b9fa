"""The text-to-video pipeline: a bundle opened once, called many times."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from t2v_rt.engines import platform
from t2v_rt.engines.backends import Backend, backend_of, check_backend
from t2v_rt.engines.bundle import Bundle, open_bundle
from t2v_rt.engines.manifest import Manifest
from t2v_rt.engines.plans import check_profiles
from t2v_rt.errors import RequestError
from t2v_rt.runtime import wan
from t2v_rt.runtime.denoiser import one_batch_is_faster
from t2v_rt.runtime.diffusers_habits import DiffusersHabits, scheduler_refusal
from t2v_rt.runtime.memory_plan import MemoryPlan, advise, largest_fitting, on_card, parse_bytes
from t2v_rt.runtime.noise import Generator
from t2v_rt.runtime.output import TextToVideoOutput
from t2v_rt.runtime.preview import preview
from t2v_rt.runtime.request import Prompt, Request, check_latents, make_request
from t2v_rt.runtime.run import FrameStream, Run, make_output
from t2v_rt.runtime.scheduler_base import Scheduler
from t2v_rt.runtime.schedulers import get_scheduler
from t2v_rt.runtime.stages import Progress, Stages
from t2v_rt.runtime.tiles import Grid, parse_grid

Array = NDArray[np.float32]
StepCallback = Callable[["TextToVideoPipeline", int, float, dict[str, Any]], Mapping[str, Any] | None]


class TextToVideoPipeline(DiffusersHabits):
    """Prompt in, frames out; made by `from_pretrained`.

    Engines are loaded at their first use and kept, unless `vram_budget` is too small for all at once. Calls from
    several threads do not mix: a call works on its own copy of `scheduler` and its own engine state.

    A pickled or deeply copied pipeline opens its bundle again and loads engines of its own; `copy.copy` gives one that
    shares the engines and has a scheduler of its own. A forked process loads its own engines at its first call.

    Args:
        bundle: the opened bundle.
        backend: loads its engines.
        vram_budget: bytes the engines may take together; None for all that the device has of its own.
        provider: of ONNX Runtime; decides how guidance makes its two predictions where a call does not say.
        vae_tiles: tiles of the VAE decoder, from top to bottom and from left to right; None for as few as the budget
            allows.
        prompt_cache: whether prompt embeddings are kept in the user's cache.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        vram_budget: int | None = None,
        provider: str = "cpu",
        vae_tiles: Grid | None = None,
        prompt_cache: bool = False,
    ) -> None:
        self.bundle = bundle
        self.provider = provider
        manifest = bundle.manifest
        self._scheduler = get_scheduler(str(manifest.scheduler.get("_class_name")), manifest.scheduler)
        self._options = (backend, vram_budget, provider, vae_tiles, prompt_cache)
        self.vram_budget = backend.memory_bytes if vram_budget is None else vram_budget
        self.stages = Stages(bundle, backend, self.vram_budget, vae_tiles, prompt_cache)

    @classmethod
    def from_pretrained(
        cls,
        bundle_dir: str | Path,
        backend: str | None = None,
        vram_budget: int | str | None = None,
        *,
        provider: str = "cpu",
        threads: int | None = None,
        vae_tiles: str | Sequence[int] | None = None,
        trust: bool = False,
        prompt_cache: bool = True,
    ) -> Self:
        """Opens a bundle; its files are checked, no engine is loaded yet.

        Args:
            bundle_dir: the directory that build-engines wrote.
            backend: must be the one the bundle was built for; None takes that one.
            vram_budget: memory the engines may take, bytes or text such as `8GiB`; None for no limit but the card's.
            provider: of ONNX Runtime, `cpu` or `cuda`.
            threads: per engine on the CPU; None for as many as there are cores.
            vae_tiles: tiles of the VAE decoder, `2x3` or (2, 3) for two from top to bottom and three from left to
                right: less memory, the same frames. None for as few as the budget allows.
            trust: whether plans may be run that were not built on this machine by this user; they are native code.
            prompt_cache: whether prompt embeddings are kept in the user's cache, in private files, so that a text is
                encoded once on a machine.

        Raises:
            BundleError: the bundle is missing, damaged, edited or of another schema.
            BackendError: the backend is unknown, not usable here, or not the bundle's.
            RequestError: the budget or the tiles cannot be read.
        """
        if backend is not None:
            check_backend(backend)
        bundle = open_bundle(bundle_dir)
        budget = None if vram_budget is None else parse_bytes(vram_budget)
        grid = None if vae_tiles is None else parse_grid(vae_tiles)
        engines = backend_of(bundle, backend, provider=provider, threads=threads, trust=trust)
        return cls(bundle, engines, budget, provider, grid, prompt_cache)

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
            seed: one for all videos, or a list with one for each; None or -1 draws one (see the result's `seed`).
            generator: instead of seed, one or a list.
            latents: float (B, C, F, H, W) to start from instead of noise; they set the video's size.
            prompt_embeds: float (B, L, D) instead of prompt.
            negative_prompt_embeds: float (B, L, D) instead of negative_prompt.
            output_type: "np", "uint8", "pil" or "latent".
            callback_on_step_end: called as `f(pipe, step, timestep, tensors)` after each step; tensors it returns
                (`latents`, `prompt_embeds`, `negative_prompt_embeds`) replace the current ones.
            callback_on_step_end_tensor_inputs: names of the tensors it is given.
            progress: called as `f(stage, done, total)`.
            guidance_rescale: 0 to 1, against the over-exposure of high guidance (see `Guidance`).
            guidance_interval: (start, stop), fractions of the steps that are guided; None for all.
            cfg_zero_star: CFG-Zero* guidance.
            zero_init_steps: first steps that predict zero under CFG-Zero*; None for 1.
            guidance_batch: both predictions of a step in one batch (True) or in two calls (False); None chooses by size
                (see `one_batch_is_faster`), and two calls where memory is short; `settings` tells what was chosen.
            step_cache: threshold of the step cache (see `StepCache`); None or 0 turns it off.
            timesteps: the schedule itself, instead of num_inference_steps.
            sigmas: likewise, as noise levels.
            cancel: checked before each denoiser call and each chunk of the VAE; once set, the call ends.

        Returns:
            Frames, seed, settings, stage times and memory.

        Raises:
            RequestError: a setting is invalid, or the request does not fit in memory.
            CancelledError: `cancel` was set; the pipeline can be called again.
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
            guidance_rescale=guidance_rescale,
            guidance_interval=guidance_interval,
            cfg_zero_star=cfg_zero_star,
            zero_init_steps=zero_init_steps,
            guidance_batch=guidance_batch,
            step_cache=step_cache,
            timesteps=timesteps,
            sigmas=sigmas,
        )
        kept_frames = 0 if output_type == "latent" else request.batch * request.num_frames
        run = self._run(
            request, kept_frames, callback_on_step_end, callback_on_step_end_tensor_inputs, progress, cancel
        )
        return make_output(run, generator)

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
        cancel: threading.Event | None = None,
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
            cancel: as in the call; checked on the way, so the next frame asked for raises CancelledError.
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
        kept_frames = self.manifest.model.temporal_factor
        run = self._run(
            request, kept_frames, callback_on_step_end, callback_on_step_end_tensor_inputs, progress, cancel
        )
        return FrameStream(run, generator)

    def choose_guidance_batch(self, request: Request, kept_frames: int) -> Request:
        """Decides where the request does not say whether both predictions of a step are made in one batch.

        Args:
            request: whose `guidance_batch` may be None.
            kept_frames: frames that are held at once.

        Returns:
            The request with `guidance_batch` True or False: one batch where it was asked for, or where it is faster and
            fits in memory.
        """
        together = request.guidance_batch
        if not request.guidance.needs_negative:
            together = False
        if together is None:
            _, _, frames, rows, columns = self.latent_shape(request)
            depth, height, width = self.manifest.model.patch
            tokens = request.batch * (frames // depth) * (rows // height) * (columns // width)
            where = "card" if on_card(self.manifest) else self.provider
            together = one_batch_is_faster(where, tokens) and self._fits(request, kept_frames)
        return replace(request, guidance_batch=together)

    def _fits(self, request: Request, kept_frames: int) -> bool:
        try:
            self.check_memory(replace(request, guidance_batch=True), kept_frames)
        except RequestError:
            return False
        return True

    def check_memory(self, request: Request, kept_frames: int) -> None:
        """Refuses a request that cannot fit, before anything is allocated; `kept_frames` are held at once.

        Raises:
            RequestError: the engines were built for other sizes, or more is needed than there is or the budget allows;
                names the nearest video that they make, or the largest that fits.
        """
        size = request.height, request.width, request.num_frames
        check_profiles(self.manifest.profiles, *size)
        plan = self.plan(request)
        checks = [] if self.vram_budget is None else [(plan, self.vram_budget, "the budget")]
        if not on_card(self.manifest):
            available = platform.available_memory_bytes()
            checks.insert(0, (self.plan(request, kept_frames), available, "the memory available"))
        for needs, room, what in checks:
            if needs.least_bytes > room:
                best = largest_fitting(self.manifest, *size, room)
                raise RequestError(needs.refusal(room, what, advise(self.manifest, best)))
        self.stages.follow(plan)

    def plan(self, request: Request, kept_frames: int = 0) -> MemoryPlan:
        """What a request takes in each stage under the budget, and what stays loaded when.

        Args:
            request: from `make_request`.
            kept_frames: frames that are held at once as float32 results.
        """
        shape = self.latent_shape(request)
        return self.stages.plan(shape, kept_frames=kept_frames, one_batch=bool(request.guidance_batch))

    def latent_shape(self, request: Request) -> tuple[int, ...]:
        """(B, C, F, H, W) of a request's latents."""
        return wan.latent_shape(self.manifest.model, request.batch, request.height, request.width, request.num_frames)

    # -- stages on their own -----------------------------------------------------------------------------------------

    def encode_prompt(self, texts: Sequence[str]) -> Array:
        """Prompt embeddings float32 (B, L, D) of texts, or of one, padded with zeros; remembered for later calls."""
        return self.stages.encode_prompt([texts] if isinstance(texts, str) else texts)

    def decode(self, latents: Array, progress: Progress | None = None) -> Iterator[Array]:
        """Decodes one video's latents; see `Stages.decode`."""
        return self.stages.decode(check_latents(self.manifest.model, latents), progress)

    def preview(self, latents: NDArray[Any]) -> NDArray[np.uint8]:
        """A quick look at latents, for `callback_on_step_end`; see `t2v_rt.runtime.preview`.

        Args:
            latents: float (B, C, F, h, w), at any step.

        Returns:
            uint8 (B, F, h, w, 3), one small image for each latent frame.

        Raises:
            RequestError: not such an array.
            EngineError: the VAE failed.
        """
        return preview(self.stages, check_latents(self.manifest.model, latents))

    def _run(
        self,
        request: Request,
        kept_frames: int,
        callback: StepCallback | None,
        names: Sequence[str],
        progress: Progress | None,
        cancel: threading.Event | None,
    ) -> Run:
        """A run of a request that fits, on its own copy of the scheduler."""
        request = self.choose_guidance_batch(request, kept_frames)
        self.check_memory(request, kept_frames)
        bound = None if callback is None else partial(callback, self)
        return Run(self.stages, self.scheduler.copy(), request, bound, names, progress, cancel)

    def close(self) -> None:
        """Releases all engines; a later call loads them again."""
        self.stages.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
