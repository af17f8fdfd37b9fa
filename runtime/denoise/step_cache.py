"""EasyCache (Zhou et al., arXiv:2507.02860): steps whose prediction can be foretold reuse the last one.

Between neighbouring steps the difference d = v - x of the denoiser's output v and input x hardly moves, and the ratio
k = |change of v| / |change of x| hardly either. So k times the change of x, relative to |v|, estimates how far v has
moved; while these estimates E, added up, stay under a threshold, x + d stands for the denoiser. Norms are means of
absolute values. The decision is the conditional prediction's, one for all videos of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from t2v_rt.errors import RequestError
from t2v_rt.numbers import as_number

Array = NDArray[np.float32]
# The layout of a video is decided early, where d moves most: the paper computes 10 of Wan's 50 first steps.
FIRST_FRACTION = 0.2
FIRST_STEPS = 3  # at least: k comes from two computed steps, and the very first change is no measure of the later ones
LAST_STEPS = 1  # nothing comes after it that could still correct an error


class StepCache:
    """Decides which steps reuse, and keeps what they reuse; one for each run.

    Args:
        threshold: largest sum of estimated relative changes of the output; 0 turns the cache off: nothing is kept.
        steps: how many times the sampler asks for a prediction in all.

    Attributes:
        skipped: denoiser predictions avoided so far, conditional and unconditional ones counted each.
    """

    def __init__(self, threshold: float, steps: int) -> None:
        self.skipped = 0
        self._threshold = threshold
        self._first = max(FIRST_STEPS, math.ceil(FIRST_FRACTION * steps))
        self._last = steps - LAST_STEPS
        self.forget()

    def forget(self) -> None:
        """Drops all that earlier steps left, as after a change of the prompt."""
        self._x: Array | None = None  # input of the last step, computed or not
        self._computed: tuple[Array, Array] | None = None  # input and output of the last computed step
        self._differences: tuple[Array, ...] = ()  # d of each branch
        self._k: float | None = None
        self._sum = 0.0  # E

    def reuse(self, step: int, sample: Array, passes: int) -> tuple[Array, ...] | None:
        """The step's predictions, where they can be had without the denoiser.

        Args:
            step: index of the step, from 0.
            sample: the denoiser's input x, float32 (B, …).
            passes: predictions that are needed: the conditional one, or both.

        Returns:
            x + d of each branch, or None: compute them, and hand them to `keep`.
        """
        if not self._threshold:
            return None
        before, self._x = self._x, sample
        if before is None or self._computed is None or self._k is None:
            return None
        norm = _norm(self._computed[1])
        self._sum += self._k * _norm(sample - before) / norm if norm else math.inf
        early, late, missing = step < self._first, step >= self._last, len(self._differences) < passes
        if early or late or missing or not self._sum < self._threshold:
            self._sum = 0.0
            return None
        self.skipped += passes
        return tuple(sample + d for d in self._differences[:passes])

    def keep(self, sample: Array, predictions: Sequence[Array]) -> None:
        """Learns from a computed step.

        Args:
            sample: the denoiser's input x, float32 (B, …).
            predictions: the conditional one, or both, of that shape.
        """
        if not self._threshold:
            return
        output = predictions[0]
        if self._computed is not None:
            x, v = self._computed
            moved = _norm(sample - x)
            self._k = _norm(output - v) / moved if moved else None
        self._computed = sample, output
        self._differences = tuple(prediction - sample for prediction in predictions)


def check_threshold(value: float | None) -> float:
    """Returns the threshold, 0 for None; raises RequestError where it is no finite number of 0 or more."""
    if value is None:
        return 0.0
    threshold = as_number(value)
    if threshold is None or threshold < 0:
        raise RequestError(f"step_cache is {value!r}; expected a finite number of 0 or more (0 is off, 0.05 a start)")
    return threshold


def _norm(array: Array) -> float:
    return float(np.mean(np.abs(array), dtype=np.float64))
