"""What one step of each sampler costs beside diffusers' on the same machine, on the latents of a 832x480x81 video.

    python -m t2v_rt.benchmarks.scheduler_cost

torch runs on one thread, noise is drawn beforehand, both are called in turn, and the ratio is the median of all steps
but the first two. Memory is the largest that one step allocates over the size of the latents.
"""

from __future__ import annotations

import importlib
import itertools
import statistics
import tracemalloc
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import torch

from t2v_rt.benchmarks.results import FOLDER, write
from t2v_rt.benchmarks.timing import alternate, ratio
from t2v_rt.runtime.schedulers import MODULES, scheduler_class
from t2v_rt.runtime.schedulers import base as scheduler_base

SHAPE = (1, 16, 21, 60, 104)
STEPS, TIMED, WARMUPS = 20, 12, 2
RESULTS = FOLDER / "scheduler_cost.json"
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in sorted(MODULES)),
    ("DPMSolverMultistepScheduler", {**FLOW, "solver_order": 3}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("PNDMScheduler", {"skip_prk_steps": True}),
    ("UniPCMultistepScheduler", FLOW),
    ("UniPCMultistepScheduler", {**FLOW, "solver_order": 3}),
]


def measure(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Times and memory of one class with some settings."""
    rng = np.random.default_rng(0)
    x, m, noise = (rng.standard_normal(SHAPE).astype(np.float32) for _ in range(3))
    tx, tm, tnoise = (torch.from_numpy(array) for array in (x, m, noise))
    ours, theirs = scheduler_class(name)(**settings), getattr(diffusers, name)(**settings)
    ours.set_timesteps(STEPS)
    theirs.set_timesteps(STEPS)
    module = importlib.import_module(type(theirs).__module__)
    mine, other = itertools.count(), itertools.count()
    kept: list[Any] = [None]  # what one class takes from step to step

    def our_step() -> None:
        ours.step(m, ours.timesteps[next(mine)], x)

    def their_step() -> None:
        i = next(other)
        t = theirs.timesteps[i]
        if name == "CogVideoXDPMScheduler":
            _, kept[0] = theirs.step(tm, kept[0], t, theirs.timesteps[i - 1] if i else None, tx)
        else:
            theirs.step(tm, t, tx)

    with (
        mock.patch.object(scheduler_base, "randn_for", return_value=noise),
        mock.patch.object(module, "randn_tensor", return_value=tnoise, create=True),
    ):
        times = alternate({"ours": our_step, "torch": their_step}, TIMED, WARMUPS)
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        our_step()
        peak = tracemalloc.get_traced_memory()[1] - before
        tracemalloc.stop()
    return {
        "class": name,
        "settings": settings,
        "ms": round(statistics.median(times["ours"]) * 1e3, 2),
        "torch_ms": round(statistics.median(times["torch"]) * 1e3, 2),
        "ratio": round(ratio(times["ours"], times["torch"])["median"], 2),
        "allocated": round(peak / x.nbytes, 2),
    }


def main() -> None:
    """Prints and stores all cases."""
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    rows = []
    for name, settings in CASES:
        row = measure(name, settings)
        rows.append(row)
        print(
            f"{name:34} {row['ms']:6.1f} ms  torch {row['torch_ms']:6.1f} ms  ratio {row['ratio']:.2f}  "
            f"allocated {row['allocated']:.2f}  {settings}",
            flush=True,
        )
    write(RESULTS, {"shape": SHAPE, "torch": torch.__version__, "steps": rows})


if __name__ == "__main__":
    main()
