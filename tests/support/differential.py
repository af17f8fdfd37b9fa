"""Every sampler beside diffusers' class of the same name, over random settings.

Run as a command, this prints a table with one line for each class and stores it:

    python -m tests.support.differential --count 200

Both are stepped along the reference's own path: each step is given the same sample and prediction, standard normal
ones. The error of a step is the largest difference over the largest value of the reference's result.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from t2v_rt.benchmarks.machine import describe_machine
from t2v_rt.errors import RequestError
from t2v_rt.runtime.noise import Generator
from t2v_rt.runtime.schedulers import MODULES, Scheduler, scheduler_class
from tests.support.portable_torch import portable_torch
from tests.support.random_settings import Rng, Trial, draw

TOLERANCE = 2e-6  # relative, of one float32 step: a handful of roundings, of terms in another order
SCHEDULE_TOLERANCE = 2e-7  # relative: the last bit of float32
NOT_A_NUMBER = 2.0**62  # as an integer it is about that, below 0
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "schedulers.json"
ERRORS = ("timesteps", "sigmas", "step")


@dataclass
class Outcome:
    """How a trial came out, with the largest relative errors.

    Args:
        steps: made in both.
        refused: whether the sampler refuses the schedule.
        timesteps: error of the schedule's.
        sigmas: likewise.
        step: error of one step; infinite where one of the two makes steps that the other refuses.
    """

    steps: int = 0
    refused: bool = False
    timesteps: float = 0.0
    sigmas: float = 0.0
    step: float = 0.0

    @property
    def failed(self) -> bool:
        """Whether an error is beyond its tolerance."""
        return max(self.timesteps, self.sigmas) > SCHEDULE_TOLERANCE or self.step > TOLERANCE


@contextlib.contextmanager
def _on_portable_torch() -> Iterator[None]:
    with portable_torch(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers hands tensors to NumPy in ways that both deprecate
        yield


class Reference:
    """diffusers' class, with one signature for all, on functions that are exactly rounded."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        arrays = {key: np.array(value) if key == "sigmas" else value for key, value in trial.schedule.items()}
        with _on_portable_torch():
            self.scheduler = getattr(diffusers, trial.name)(**trial.settings)
            self.scheduler.set_timesteps(**arrays)
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(0)
        self.generator = torch.Generator("cpu").manual_seed(trial.seed)
        self.old_x0: Any = None

    @property
    def init_noise_sigma(self) -> float:
        return float(getattr(self.scheduler, "init_noise_sigma", 1.0))

    def scaled(self, i: int, sample: np.ndarray) -> Any:
        if not hasattr(self.scheduler, "scale_model_input"):
            return sample
        with _on_portable_torch():
            scaled = self.scheduler.scale_model_input(torch.from_numpy(sample), self.scheduler.timesteps[i])
        return np.asarray(scaled)

    def step(self, i: int, m: np.ndarray, x: np.ndarray) -> np.ndarray:
        with _on_portable_torch():
            return self._step(i, m, x)

    def _step(self, i: int, m: np.ndarray, x: np.ndarray) -> np.ndarray:
        scheduler, trial = self.scheduler, self.trial
        t, m_, x_ = scheduler.timesteps[i], torch.from_numpy(m), torch.from_numpy(x)
        options: dict[str, Any] = dict(trial.step)
        if trial.name == "CogVideoXDPMScheduler":
            back = scheduler.timesteps[i - 1] if i else None
            result, self.old_x0 = scheduler.step(m_, self.old_x0, t, back, x_, generator=self.generator)
            return np.asarray(result)
        if "generator" in type(scheduler).step.__code__.co_varnames:
            options["generator"] = self.generator
        return np.asarray(scheduler.step(m_, t, x_, **options, return_dict=False)[0])


