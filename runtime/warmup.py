"""What can be done before the first call: engines are loaded and run at the shape of the calls to come, or tuned."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

from t2v_rt.engines.backends import Backend
from t2v_rt.engines.bundle.store import Bundle
from t2v_rt.runtime.denoise.denoiser import Denoiser, Prompts
from t2v_rt.runtime.engine_pool import EnginePool, EngineSet
from t2v_rt.runtime.memory.plan import MemoryPlan
from t2v_rt.runtime.noise import Generator
from t2v_rt.runtime.options import CallOptions
from t2v_rt.runtime.request import Request, make_request
from t2v_rt.runtime.run import CallHooks, Run
from t2v_rt.runtime.tuning import EngineSettings, check_tunable, choose

TIMESTEP = 500.0  # any that models are trained on will do
CHUNKS = 2  # of a video: the first, and one of those that follow, which have an engine of their own
ROUNDS = 5  # of a setting that is measured, of which the quickest counts: what else runs only ever slows one down


def warm_up(engines: EngineSet, request: Request, plan: MemoryPlan) -> dict[str, float]:
    """Runs each stage once, as a call would: one text, one prediction, two chunks.

    Args:
        engines: to load and run; what the plan does not keep is released again.
        request: its shape and guidance count.
        plan: of the request.

    Returns:
        Seconds of `encode`, `denoise` and `decode`, loading included.

    Raises:
        RequestError: it does not fit beside the runs that are on their way.
        EngineError: an engine failed.
    """
    stages, model = engines.stages, engines.stages.manifest.model
    seconds: dict[str, float] = {}

    @contextmanager
    def timed(stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds[stage] = time.perf_counter() - start

    with engines.admission.admitted(plan) as admitted, stages.components.following(admitted):
        with timed("encode"):
            embeds = stages.encode_anew("", admitted).repeat(request.batch, 0)
        latents = Generator(0).randn(request.latent_shape(model))
        with timed("denoise"), stages.components.stage("transformer", admitted) as component:
            guided = request.guidance.needs_negative
            prompts = Prompts(embeds, embeds if guided else None)
            denoiser = Denoiser(component, stages.text, prompts, admitted.one_batch)
            denoiser.predict(latents, TIMESTEP, 2 if guided else 1)
        with timed("decode"):
            frames = sum(model.decode.chunks(latents.shape[2])[:CHUNKS])
            for _ in stages.decode(latents[:1, :, :frames], admitted):
                pass
    return seconds


class Preparation(ABC):
    """Base of a pipeline: what makes its first call, and then every call, as quick as it can be."""

    bundle: Bundle
    backend: Backend
    _pool: EnginePool

    def warmup(
        self,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        guidance_scale: float | None = None,
        num_videos_per_prompt: int = 1,
    ) -> dict[str, float]:
        """Loads all engines and runs each stage once, so that the first call of this shape is as quick as the second.

        Args:
            height: height in pixels of the calls to come; None for the bundle's default.
            width: width in pixels of the calls to come; None for the bundle's default.
            num_frames: frames of a video of the calls to come; None for the bundle's default.
            guidance_scale: strength of guidance of the calls to come; None for the bundle's default.
            num_videos_per_prompt: videos that a call to come will make.

        Returns:
            Seconds of `encode`, `denoise` and `decode`, loading included, of all sets of engines together.

        Raises:
            RequestError: a setting is invalid, or the request does not fit in memory.
            EngineError: an engine failed.
        """
        options = CallOptions(
            prompt="",
            seed=0,
            height=height,
            width=width,
            num_frames=num_frames,
            guidance_scale=guidance_scale,
            num_videos_per_prompt=num_videos_per_prompt,
        )
        run = self._run(make_request(self.bundle.manifest, options), 0, CallHooks())
        each = [warm_up(engines, run.request, run.plan) for engines in self._pool.sets]
        return {stage: sum(seconds[stage] for seconds in each) for stage in each[0]}

    def tune(
        self, height: int | None = None, width: int | None = None, num_frames: int | None = None
    ) -> EngineSettings:
        """Measures which settings of engines are the quickest here, and keeps them for openings with `tuned=True`.

        They belong to the bundle and the machine, and leave every byte of a video as it is. Each is measured with
        engines of its own, one after another, while nothing else should run. What was found before is replaced.

        Args:
            height: height in pixels of the calls to come; None for the bundle's default.
            width: width in pixels of the calls to come; None for the bundle's default.
            num_frames: frames of a video of the calls to come; None for the bundle's default.

        Returns:
            What was chosen; this pipeline goes on as it was.

        Raises:
            BackendError: the engines run on a GPU.
            RequestError: a size is invalid, or does not fit in memory.
        """
        manifest = self.bundle.manifest
        check_tunable(manifest.backend, self.backend)
        request = make_request(
            manifest, CallOptions(prompt="", seed=0, height=height, width=width, num_frames=num_frames)
        )
        chunks = len(manifest.model.decode.chunks(request.latent_shape(manifest.model)[2]))

        def seconds(settings: EngineSettings) -> float:
            with self._with_backend(settings.applied(self.backend)) as pipe:
                pipe.warmup(height, width, num_frames)
                rounds = [pipe.warmup(height, width, num_frames) for _ in range(ROUNDS)]
            denoise, decode = (min(taken[stage] for taken in rounds) for stage in ("denoise", "decode"))
            return denoise * request.num_inference_steps + decode * chunks / min(chunks, CHUNKS)

        return choose(self.bundle, self.backend, seconds)

    @abstractmethod
    def _run(self, request: Request, kept_frames: int, hooks: CallHooks) -> Run:
        """A run of a request that fits."""

    @abstractmethod
    def _with_backend(self, backend: Backend) -> Self:
        """Another pipeline of the bundle, whose engines are loaded by another backend."""

    @abstractmethod
    def __enter__(self) -> Self: ...

    @abstractmethod
    def __exit__(self, *error: object) -> None: ...
