"""What happens inside a call, seen from outside: proxies around engines and the sampler that take down times.

The product's code is not touched and knows nothing of it. A record costs a microsecond beside engine calls of
milliseconds.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from t2v_rt.engines.backends import Backend
from t2v_rt.engines.bundle.manifest import ComponentSpec
from t2v_rt.engines.contract import Component, Engine, EngineState, Feeds
from t2v_rt.runtime.schedulers.base import Array, Generators, Scheduler, SchedulerOutput

Sizes = tuple[tuple[str, int], ...]  # symbols of an engine's shapes, sorted
LOAD, ENGINE, SCHEDULER, MARK = "load", "engine", "scheduler", "mark"


@dataclass(frozen=True)
class Event:
    """Something that took time.

    Args:
        kind: `load`, `engine`, `scheduler` or, for a point in time, `mark`.
        name: of the component, the sampler, or the stage whose progress was told.
        start: reading of the clock, in seconds.
        end: reading of the clock, in seconds.
        role: of the engine.
        sizes: that an engine was called with.
    """

    kind: str
    name: str
    start: float
    end: float
    role: str = ""
    sizes: Sizes = ()

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end - self.start


@dataclass
class Recorder:
    """Events of one call after another."""

    events: list[Event] = field(default_factory=list)

    def take(self) -> list[Event]:
        """All events since they were last taken, in the order in which they ended."""
        taken, self.events = self.events, []
        return taken

    @contextmanager
    def timed(self, kind: str, name: str, role: str = "", sizes: Sizes = ()) -> Iterator[None]:
        """Records how long a block takes."""
        start = time.perf_counter()
        yield
        self.events.append(Event(kind, name, start, time.perf_counter(), role, sizes))

    def mark(self, stage: str, done: int, total: int) -> None:
        """Records a point in time; it is what a call takes as `progress`."""
        now = time.perf_counter()
        self.events.append(Event(MARK, stage, now, now, f"{done}/{total}"))


class RecordedEngine(Engine):
    """An engine whose calls are recorded.

    Args:
        engine: that does the work.
        component: name of its component.
        role: its role there.
        recorder: that is told.
    """

    def __init__(self, engine: Engine, component: str, role: str, recorder: Recorder) -> None:
        super().__init__(engine.name, engine.spec)
        self._engine, self._component, self._role, self._recorder = engine, component, role, recorder

    def infer(self, feeds: Feeds, state: EngineState | None = None, *, keep: Sequence[str] = ()) -> dict[str, Any]:
        with self._recorder.timed(ENGINE, self._component, self._role, self._sizes(feeds)):
            return self._engine.infer(feeds, state, keep=keep)

    def _sizes(self, feeds: Feeds) -> Sizes:
        """The symbols' sizes, of feeds that may be wrong: the engine itself says so."""
        sizes: dict[str, int] = {}
        for spec in self.inputs:
            for dim, size in zip(spec.shape, feeds[spec.name].shape if spec.name in feeds else (), strict=False):
                if isinstance(dim, str):
                    factor, _, symbol = dim.rpartition("*")
                    sizes.setdefault(symbol, size // int(factor or 1))
        return tuple(sorted(sizes.items()))

    def _run(self, feeds: Feeds, state: EngineState | None, keep: Sequence[str]) -> dict[str, Any]:
        return self._engine.infer(feeds, state, keep=keep)

    def close(self) -> None:
        self._engine.close()


@dataclass(frozen=True)
class ForwardedBackend:
    """A backend that is another one; base of those that do something more.

    Args:
        backend: that does the work.
    """

    backend: Backend

    @property
    def device(self) -> str:
        return self.backend.device

    @property
    def identity(self) -> str:
        return self.backend.identity

    @property
    def own_memory(self) -> bool:
        return self.backend.own_memory

    @property
    def memory_bytes(self) -> int | None:
        return self.backend.memory_bytes

    @property
    def device_key(self) -> str | None:
        return self.backend.device_key

    def free_bytes(self) -> int | None:
        return self.backend.free_bytes()

    def buffer_bytes(self) -> int | None:
        return self.backend.buffer_bytes()

    def load(self, folder: Path, name: str, spec: ComponentSpec) -> Component:
        """Loads the engines of one component."""
        return self.backend.load(folder, name, spec)


@dataclass(frozen=True)
class RecordedBackend(ForwardedBackend):
    """A backend whose components are recorded: how long they take to load, and each call of their engines.

    Args:
        backend: that does the work.
        recorder: that is told.
    """

    recorder: Recorder

    def load(self, folder: Path, name: str, spec: ComponentSpec) -> Component:
        with self.recorder.timed(LOAD, name):
            component = super().load(folder, name, spec)
        engines: Mapping[str, Engine] = component.engines
        component.engines = {
            role: RecordedEngine(engine, name, role, self.recorder) for role, engine in engines.items()
        }
        return component


def recorded_scheduler(scheduler: Scheduler[Any], recorder: Recorder) -> Scheduler[Any]:
    """A copy of a sampler whose steps are recorded; so are those of its own copies, which is what calls work on."""
    kind = type(scheduler)

    def step(
        self: Scheduler[Any],
        model_output: Array,
        timestep: float,
        sample: Array,
        *,
        generator: Generators = None,
        eta: float = 0.0,
        variance_noise: Array | None = None,
    ) -> SchedulerOutput:
        with recorder.timed(SCHEDULER, kind.__name__):
            return kind.step(
                self, model_output, timestep, sample, generator=generator, eta=eta, variance_noise=variance_noise
            )

    copy = scheduler.copy()
    copy.__class__ = type(kind.__name__, (kind,), {"step": step, "__module__": kind.__module__})
    return copy
