"""diffusers: its pipeline, eager or compiled, in float32 or bfloat16, on the checkpoint that a bundle is of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module, util
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t2v_rt.benchmarks.families import ReferenceFamily, reference_family
from t2v_rt.benchmarks.peers import Runner, Times
from t2v_rt.benchmarks.workloads import CALL, CHUNK, DECODE, DENOISER, ENCODER, TIMESTEP, Job
from t2v_rt.engines.bundle.model import ModelSpec
from t2v_rt.engines.bundle.store import open_bundle
from t2v_rt.runtime.frames import denormalize
from t2v_rt.system.resources import usable_threads

FLOAT32, BFLOAT16 = 1e-3, 0.1  # relative errors: rounding of other kernels; 8 bits of a product, added up over a call
PACKAGES = ("torch", "diffusers", "transformers")


@dataclass(frozen=True)
class DiffusersPeer:
    """One way to run it.

    Args:
        dtype: of weights and activations, as torch calls it.
        compiled: whether denoiser and decoder go through torch.compile.
        tolerance: see `Peer`.
    """

    dtype: str
    compiled: bool
    tolerance: float

    def missing(self, job: Job) -> str:
        absent = [name for name in PACKAGES if util.find_spec(name) is None]
        if absent:
            return f"the package {absent[0]} is not installed; install t2v-rt[export]"
        if job.checkpoint is None:
            return "it runs on a checkpoint; give --checkpoint FOLDER, the one that the bundle was built from"
        if not (Path(job.checkpoint) / "model_index.json").is_file():
            return f"{job.checkpoint} has no model_index.json; give a checkpoint in diffusers layout"
        return ""

    def open(self, job: Job) -> Runner:
        torch = import_module("torch")
        for package in ("diffusers", "transformers"):
            log = import_module(f"{package}.utils.logging")
            log.set_verbosity_error()
            log.disable_progress_bar()
        threads = usable_threads(job.threads)
        if threads is not None:
            torch.set_num_threads(threads)
        model = open_bundle(job.bundle).manifest.model
        device = "cuda" if torch.cuda.is_available() else "cpu"
        settings = Settings(job, model, reference_family(model), getattr(torch, self.dtype), device, self.compiled)
        return RUNNERS[job.kind](settings)


@dataclass(frozen=True)
class Settings:
    """What its runners are made of.

    Args:
        job: to do.
        model: constants, from the bundle.
        family: how diffusers' networks of it are called.
        dtype: of torch.
        device: of torch.
        compiled: as of `DiffusersPeer`.
    """

    job: Job
    model: ModelSpec
    family: ReferenceFamily
    dtype: Any
    device: str
    compiled: bool

    @property
    def checkpoint(self) -> Path:
        """The folder."""
        assert self.job.checkpoint is not None
        return Path(self.job.checkpoint)

    def tensor(self, array: NDArray[Any]) -> Any:
        """An array as a tensor of the dtype, on the device."""
        return import_module("torch").from_numpy(np.ascontiguousarray(array)).to(self.device, self.dtype)

    def ready(self, network: Any) -> Any:
        """A network on the device, compiled where that is asked for."""
        network = network.to(self.device).eval()
        return import_module("torch").compile(network) if self.compiled else network


class DiffusersRunner(ABC):
    """What all its runners share.

    Args:
        settings: see `Settings`.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.latents = settings.job.latents(settings.model)
        self.torch = import_module("torch")
        self.load()

    @abstractmethod
    def load(self) -> None:
        """Loads what the runs need."""

    @abstractmethod
    def work(self) -> Any:
        """What a run does; a tensor or an array."""

    def prepare(self) -> None:  # noqa: B027  # for most
        """Nothing has to be done."""

    def run(self) -> NDArray[np.float32]:
        with self.torch.inference_mode():
            result = self.work()
        if isinstance(result, np.ndarray):
            return result.astype(np.float32, copy=False)
        found: NDArray[np.float32] = result.float().cpu().numpy()  # which waits for a card
        return found

    def stages(self) -> Times:
        return {}

    def facts(self) -> Mapping[str, Any]:
        return {"device": self.settings.device, "threads": self.torch.get_num_threads()}

    def close(self) -> None:  # noqa: B027  # for all
        """The process ends next."""


