"""Which runs of a pipeline are on their way: those whose memory plans keep to its budget together."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from t2v_rt.errors import RequestError
from t2v_rt.runtime.cancel import check_cancelled
from t2v_rt.runtime.memory.plan import MemoryPlan, together_bytes
from t2v_rt.system import forked

LOOK = 0.05  # seconds between looks at the event that cancels a run that waits


class Admission:
    """Lets runs begin while their plans and those on their way fit the budget together, in the order they came.

    Args:
        budget: bytes, or None: then every run may begin at once.
        waits: whether a run that does not fit beside others waits for them to end; otherwise it is refused.
    """

    def __init__(self, budget: int | None, *, waits: bool = True) -> None:
        self.budget, self._waits = budget, waits
        self._changed = threading.Condition()
        self._queue: deque[object] = deque()
        self._running: dict[object, tuple[MemoryPlan, int]] = {}  # and the thread that began it
        forked.watch(self)

    def after_fork(self) -> None:
        """Forgets the parent's runs; see `t2v_rt.system.forked`."""
        self._changed, self._queue, self._running = threading.Condition(), deque(), {}

    @property
    def running(self) -> tuple[MemoryPlan, ...]:
        """Plans of the runs that are on their way."""
        return tuple(plan for plan, _ in list(self._running.values()))

    @contextmanager
    def admitted(self, plan: MemoryPlan, cancel: threading.Event | None = None) -> Iterator[MemoryPlan]:
        """Begins a run as soon as it fits, and ends it with the block.

        Args:
            plan: of the run; by itself it fits.
            cancel: ends the waiting where it is set, or None.

        Yields:
            The plan to follow: the given one or, where others leave no room for that, the one that keeps nothing loaded
            from stage to stage.

        Raises:
            RequestError: it does not fit beside the others, and is not to wait, or would wait for its own thread.
            CancelledError: `cancel` was set.
        """
        run = object()
        with self._changed:
            self._queue.append(run)
            try:
                while (chosen := self._fitting(run, plan)) is None:
                    self._check_waiting(plan.releasing())
                    check_cancelled(cancel, "queue")
                    self._changed.wait(None if cancel is None else LOOK)
                self._running[run] = chosen, threading.get_ident()
            finally:
                self._queue.remove(run)
                self._changed.notify_all()
        try:
            yield chosen
        finally:
            with self._changed:
                self._running.pop(run, None)  # a forked child does not know it
                self._changed.notify_all()

    def _fitting(self, run: object, plan: MemoryPlan) -> MemoryPlan | None:
        """How a run may begin now, or None."""
        if self.budget is None:
            return plan
        if self._queue[0] is not run:
            return None
        if not self._running:
            return plan
        choices = (plan, plan.releasing())
        return next((item for item in choices if together_bytes([*self.running, item]) <= self.budget), None)

    def _check_waiting(self, plan: MemoryPlan) -> None:
        """Refuses to wait where that is not wanted, or where this thread itself would have to go on for it to end."""
        assert self.budget is not None
        here = threading.get_ident()
        kept = [other for other, thread in self._running.values() if thread == here or not self._waits]
        needed = together_bytes([*kept, plan])
        if kept and needed > self.budget:
            whose = "that this thread has begun" if self._waits else "on their way"
            raise RequestError(
                f"this request and {len(kept)} {whose} need about {needed / 1e9:.3g} GB together, the budget is "
                f"{self.budget / 1e9:.3g} GB; let them end or close their streams first, or give a larger budget"
            )
