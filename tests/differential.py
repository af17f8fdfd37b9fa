"""Every sampler beside diffusers' class of the same name, over random settings.

Run as a command, this prints a table with one line for each class and stores it:

    python -m tests.differential --count 200

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
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import torch

from t2v_rt.benchmarks.machine import describe_machine
from t2v_rt.runtime.noise import Generator
from t2v_rt.runtime.schedulers import MODULES, Scheduler, scheduler_class
from tests.random_settings import Rng, Trial, draw

TOLERANCE = 1e-5  # relative, of one float32 step
# Where the reference's own result is moved further than that by rounding its input once, so many times that movement:
# the two differ by a handful of such roundings.
ROUNDINGS = 8
ROUNDING_DRAWS = 16  # up or down at random, so the largest of several tries
SCHEDULE_TOLERANCE = 2e-6  # relative: torch's float32 square root and logarithm are not correctly rounded everywhere
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "schedulers.json"
UP = np.float32(np.inf)
LIBRARY = ("exp", "expm1", "log")


@dataclass
class Outcome:
    """The largest errors of a trial: relative, and how many times the allowed error the worst step was.

    Args:
        steps: made in both.
        step: largest relative error of one.
        excess: largest error over the allowed one.
        by_input: steps that are allowed more than the tolerance because of their input's rounding.
        by_library: steps beyond even that, which one rounding of the reference's exp, log and expm1 accounts for.
        unexplained: steps beyond that.
        timesteps: largest relative error of the schedule's.
        sigmas: likewise.
    """

    steps: int = 0
    step: float = 0.0
    excess: float = 0.0
    by_input: int = 0
    by_library: int = 0
    unexplained: int = 0
    timesteps: float = 0.0
    sigmas: float = 0.0


class Reference:
    """diffusers' class, with one signature for all."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.scheduler = getattr(diffusers, trial.name)(**trial.settings)
        arrays = {key: np.array(value) if key == "sigmas" else value for key, value in trial.schedule.items()}
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
        return self.scheduler.scale_model_input(torch.from_numpy(sample), self.scheduler.timesteps[i]).numpy()

    def step(self, i: int, m: np.ndarray, x: np.ndarray) -> np.ndarray:
        scheduler, trial = self.scheduler, self.trial
        t, m_, x_ = scheduler.timesteps[i], torch.from_numpy(m), torch.from_numpy(x)
        options: dict[str, Any] = dict(trial.step)
        if trial.name == "CogVideoXDPMScheduler":
            back = scheduler.timesteps[i - 1] if i else None
            result, self.old_x0 = scheduler.step(m_, self.old_x0, t, back, x_, generator=self.generator)
            return result.numpy()
        if "generator" in type(scheduler).step.__code__.co_varnames:
            options["generator"] = self.generator
        return scheduler.step(m_, t, x_, **options, return_dict=False)[0].numpy()


def run(trial: Trial, limit: int = 1000) -> Outcome:
    """Steps both through a trial; `limit` steps at most.

    Raises:
        FloatingPointError: the reference's own first result is not finite; a later one ends the trial.
    """
    theirs = Reference(trial)
    ours: Scheduler[Any] = scheduler_class(trial.name)(**trial.settings)
    ours.set_timesteps(**trial.schedule)
    outcome = Outcome()
    outcome.timesteps = _difference(ours.timesteps, theirs.scheduler.timesteps.numpy())
    if len(ours.sigmas):
        outcome.sigmas = _difference(ours.sigmas, theirs.scheduler.sigmas.numpy())
    rng, generator = np.random.default_rng(trial.seed), Generator(trial.seed)
    twice = "learned" in str(trial.settings.get("variance_type"))
    x = rng.standard_normal(trial.shape).astype(np.float32) * np.float32(theirs.init_noise_sigma)
    assert np.isclose(ours.init_noise_sigma, theirs.init_noise_sigma, rtol=SCHEDULE_TOLERANCE)
    past: list[tuple[np.ndarray, np.ndarray]] = []
    for i in range(min(limit, len(ours.timesteps))):
        scaled = ours.scale_model_input(x, ours.timesteps[i])
        assert np.allclose(scaled, theirs.scaled(i, x), rtol=1e-5, atol=1e-6), "scale_model_input"
        m = rng.standard_normal(trial.shape).astype(np.float32)
        if twice:  # predicted variances are positive
            m = np.concatenate([m, rng.uniform(0.1, 0.9, trial.shape).astype(np.float32)], 1)
        expected = theirs.step(i, m, x)
        if not np.all(np.isfinite(expected)):
            if i:  # UniPC's bh1 multiplies 0 by infinity at a last sigma of 0
                break
            raise FloatingPointError("first step of the reference")
        found = ours.step(m, ours.timesteps[i], x, generator=generator, **trial.step).prev_sample
        scale = float(np.abs(expected).max()) or 1.0
        error = float(np.abs(found - expected).max()) / scale
        past.append((m, x))
        allowed = TOLERANCE
        if error > TOLERANCE:
            allowed = max(TOLERANCE, ROUNDINGS * moved_by_rounding(trial, past, expected, LIBRARY[:0]) / scale)
            if error <= allowed:
                outcome.by_input += 1
            elif error <= ROUNDINGS * moved_by_rounding(trial, past, expected, LIBRARY) / scale:
                outcome.by_library += 1
            else:
                outcome.unexplained += 1
        outcome.steps += 1
        outcome.step, outcome.excess = max(outcome.step, error), max(outcome.excess, error / allowed)
        x = expected
    return outcome


