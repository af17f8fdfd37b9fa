"""t2v-rt itself: its pipeline, opened once and called again and again, with what a call spends where."""

from __future__ import annotations

import hashlib
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t2v_rt.benchmarks.peers import Runner, Times
from t2v_rt.benchmarks.recorder import ENGINE, Event, RecordedBackend, Recorder, Sizes, recorded_scheduler
from t2v_rt.benchmarks.stage_times import stage_times
from t2v_rt.benchmarks.timing import seconds
from t2v_rt.benchmarks.workloads import CALL, CHUNK, DECODE, DENOISER, ENCODER, TIMESTEP, Job
from t2v_rt.engines.backends import Backend, backend_of
from t2v_rt.engines.bundle.store import Bundle, open_bundle
from t2v_rt.runtime.denoise.denoiser import Denoiser, Prompts
from t2v_rt.runtime.families import ChunkDecoder, family_of
from t2v_rt.runtime.frames import denormalize, to_uint8, to_unit_range
from t2v_rt.runtime.memory.estimates import Way
from t2v_rt.runtime.memory.plan import to_json
from t2v_rt.runtime.options import CallOptions
from t2v_rt.runtime.pipeline import TextToVideoPipeline
from t2v_rt.runtime.request import CallArrays, make_request
from t2v_rt.runtime.video import open_writer

WHOLE: Way = ((1, 1), False)  # the VAE decoder undivided
FILE = "video.mp4"
ON_HOST = "none: engines read and write the machine's memory"
ON_CARD = "copies to and from the card are within the engines' times, which wait for them"
SAME_NUMBERS = 1e-3  # float32 by other kernels: a whole call adds up the rounding of its steps
MakeBackend = Callable[[Bundle, Job], Backend]


def own_backend(bundle: Bundle, job: Job) -> Backend:
    """The backend that the bundle was built for."""
    return backend_of(
        bundle, job.backend, provider=job.provider, threads=job.threads, device=job.device, trust=job.trust
    )


def nothing_missing(job: Job) -> str:
    """t2v-rt can do every job."""
    return ""


@dataclass(frozen=True)
class PipelinePeer:
    """t2v-rt's pipeline over some backend.

    Args:
        make_backend: makes it ready for a bundle.
        why_missing: says why it cannot be had.
        tolerance: see `Peer`.
    """

    make_backend: MakeBackend = own_backend
    why_missing: Callable[[Job], str] = nothing_missing
    tolerance: float = SAME_NUMBERS

    def missing(self, job: Job) -> str:
        return self.why_missing(job)

    def open(self, job: Job) -> Runner:
        recorder = Recorder()
        start = time.perf_counter()
        bundle = open_bundle(job.bundle)
        backend = RecordedBackend(self.make_backend(bundle, job), recorder)
        pipe = TextToVideoPipeline(bundle, backend)
        opened = time.perf_counter() - start
        pipe.scheduler = recorded_scheduler(pipe.scheduler, recorder)
        return RUNNERS[job.kind](pipe, job, recorder, opened)


class PipelineRunner(ABC):
    """What all runners over a pipeline share.

    Args:
        pipe: opened.
        job: to do.
        recorder: of its engines and its sampler.
        opened: seconds that opening it took.
    """

    def __init__(self, pipe: TextToVideoPipeline, job: Job, recorder: Recorder, opened: float) -> None:
        self.pipe, self.job, self.recorder, self.opened = pipe, job, recorder, opened
        self.latents = job.latents(pipe.manifest.model)
        self.start = self.end = 0.0
        self.events: list[Event] = []
        self.calls: dict[tuple[str, str, Sizes], list[list[float]]] = {}  # of engines -> times of each run

    def prepare(self) -> None:
        """Nothing is remembered from run to run but what is loaded."""
        self.pipe.stages.forget_prompts()

    def run(self) -> NDArray[np.float32]:
        """Does the work once, and takes down what happens."""
        self.recorder.take()
        self.start = time.perf_counter()
        result = self.work()
        self.end = time.perf_counter()
        self.events = self.recorder.take()
        found: dict[tuple[str, str, Sizes], list[float]] = {}
        for event in self.events:
            if event.kind == ENGINE:
                found.setdefault((event.name, event.role, event.sizes), []).append(event.seconds)
        for key, times in found.items():
            self.calls.setdefault(key, []).append(times)
        return result

    @abstractmethod
    def work(self) -> NDArray[np.float32]:
        """What a run does."""

    def stages(self) -> Times:
        return stage_times(self.events, self.start, self.end)

    def facts(self) -> Mapping[str, Any]:
        """How long opening took, and the engine calls of a run: their sizes, how many there were, and their seconds.

        Seconds are the median of all runs but the first, where there are more.
        """
        return {
            "open_seconds": self.opened,
            "transfers": ON_CARD if self.pipe.backend.own_memory else ON_HOST,
            "engine_calls": [
                {
                    "component": name,
                    "role": role,
                    "sizes": dict(sizes),
                    "calls": len(runs[-1]),
                    "seconds": median(map(sum, runs[1:] or runs)),
                }
                for (name, role, sizes), runs in self.calls.items()
            ],
        }

    def close(self) -> None:
        self.pipe.close()


