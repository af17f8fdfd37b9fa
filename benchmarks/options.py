"""What is asked of a measurement."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from t2v_rt.benchmarks.peers import OTHERS
from t2v_rt.benchmarks.workloads import Job, Workload, workload
from t2v_rt.engines.bundle.manifest import Manifest
from t2v_rt.errors import RequestError
from t2v_rt.numbers import as_integer, as_number
from t2v_rt.options import option
from t2v_rt.runtime.options import BackendOptions, CallOptions
from t2v_rt.runtime.request import make_request

RUNS, WARMUPS = 5, 2  # as video benchmarks have them: a run takes long, and the first ones are slower
PROMPT = "a red ball bouncing on a blue background"


@dataclass(frozen=True, kw_only=True)
class BenchOptions(BackendOptions):
    """The options of the command.

    Args:
        bundle: folder that build-engines wrote.
        runs: measured runs of each workload; more where they take less than `duration` together.
        warmup: runs before them that are not counted; the first call of all is one more, and told apart.
        duration: seconds that the measured runs of a workload take at least; no limit where it is left out.
        peer: somebody to be measured in turn with t2v-rt; may be given several times.
        workload: what is measured; may be given several times; whole calls where it is left out.
        checkpoint: folder that the bundle was built from; peers such as diffusers run on it.
        prompt: text of each call.
        height: height of the video in pixels; the bundle's default where it is left out.
        width: width of the video in pixels; the bundle's default where it is left out.
        num_frames: frames of the video; the bundle's default where it is left out.
        num_inference_steps: denoising steps; the bundle's default where it is left out.
        guidance_scale: strength of guidance; the bundle's default where it is left out.
        latents_seed: seed of the noise that every run begins with, of all peers alike.
        output: folder that takes the result as JSON and a page with plots, which takes t2v-rt[bench].

    Raises:
        RequestError: a value is out of its range, or a peer or workload is unknown.
    """

    bundle: str = option(positional=True, metavar="BUNDLE", help="folder that build-engines wrote, or the word compare")
    runs: int = option(RUNS, read=int, metavar="COUNT")
    warmup: int = option(WARMUPS, read=int, metavar="COUNT")
    duration: float | None = option(None, read=float, metavar="SECONDS")
    peer: tuple[str, ...] = option((), repeated=True, metavar="NAME")
    workload: tuple[str, ...] = option((), repeated=True, metavar="NAME")
    checkpoint: str | None = option(None, metavar="FOLDER")
    prompt: str = option(PROMPT, metavar="TEXT")
    height: int | None = option(None, read=int, metavar="PIXELS")
    width: int | None = option(None, read=int, metavar="PIXELS")
    num_frames: int | None = option(None, read=int, metavar="COUNT")
    num_inference_steps: int | None = option(None, read=int, metavar="COUNT")
    guidance_scale: float | None = option(None, read=float, metavar="SCALE")
    latents_seed: int = option(0, read=int, metavar="SEED")
    output: str | None = option(None, metavar="FOLDER")

    def __post_init__(self) -> None:
        for name, least in (("runs", 1), ("warmup", 0)):
            number = as_integer(getattr(self, name))
            if number is None or number < least:
                raise RequestError(f"{name} is {getattr(self, name)!r}; expected an integer of {least} or more")
        duration = None if self.duration is None else as_number(self.duration)
        if self.duration is not None and (duration is None or duration <= 0):
            raise RequestError(f"duration is {self.duration!r}; expected seconds, more than 0")
        for name in self.peer:
            if name not in OTHERS:
                raise RequestError(f"peer {name!r} is unknown; expected one of {', '.join(OTHERS)}")
        for name in self.workload:
            workload(name)
        object.__setattr__(self, "peer", tuple(dict.fromkeys(self.peer)))
        object.__setattr__(self, "workload", tuple(dict.fromkeys(self.workload)) or ("call",))

    def job(self, manifest: Manifest, asked: Workload) -> Job:
        """What each process is given for a workload; raises RequestError where the model cannot make such a video."""
        height, width, num_frames = asked.size or (self.height, self.width, self.num_frames)
        request = make_request(
            manifest,
            CallOptions(
                prompt=self.prompt,
                height=height,
                width=width,
                num_frames=num_frames,
                num_inference_steps=self.num_inference_steps,
                guidance_scale=self.guidance_scale,
                seed=self.latents_seed,
            ),
        )
        return Job(
            kind=asked.kind,
            bundle=str(Path(self.bundle).resolve()),
            checkpoint=None if self.checkpoint is None else str(Path(self.checkpoint).resolve()),
            height=request.height,
            width=request.width,
            num_frames=request.num_frames,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance.scale,
            prompt=self.prompt,
            negative_prompt=request.negative_prompts[0],
            latents_seed=self.latents_seed,
            backend=self.backend,
            provider=self.provider,
            device=self.device,
            threads=self.threads,
            trust=self.trust,
        )

    def settings(self) -> dict[str, Any]:
        """As plain JSON values."""
        plain = vars(replace(self, output=None))
        return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}