def run(trial: Trial) -> Outcome:
    """Steps both through a trial, to its end or to where the reference's result is not finite."""
    try:
        ours: Scheduler[Any] = scheduler_class(trial.name)(**trial.settings)
        ours.set_timesteps(**trial.schedule)
    except RequestError:
        return Outcome(refused=True, step=float("inf") if reference_steps(trial) else 0.0)
    theirs = Reference(trial)
    outcome = Outcome(timesteps=_difference(ours.timesteps, theirs.scheduler.timesteps.numpy()))
    if len(ours.sigmas):
        outcome.sigmas = _difference(ours.sigmas, theirs.scheduler.sigmas.numpy())
    rng, generator = np.random.default_rng(trial.seed), Generator(trial.seed)
    x = rng.standard_normal(trial.shape).astype(np.float32) * np.float32(theirs.init_noise_sigma)
    assert np.isclose(ours.init_noise_sigma, theirs.init_noise_sigma, rtol=SCHEDULE_TOLERANCE)
    for i, t in enumerate(ours.timesteps):
        scaled = ours.scale_model_input(x, t)
        assert np.allclose(scaled, theirs.scaled(i, x), rtol=TOLERANCE, atol=TOLERANCE), "scale_model_input"
        m = prediction(trial, rng)
        expected = theirs.step(i, m, x)
        found = ours.step(m, t, x, generator=generator, **trial.step).prev_sample
        if not np.all(np.isfinite(expected)):  # UniPC's bh1 multiplies 0 by infinity at a last sigma of 0
            break
        scale = float(np.abs(expected).max()) or 1.0
        outcome.step = max(outcome.step, float(np.abs(found - expected).max()) / scale)
        outcome.steps += 1
        x = expected
    return outcome


def reference_steps(trial: Trial) -> bool:
    """Whether the reference can be stepped through a trial, from timesteps that are numbers."""
    rng = np.random.default_rng(trial.seed)
    try:
        theirs = Reference(trial)
        x = rng.standard_normal(trial.shape).astype(np.float32) * np.float32(theirs.init_noise_sigma)
        for i in range(len(theirs.scheduler.timesteps)):
            x = theirs.step(i, prediction(trial, rng), x)
        timesteps = theirs.scheduler.timesteps.numpy().astype(np.float64)
    except Exception:  # it has no error type of its own
        return False
    numbers = bool(np.all(np.abs(timesteps) < NOT_A_NUMBER))
    return numbers and bool(np.all(np.isfinite(x)))


def prediction(trial: Trial, rng: Rng) -> np.ndarray:
    """A random model output; where the model predicts variances too, these are positive."""
    m = rng.standard_normal(trial.shape).astype(np.float32)
    if "learned" in str(trial.settings.get("variance_type")):
        m = np.concatenate([m, rng.uniform(0.1, 0.9, trial.shape).astype(np.float32)], 1)
    return m


def _difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest relative difference of schedules; infinite where they have other lengths or dtypes."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return float("inf")
    difference = np.abs(ours.astype(np.float64) - theirs.astype(np.float64))
    largest = float(np.max(difference / np.maximum(np.abs(theirs), 1e-3)))
    return largest if np.isfinite(largest) else float("inf")


def trials(name: str, count: int, seed: int = 0) -> Iterator[tuple[Trial, Outcome]]:
    """Random trials of a class, and how they came out."""
    rng = np.random.default_rng([seed, sum(name.encode())])
    for _ in range(count):
        trial = draw(name, rng)
        yield trial, run(trial)


def main() -> None:
    """The table."""
    diffusers.utils.logging.set_verbosity_error()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200, help="configurations for each class (200)")
    parser.add_argument("--only", choices=sorted(MODULES), help="one class")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(f"{'class':34}", *(f"{column:>11}" for column in ("trials", "refused", "steps", *ERRORS, "failed")))
    rows = {}
    for name in [options.only] if options.only else sorted(MODULES):
        outcomes = [outcome for _, outcome in trials(name, options.count, options.seed)]
        largest = {key: max(getattr(outcome, key) for outcome in outcomes) for key in ERRORS}
        counts = {key: sum(getattr(outcome, key) for outcome in outcomes) for key in ("refused", "steps", "failed")}
        rows[name] = {"trials": len(outcomes), "refused": counts["refused"], "steps": counts["steps"], **largest}
        rows[name]["failed"] = counts["failed"]
        cells = [f"{value:11.1e}" if isinstance(value, float) else f"{value:11}" for value in rows[name].values()]
        print(f"{name:34}", *cells, flush=True)
    if not options.only:
        tolerances = {"tolerance": TOLERANCE, "schedule_tolerance": SCHEDULE_TOLERANCE}
        RESULTS.write_text(json.dumps({"machine": describe_machine(), **tolerances, "classes": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