def moved_by_rounding(
    trial: Trial, past: list[tuple[np.ndarray, np.ndarray]], expected: np.ndarray, library: tuple[str, ...]
) -> float:
    """How far the reference's last step is moved by rounding once the other way.

    Rounded are, in turn, samples with predictions and the schedule's sigmas, all of them float32 input of a step; or,
    given names of torch functions, their results. torch's exp and log come from the processor's vendor and round one
    value in a hundred otherwise than IEEE 754 would.
    """

    def rounded(array: np.ndarray, rng: Rng) -> np.ndarray:
        return np.nextafter(array, np.where(rng.random(array.shape) < 0.5, UP, -UP))

    def moved(rng: Rng, *, arrays: bool) -> float:
        reference = Reference(trial)
        if not (arrays or library) and hasattr(reference.scheduler, "sigmas"):
            sigmas = reference.scheduler.sigmas.numpy()
            reference.scheduler.sigmas = torch.from_numpy(np.where(sigmas > 0, rounded(sigmas, rng), sigmas))
        with contextlib.ExitStack() as patches:
            for name in library:
                exact = getattr(torch, name)
                inexact = partial(lambda exact, x: torch.tensor(rounded(exact(x).numpy(), rng)), exact)
                patches.enter_context(mock.patch.object(torch, name, inexact))
            for i, (m, x) in enumerate(past):
                result = reference.step(i, rounded(m, rng) if arrays else m, rounded(x, rng) if arrays else x)
        return float(np.abs(result - expected).max())

    draws = [np.random.default_rng(draw) for draw in range(ROUNDING_DRAWS)]
    return max(moved(rng, arrays=not library and bool(i % 2)) for i, rng in enumerate(draws))


def _difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest relative difference of schedules; infinite where they have other lengths or dtypes."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return float("inf")
    difference = np.abs(ours.astype(np.float64) - theirs.astype(np.float64))
    return float(np.max(difference / np.maximum(np.abs(theirs), 1e-3)))


def trials(name: str, count: int, seed: int = 0) -> Iterator[tuple[Trial, Outcome]]:
    """Random trials of a class whose results are finite in the reference, and how they came out."""
    rng = np.random.default_rng([seed, sum(name.encode())])
    while count:
        trial = draw(name, rng)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield trial, run(trial)
        except FloatingPointError:
            continue
        count -= 1


def main() -> None:
    """The table."""
    diffusers.utils.logging.set_verbosity_error()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200, help="configurations for each class (200)")
    parser.add_argument("--only", choices=sorted(MODULES), help="one class")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    columns = "class", "trials", "steps", "timesteps", "sigmas", "step", "by input", "by library", "unexplained"
    print(f"{columns[0]:34}", *(f"{column:>11}" for column in columns[1:]))
    rows = {}
    for name in [options.only] if options.only else sorted(MODULES):
        outcomes = [outcome for _, outcome in trials(name, options.count, options.seed)]
        largest = {key: max(getattr(o, key) for o in outcomes) for key in ("timesteps", "sigmas", "step")}
        counts = {key: sum(getattr(o, key) for o in outcomes) for key in ("by_input", "by_library", "unexplained")}
        rows[name] = {"trials": len(outcomes), "steps": sum(o.steps for o in outcomes), **largest, **counts}
        cells = [f"{value:11.1e}" if isinstance(value, float) else f"{value:11}" for value in rows[name].values()]
        print(f"{name:34}", *cells, flush=True)
    if not options.only:
        report = {"machine": describe_machine(), "tolerance": TOLERANCE, "roundings": ROUNDINGS, "classes": rows}
        RESULTS.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
