"""The yardstick: the same small work in every measurement, in turn with all that is measured.

How long it takes tells how much of the machine could be had meanwhile, so that two measurements of different hours can
be compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t2v_rt.benchmarks.peers import Runner, Times
from t2v_rt.benchmarks.workloads import Job

SIDE, REPEATS = 512, 5  # of a matrix, products: 15 ms on one core of today


@dataclass(frozen=True)
class Yardstick:
    """Products of one thread."""

    tolerance: float = 0.0

    def missing(self, job: Job) -> str:
        """It never is."""
        return ""

    def open(self, job: Job) -> Runner:
        return YardstickRunner()


class YardstickRunner:
    """A few products of two matrices; the number of threads is the process's."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self._a, self._b = (rng.standard_normal((SIDE, SIDE), np.float32) for _ in range(2))
        self._out = np.empty_like(self._a)

    def prepare(self) -> None:
        """Nothing has to be done."""

    def run(self) -> NDArray[np.float32]:
        for _ in range(REPEATS):
            np.matmul(self._a, self._b, out=self._out)
        return self._out

    def stages(self) -> Times:
        return {}

    def facts(self) -> Mapping[str, Any]:
        return {}

    def close(self) -> None:
        """The process ends next."""


YARDSTICK = Yardstick()
