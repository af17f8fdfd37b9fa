"""Which runs of a pipeline are on their way: those whose memory plans keep to their budgets together."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from t2v_rt.errors import RequestError
from t2v_rt.runtime.cancel import check_cancelled
from t2v_rt.runtime.memory.device_memory import DeviceMemory, Holder, Running
from t2v_rt.runtime.memory.plan import MemoryPlan, together_bytes

LOOK = 0.05  # seconds between looks at the event that cancels a run that waits


class Nothing:
    """Holds no engines; of an admission that has no pipeline."""

    weights_bytes = held_bytes = 0

    def release_idle(self) -> None:
        """Nothing to close."""


class Admission:
    """Lets runs begin while their plans and those on their way fit together, in the order they came.

    Runs of one pipeline keep to its own budget, those of all pipelines on a device to what that has room for.

    Args:
        budget: bytes that the pipeline's runs may take together, or None: then only the device's room counts.
        waits: whether a run that does not fit beside others waits for them to end; otherwise it is refused.
        device: whose memory they take; None for one that nobody else is on, and that has room for all.
        holder: the pipeline's components. Those of other pipelines are released where they are idle and in the way.
    """

    def __init__(
        self,
        budget: int | None,
        *,
        waits: bool = True,
        device: DeviceMemory | None = None,
        holder: Holder | None = None,
    ) -> None:
        self.budget, self._waits = budget, waits
        self._device = DeviceMemory() if device is None else device
        self._holder = Nothing() if holder is None else holder

    @property
    def running(self) -> tuple[MemoryPlan, ...]:
        """Plans of the pipeline's runs that are on their way."""
        return tuple(run.plan for run in list(self._device.running.values()) if run.holder is self._holder)

    @contextmanager
    def admitted(self, plan: MemoryPlan, cancel: threading.Event | None = None) -> Iterator[MemoryPlan]:
        """Begins a run as soon as it fits, and ends it with the block.

        Args:
            plan: of the run; by itself it fits.
            cancel: ends the waiting where it is set, or None.

        Yields:
            The plan to follow: the given one or, where others leave no room for that, the first of its choices that
            they do.

        Raises:
            RequestError: it does not fit beside the others, and is not to wait, or would wait for its own thread.
            CancelledError: `cancel` was set.
        """
        run, device = object(), self._device
        with device.changed:
            device.queue.append(run)
            try:
                while (chosen := self._fitting(run, plan)) is None:
                    self._check_waiting(plan.releasing())
                    check_cancelled(cancel, "queue")
                    device.changed.wait(None if cancel is None else LOOK)
                device.running[run] = self._started(chosen)
                device.use(self._holder)
                crowded = device.crowded()
            finally:
                device.queue.remove(run)
                device.changed.notify_all()
        try:
            for holder in crowded:
                holder.release_idle()
            yield chosen
        finally:
            with device.changed:
                device.running.pop(run, None)  # a forked child does not know it
                device.changed.notify_all()

    def _started(self, plan: MemoryPlan) -> Running:
        return Running(plan, threading.get_ident(), self._holder)

    def _fitting(self, run: object, plan: MemoryPlan) -> MemoryPlan | None:
        """How a run may begin now, or None."""
        running, here = self._device.running.values(), threading.get_ident()
        if not self._needs(plan, running):
            return plan
        if self._device.queue[0] is not run and all(other.thread != here for other in running):
            return None  # who has a run on its way does not wait for its turn: those before it may wait for that run
        if not running:
            return plan
        choices = plan.choices()
        return next((item for item in choices if all(n <= most for n, most in self._needs(item, running))), None)

    def _needs(self, plan: MemoryPlan, running: Collection[Running]) -> list[tuple[int, int]]:
        """What a run and some that are on their way take together, and what they may, for each limit that holds."""
        own = [run.plan for run in running if run.holder is self._holder]
        room, needs = self._device.room.bytes, []
        if self.budget is not None:
            needs.append((together_bytes([*own, plan]), self.budget))
        if room is not None and (self.budget is None or len(own) < len(running)):
            needs.append((self._device.needed([*running, self._started(plan)]), room))
        return needs

    def _check_waiting(self, plan: MemoryPlan) -> None:
        """Refuses to wait where that is not wanted, or where this thread itself would have to go on for it to end."""
        here = threading.get_ident()
        kept = [run for run in self._device.running.values() if run.thread == here or not self._waits]
        for needed, most in self._needs(plan, kept) if kept else []:
            if needed > most:
                whose = "that this thread has begun" if self._waits else "on their way"
                raise RequestError(
                    f"this request and {len(kept)} {whose} need about {needed / 1e9:.3g} GB together, the budget is "
                    f"{most / 1e9:.3g} GB; let them end or close their streams first, or give a larger budget"
                )
