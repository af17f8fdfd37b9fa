"""The engines of a pipeline: one set of them, or several that runs use at the same time."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from t2v_rt.errors import RequestError
from t2v_rt.numbers import as_integer
from t2v_rt.runtime.memory.admission import Admission
from t2v_rt.runtime.memory.device_memory import DeviceMemory
from t2v_rt.runtime.stages import Stages
from t2v_rt.system import forked


def check_count(engines: object) -> int:
    """Returns the number of sets of engines; raises RequestError where it is no integer of 1 or more."""
    count = as_integer(engines)
    if count is None or count < 1:
        raise RequestError(f"engines is {engines!r}; expected an integer of 1 or more")
    return count


@dataclass(frozen=True)
class EngineSet:
    """The engines that a run uses from its begin to its end, and what lets it begin."""

    stages: Stages
    admission: Admission


class EnginePool:
    """Sets of engines, each with weights of its own; a run takes the one that the fewest runs use.

    What is remembered of prompts is shared by all. More runs than there are sets share engines, whose calls do not mix.

    Args:
        stages: of the first set.
        count: of sets.
        budget: bytes that all may take together, or None; each has an equal part, as any of them may be in use.
        waits: whether a run that does not fit waits for others.
        device: whose memory they take.
    """

    def __init__(self, stages: Stages, count: int, budget: int | None, waits: bool, device: DeviceMemory) -> None:
        self.budget = None if budget is None else budget // count
        each = [stages, *(stages.twin() for _ in range(1, count))]
        self.sets = tuple(
            EngineSet(one, Admission(self.budget, waits=waits, device=device, holder=one.components)) for one in each
        )
        self._serving = threading.local()
        self.after_fork()
        forked.watch(self)

    def after_fork(self) -> None:
        """Forgets the parent's runs; see `t2v_rt.system.forked`."""
        self._lock, self._users = threading.Lock(), Counter[int]()

    @contextmanager
    def taken(self) -> Iterator[EngineSet]:
        """The set that the fewest runs use, counted as used by one more in the block."""
        with self._lock:
            users = self._users  # a child that is forked in the block counts anew
            index = min(range(len(self.sets)), key=users.__getitem__)
            users[index] += 1
        try:
            yield self.sets[index]
        finally:
            with self._lock:
                users[index] -= 1

    @contextmanager
    def serving(self, stages: Stages) -> Iterator[None]:
        """Has `stages` give these to this thread in the block, in which a run calls its caller."""
        before, self._serving.stages = self.stages, stages
        try:
            yield
        finally:
            self._serving.stages = before

    @property
    def stages(self) -> Stages:
        """Those of the run that calls its caller in this thread, else the first."""
        found: Stages = getattr(self._serving, "stages", self.sets[0].stages)
        return found

    def close(self) -> None:
        """Releases all engines that no run is using."""
        for one in self.sets:
            one.stages.components.close()
