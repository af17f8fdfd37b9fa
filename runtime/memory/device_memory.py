"""The memory of a device, which all pipelines of this process on it share: what plans may take, and who takes it.

What is free now counts, not the size of the card: other programs and the desktop have their part of it, and on Windows
what is allocated beyond moves to the machine's memory without a word. What engines of this process hold is free to its
plans, which say what of it stays.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from t2v_rt.engines.backends import Backend
from t2v_rt.runtime.memory.plan import CARD_RESERVE, MemoryPlan, together_bytes
from t2v_rt.system import forked

UNPLANNED = 400_000_000  # bytes of a card that are never counted on: a driver keeps some, a desktop comes and goes
GROWTH = 200_000_000  # of what is free: for compiled kernels, which a library holds beside all that it tells


@dataclass(frozen=True)
class Room:
    """What plans may take of a device's memory.

    Args:
        bytes: of all runs of this process together; None for no limit.
        reserve_bytes: that count besides, where what else is on the device is not known.
        free_bytes: what other programs leave; None where that is not known.
    """

    bytes: int | None = None
    reserve_bytes: int = 0
    free_bytes: int | None = None


class Holder(Protocol):
    """What keeps engines loaded from call to call: the components of a pipeline."""

    @property
    def weights_bytes(self) -> int:
        """Of what is loaded now."""
        ...

    @property
    def held_bytes(self) -> int:
        """Of what is loaded now: its weights and what else it holds between calls."""
        ...

    def release_idle(self) -> None:
        """Closes what nobody uses."""
        ...


@dataclass(frozen=True)
class Running:
    """A run that is on its way.

    Args:
        plan: that it follows.
        thread: that began it.
        holder: whose engines it uses.
    """

    plan: MemoryPlan
    thread: int
    holder: Holder


class DeviceMemory:
    """The runs on a device and those that wait for room on it, of all pipelines that share it; safe between threads."""

    def __init__(self) -> None:
        self._room = Room()
        self._holders: weakref.WeakKeyDictionary[Holder, None] = weakref.WeakKeyDictionary()  # by their last use
        self.after_fork()
        forked.watch(self)

    def after_fork(self) -> None:
        """Forgets the parent's runs; see `t2v_rt.system.forked`."""
        self.changed = threading.Condition()
        self.queue: deque[object] = deque()
        self.running: dict[object, Running] = {}

    @property
    def room(self) -> Room:
        """As it was measured last."""
        return self._room

    def measure(self, backend: Backend) -> Room:
        """What plans may take from now on.

        It is asked for while no run is on its way, since what a run has not allocated yet belongs to it as well. A
        little less than before is no less: that is what a library holds beside what it tells.

        Args:
            backend: on the device.
        """
        with self.changed:
            if not self.running:
                room = self._measured(backend)
                known, found = self._room.bytes, room.bytes
                if known is None or found is None or not known - GROWTH <= found < known:
                    self._room = room
            return self._room

    def _measured(self, backend: Backend) -> Room:
        free, total = backend.free_bytes(), backend.memory_bytes
        if free is None or total is None:
            return Room(total, CARD_RESERVE if backend.own_memory else 0)
        weights, buffers = sum(holder.weights_bytes for holder in [*self._holders]), backend.buffer_bytes()
        if weights and buffers is None and self._room.bytes is not None:
            return self._room  # what its engines hold is not told, what there was before them is known
        free += weights + (buffers or 0)
        return Room(max(0, min(total - UNPLANNED, free - GROWTH)), 0, free)

    def use(self, holder: Holder) -> None:
        """Notes that a holder is in use now."""
        self._holders.pop(holder, None)
        self._holders[holder] = None

    def needed(self, runs: Iterable[Running]) -> int:
        """What runs take together of the room; the reserve is in it."""
        plans: dict[int, list[MemoryPlan]] = {}
        for run in runs:
            plans.setdefault(id(run.holder), []).append(run.plan)
        reserves = sum(max(plan.reserve_bytes for plan in group) for group in plans.values())
        return self._room.reserve_bytes + sum(map(together_bytes, plans.values())) - reserves

    def crowded(self) -> list[Holder]:
        """Those whose engines must go for the runs on their way to have their room: the longest unused, all idle."""
        if self._room.bytes is None:
            return []
        busy = {id(run.holder) for run in self.running.values()}
        idle = [holder for holder in self._holders if id(holder) not in busy]
        excess = self.needed(self.running.values()) + sum(holder.held_bytes for holder in idle) - self._room.bytes
        gone = []
        for holder in idle:
            if excess <= 0:
                break
            gone.append(holder)
            excess -= holder.held_bytes
        return gone


_known: weakref.WeakValueDictionary[str, DeviceMemory] = weakref.WeakValueDictionary()


def memory_of(backend: Backend) -> DeviceMemory:
    """The memory that a backend's engines work in: the same for all on one card, one for each in the machine's own."""
    key = backend.device_key
    if key is None:
        return DeviceMemory()
    with forked.loading:
        return _known.setdefault(key, DeviceMemory())