class CallRunner(DiffusersRunner):
    """Whole calls of the pipeline."""

    def load(self) -> None:
        settings = self.settings
        pipeline = import_module("diffusers").DiffusionPipeline
        self.pipe = pipeline.from_pretrained(settings.checkpoint, torch_dtype=settings.dtype).to(settings.device)
        self.pipe.set_progress_bar_config(disable=True)
        if settings.compiled:
            settings.family.compile(self.pipe)

    def work(self) -> Any:
        job = self.settings.job
        out = self.pipe(
            prompt=job.prompt,
            negative_prompt=job.negative_prompt,
            height=job.height,
            width=job.width,
            num_frames=job.num_frames,
            num_inference_steps=job.num_inference_steps,
            guidance_scale=job.guidance_scale,
            latents=self.torch.from_numpy(self.latents).to(self.settings.device),
            generator=self.torch.Generator("cpu").manual_seed(job.latents_seed),
            output_type="np",
        )
        return np.asarray(out.frames[0])


class DenoiserRunner(DiffusersRunner):
    """One prediction at a time."""

    def load(self) -> None:
        settings = self.settings
        self.network = settings.ready(settings.family.denoiser(settings.checkpoint, settings.dtype))
        self.inputs = settings.tensor(self.latents), settings.tensor(settings.job.embeds(settings.model))

    def work(self) -> Any:
        return self.settings.family.predict(self.network, self.inputs[0], TIMESTEP, self.inputs[1])


class EncoderRunner(DiffusersRunner):
    """The prompt to its embeddings."""

    def load(self) -> None:
        settings = self.settings
        self.encoder = settings.family.text_pipeline(settings.checkpoint, settings.dtype).to(settings.device)

    def work(self) -> Any:
        return self.settings.family.encode(self.encoder, self.settings.job.prompt, self.settings.model.text.length)


class DecoderRunner(DiffusersRunner):
    """What runners of the VAE decoder share."""

    def load(self) -> None:
        settings = self.settings
        self.vae = settings.family.vae(settings.checkpoint, settings.dtype).to(settings.device).eval()
        if settings.compiled:
            self.vae.decoder = self.torch.compile(self.vae.decoder)
        self.whole = denormalize(settings.model.latents, self.latents)


def unit_frames(frames: Any) -> Any:
    """A tensor (1, 3, f, H, W), nominally in [-1, 1] -> (f, H, W, 3) in [0, 1]."""
    return (frames.float() * 0.5 + 0.5).clamp(0, 1)[0].permute(1, 2, 3, 0)


class ChunkRunner(DecoderRunner):
    """The second chunk of a video, after the first has been decoded."""

    def load(self) -> None:
        super().load()
        first = self.settings.model.decode.chunks(self.latents.shape[2])[0]
        self.parts = [self.settings.tensor(part) for part in (self.whole[:, :, :first], self.whole[:, :, first:])]

    def prepare(self) -> None:
        with self.torch.inference_mode():
            self.settings.family.decode_first(self.vae, self.parts[0])

    def work(self) -> Any:
        return unit_frames(self.settings.family.decode_next(self.vae, self.parts[1]))


class DecodeRunner(DecoderRunner):
    """The latents of a video to its frames."""

    def load(self) -> None:
        super().load()
        self.tensor = self.settings.tensor(self.whole)

    def work(self) -> Any:
        return unit_frames(self.vae.decode(self.tensor, return_dict=False)[0])


RUNNERS: Mapping[str, type[DiffusersRunner]] = {
    CALL: CallRunner,
    DENOISER: DenoiserRunner,
    ENCODER: EncoderRunner,
    CHUNK: ChunkRunner,
    DECODE: DecodeRunner,
}
EAGER = DiffusersPeer("float32", False, FLOAT32)
COMPILED = DiffusersPeer("float32", True, FLOAT32)
EAGER_BF16 = DiffusersPeer("bfloat16", False, BFLOAT16)
COMPILED_BF16 = DiffusersPeer("bfloat16", True, BFLOAT16)