class CallRunner(PipelineRunner):
    """Whole calls."""

    def __init__(self, pipe: TextToVideoPipeline, job: Job, recorder: Recorder, opened: float) -> None:
        super().__init__(pipe, job, recorder, opened)
        self.frames: NDArray[np.float32] | None = None

    def work(self) -> NDArray[np.float32]:
        job = self.job
        out = self.pipe(
            job.prompt,
            job.negative_prompt,
            num_inference_steps=job.num_inference_steps,
            guidance_scale=job.guidance_scale,
            seed=job.latents_seed,
            latents=self.latents,
            progress=self.recorder.mark,
        )
        self.frames = out.frames[0]
        return self.frames

    def stages(self) -> Times:
        """The stages of the call, and those that are measured after it: tokenizing alone, and the file."""
        tokenizer, job = self.pipe.stages.tokenizer, self.job
        texts = [job.prompt, job.negative_prompt] if job.guidance_scale > 1 else [job.prompt]
        return {
            **super().stages(),
            "tokenize": [seconds(lambda: [tokenizer.encode(text) for text in texts])],
            "file": [seconds(self._write)],
        }

    def _write(self) -> None:
        assert self.frames is not None
        count, height, width, _ = self.frames.shape
        with tempfile.TemporaryDirectory() as folder:
            size = {"width": width, "height": height, "num_frames": count}
            fps = self.pipe.manifest.defaults.fps
            with open_writer(Path(folder) / FILE, fps=fps, metadata={}, **size) as writer:
                for frame in to_uint8(self.frames):
                    writer.write(frame)

    def facts(self) -> Mapping[str, Any]:
        """With the memory plan of the call, and a hash of its frames as a file would hold them."""
        job, model = self.job, self.pipe.manifest.model
        options = CallOptions(
            prompt=job.prompt,
            negative_prompt=job.negative_prompt,
            num_inference_steps=job.num_inference_steps,
            guidance_scale=job.guidance_scale,
            seed=job.latents_seed,
        )
        request = make_request(self.pipe.manifest, options, CallArrays(latents=self.latents))
        plan = self.pipe.plan(request, request.num_frames)
        assert self.frames is not None
        return {
            **super().facts(),
            "plan": to_json(plan),
            "results_bytes": plan.results_bytes,
            "one_batch": plan.one_batch,
            "tokens": request.tokens(model),
            "frames": int(self.frames.shape[0]),
            "frames_sha256": hashlib.sha256(to_uint8(self.frames).tobytes()).hexdigest(),
        }


class DenoiserRunner(PipelineRunner):
    """One prediction at a time."""

    def work(self) -> NDArray[np.float32]:
        component = self.pipe.stages.components.get("transformer")
        prompts = Prompts(self.job.embeds(self.pipe.manifest.model), None)
        denoiser = Denoiser(component, self.pipe.stages.text, prompts, together=False)
        (prediction,) = denoiser.predict(self.latents, TIMESTEP, 1)
        return prediction


class EncoderRunner(PipelineRunner):
    """The prompt to its embeddings."""

    def work(self) -> NDArray[np.float32]:
        return self.pipe.encode_prompt([self.job.prompt])


class ChunkRunner(PipelineRunner):
    """The second chunk of a video, after the first has been decoded."""

    def __init__(self, pipe: TextToVideoPipeline, job: Job, recorder: Recorder, opened: float) -> None:
        super().__init__(pipe, job, recorder, opened)
        self._first = pipe.manifest.model.decode.chunks(self.latents.shape[2])[0]
        self._decoder: ChunkDecoder | None = None

    def prepare(self) -> None:
        vae = self.pipe.stages.components.get("vae_decoder")
        self._decoder = family_of(self.pipe.manifest.model).open_decoder(vae, self.latents.shape, WHOLE)
        self._decoder.decode(self._denormalized(slice(0, self._first)))

    def work(self) -> NDArray[np.float32]:
        assert self._decoder is not None
        return to_unit_range(self._decoder.decode(self._denormalized(slice(self._first, None))))

    def _denormalized(self, part: slice) -> NDArray[np.float32]:
        return denormalize(self.pipe.manifest.model.latents, self.latents[:, :, part])


class DecodeRunner(PipelineRunner):
    """The latents of a video to its frames, of which all are held, as a call does."""

    def work(self) -> NDArray[np.float32]:
        return np.concatenate(list(self.pipe.decode(self.latents, self.recorder.mark)))


RUNNERS: Mapping[str, type[PipelineRunner]] = {
    CALL: CallRunner,
    DENOISER: DenoiserRunner,
    ENCODER: EncoderRunner,
    CHUNK: ChunkRunner,
    DECODE: DecodeRunner,
}
OURS = PipelinePeer()
