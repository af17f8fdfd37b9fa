"""stable-diffusion.cpp by its Python package: whole calls, on single files of the networks.

It takes no given noise; its own generator draws what torch's does for the same seed, so that the first latents are
ours. Its samplers are not all ours, so no tolerance is asked of its results: it is told how far they are apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module, util
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t2v_rt.benchmarks.peers import Runner, Times
from t2v_rt.benchmarks.workloads import CALL, Job
from t2v_rt.engines.bundle.store import open_bundle
from t2v_rt.system.resources import usable_threads

PACKAGE, MODULE = "stable-diffusion-cpp-python", "stable_diffusion_cpp"
# keyword of the model -> name of the file in the folder, the beginning of it
NETWORKS: Mapping[str, str] = {"diffusion_model_path": "wan2.1_t2v", "t5xxl_path": "umt5", "vae_path": "wan_2.1_vae"}
SUFFIXES = (".safetensors", ".gguf")
SAMPLER = "euler"
WHATEVER = float("inf")  # another sampler and other kernels: figures tell how far results are apart


def networks(checkpoint: str | None) -> dict[str, str]:
    """The single files of a folder, by the keyword that takes each; those that are there."""
    files = sorted(path for path in Path(checkpoint or "").glob("*") if path.suffix in SUFFIXES) if checkpoint else []
    found = {}
    for keyword, beginning in NETWORKS.items():
        matching = [str(path) for path in files if path.name.startswith(beginning)]
        if matching:
            found[keyword] = matching[0]
    return found


@dataclass(frozen=True)
class StableDiffusionCpp:
    """The peer."""

    tolerance: float = WHATEVER

    def missing(self, job: Job) -> str:
        if job.kind != CALL:
            return "it makes whole videos only; measure the workload `call`"
        if util.find_spec(MODULE) is None:
            return f"the package {PACKAGE} is not installed; pip builds it from source, 40 minutes on two cores"
        lacking = [name for keyword, name in NETWORKS.items() if keyword not in networks(job.checkpoint)]
        if lacking:
            return f"it takes single files; give --checkpoint FOLDER with {', '.join(f'{name}*' for name in lacking)}"
        return ""

    def open(self, job: Job) -> Runner:
        return StableDiffusionCppRunner(job)


class StableDiffusionCppRunner:
    """Whole calls.

    Args:
        job: to do.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        config = open_bundle(job.bundle).manifest.scheduler
        self.shift = float(config.get("flow_shift", config.get("shift", 1.0)))
        self.model = import_module(MODULE).StableDiffusion(
            **networks(job.checkpoint),
            n_threads=usable_threads(job.threads) or -1,
            rng_type="cpu",
            flow_shift=self.shift,
            verbose=False,
        )

    def prepare(self) -> None:
        """Nothing has to be done."""

    def run(self) -> NDArray[np.float32]:
        job = self.job
        images = self.model.generate_video(
            prompt=job.prompt,
            negative_prompt=job.negative_prompt,
            cfg_scale=job.guidance_scale,
            sample_steps=job.num_inference_steps,
            sample_method=SAMPLER,
            width=job.width,
            height=job.height,
            video_frames=job.num_frames,
            seed=job.latents_seed,
        )
        return np.stack([np.asarray(image.convert("RGB"), np.float32) / 255 for image in images])

    def stages(self) -> Times:
        return {}

    def facts(self) -> Mapping[str, Any]:
        return {"sampler": SAMPLER, "flow_shift": self.shift}

    def close(self) -> None:
        """The process ends next."""


PEER = StableDiffusionCpp()
