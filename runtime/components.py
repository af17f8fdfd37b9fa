"""A bundle's components in memory: loaded when a stage needs them, kept for as long as a running plan keeps them."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Collection, Generator, Iterator
from contextlib import ExitStack, contextmanager

from t2v_rt.engines.backend_info import backend_info
from t2v_rt.engines.backends import Backend, load_shards
from t2v_rt.engines.bundle.store import Bundle
from t2v_rt.engines.contract import Component, Engine
from t2v_rt.runtime.first_use import is_proven, proven
from t2v_rt.runtime.memory.estimates import StageMemory
from t2v_rt.runtime.memory.plan import MemoryPlan
from t2v_rt.system import forked


class Components:
    """The loaded components of an opened bundle; safe to share between threads.

    What a run keeps loaded is for its own plan to say, for as long as it is on its way: a component that its plan does
    not keep goes when its stage ends, unless another stage uses it or another running plan keeps it.

    Args:
        bundle: the opened bundle.
        backend: loads its engines.
    """

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self.bundle = bundle
        self._backend = backend
        self._loaded: dict[str, Component] = {}
        self._used: dict[str, int] = {}  # what each holds beside its weights, of the largest video it was used for
        self._users: Counter[str] = Counter()  # stages that are using a component now
        self._keepers: Counter[str] = Counter()  # runs on their way whose plans keep a component loaded
        self._lock = threading.RLock()
        forked.watch(self)

    def after_fork(self) -> None:
        """Leaves the engines to the parent; the next use loads them again. See `t2v_rt.system.forked`."""
        self._loaded, self._used, self._lock = {}, {}, threading.RLock()
        self._users, self._keepers = Counter(), Counter()

    def twin(self) -> Components:
        """Others of the same bundle and backend."""
        return Components(self.bundle, self._backend)

    @property
    def loaded(self) -> tuple[str, ...]:
        """Names of the components that are loaded now."""
        return tuple(self._loaded)

    @property
    def weights_bytes(self) -> int:
        """Of the components that are loaded now."""
        return sum(component.spec.weights_bytes for component in list(self._loaded.values()))

    @property
    def held_bytes(self) -> int:
        """Of the components that are loaded now: weights and what else they hold."""
        return self.weights_bytes + sum(list(self._used.values()))

    @contextmanager
    def following(self, plan: MemoryPlan) -> Iterator[None]:
        """Keeps loaded what a plan says, while a run with it is on its way; what no such run keeps goes at once."""
        with self._lock:
            keepers = self._keepers  # a child that is forked in the block counts anew; so below
            keepers.update(plan.kept)
        try:
            self.release_idle()
            self._make_room(plan)
            yield
        finally:
            with self._lock:
                keepers.subtract(plan.kept)

    def _make_room(self, plan: MemoryPlan) -> None:
        """Releases what an earlier run has left larger than a plan knows it, where its budget lacks the room for that.

        Buffers at the boundary of an engine grow with the videos and do not shrink.
        """
        used = {**self._used}
        if plan.budget_bytes is None or plan.beside(used).peak_bytes <= plan.budget_bytes:
            return
        for stage in plan.stages:
            if used.get(stage.component, 0) > self._held(stage):
                self.release(stage.component)

    def get(self, name: str) -> Component:
        """A component's engines, loaded at the first use, and tested at the first on this device."""
        with self._lock:
            if name not in self._loaded:
                self._loaded[name] = self._load(name)
            return self._loaded[name]

    def _load(self, name: str) -> Component:
        """Loads a component from the files that were opened, and tests it."""
        spec, device = self.bundle.manifest.components[name], self._backend.device
        with ExitStack() as undo, self.bundle.held(self.bundle.component_files(name)):
            component = self._backend.load(self.bundle.folder, name, spec)
            undo.callback(component.close)
            if not is_proven(self.bundle, name, device):
                for _ in proven(self.bundle, name, [component], device):
                    pass
                component.trim()  # of what a test of other sizes than a plan counts has left
            undo.pop_all()
        return component

    @contextmanager
    def stage(self, name: str, plan: MemoryPlan) -> Iterator[Component]:
        """A component for one stage of a run.

        Args:
            name: of the component.
            plan: of the run. What it does not keep, and nobody uses, is released before the stage, and the component
                after it, also after an error.
        """
        self.release_idle(but={*plan.kept, name})
        files = self.bundle.component_files(name)
        with self._lock:  # which nobody can release between its loading and its use
            component, users = self.get(name), self._users
            users[name] += 1
            self._note_use(name, plan)
        try:
            self.bundle.check_loaded(files)
            yield component
            self.bundle.check_loaded(files)
        finally:
            with self._lock:
                users[name] -= 1
            self.release_idle(but=plan.kept)

    def _note_use(self, name: str, plan: MemoryPlan) -> None:
        """Remembers what a component holds after a stage of a plan."""
        for stage in plan.stages:
            if stage.component == name:
                self._used[name] = max(self._used.get(name, 0), self._held(stage))

    def _held(self, stage: StageMemory) -> int:
        """What a stage's engines hold after it, beside weights: graphs are run in memory that each has for itself."""
        planned = backend_info(self.bundle.manifest.backend).ahead_of_time
        return stage.io_bytes + (0 if planned else stage.context_bytes)

    def engines(self, name: str, plan: MemoryPlan) -> Generator[Engine, None, None]:
        """A component's engines in the order they run: all of them loaded or, where no plan keeps them, one by one."""
        self.release_idle(but=plan.kept)
        if name not in plan.kept and not self._keepers[name] and name not in self._loaded:
            spec = self.bundle.manifest.components[name]
            with self.bundle.held(self.bundle.component_files(name)):
                shards = load_shards(self._backend, self.bundle.folder, name, spec)
                for shard in proven(self.bundle, name, shards, self._backend.device):
                    yield from shard.engines.values()
            return
        with self.stage(name, plan) as component:
            yield from component.engines.values()

    def release_idle(self, but: Collection[str] = ()) -> None:
        """Closes what no stage uses and no running plan keeps, but for some components."""
        with self._lock:
            held = {*but, *(+self._users), *(+self._keepers)}
            components = [self._taken(name) for name in [*self._loaded] if name not in held]
        for component in components:
            component.close()

    def release(self, name: str) -> None:
        """Closes a component's engines unless a stage is using them; the next use loads them again."""
        with self._lock:
            component = None if self._users[name] or name not in self._loaded else self._taken(name)
        if component is not None:
            component.close()

    def _taken(self, name: str) -> Component:
        """A component that is to be closed; nobody is given it any more."""
        self._used.pop(name, None)
        return self._loaded.pop(name)

    def close(self) -> None:
        """Releases all engines that no stage is using; a later use loads them again."""
        for name in self.loaded:
            self.release(name)
