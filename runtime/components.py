"""A bundle's components in memory: loaded when a stage needs them, kept for as long as a running plan keeps them."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Collection, Generator, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

from t2v_rt.engines.backends import Backend, load_shards
from t2v_rt.engines.bundle.store import Bundle
from t2v_rt.engines.contract import Component, Engine
from t2v_rt.runtime.first_use import check_at_first_use
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
        self._users: Counter[str] = Counter()  # stages that are using a component now
        self._keepers: Counter[str] = Counter()  # runs on their way whose plans keep a component loaded
        self._lock = threading.RLock()
        forked.watch(self)

    def after_fork(self) -> None:
        """Leaves the engines to the parent; the next use loads them again. See `t2v_rt.system.forked`."""
        self._loaded, self._users, self._keepers, self._lock = {}, Counter(), Counter(), threading.RLock()

    @property
    def loaded(self) -> tuple[str, ...]:
        """Names of the components that are loaded now."""
        return tuple(self._loaded)

    @contextmanager
    def following(self, plan: MemoryPlan) -> Iterator[None]:
        """Keeps loaded what a plan says, while a run with it is on its way; what no such run keeps goes at once."""
        with self._lock:
            keepers = self._keepers  # a child that is forked in the block counts anew; so below
            keepers.update(plan.kept)
        try:
            self.release_idle()
            yield
        finally:
            with self._lock:
                keepers.subtract(plan.kept)

    def get(self, name: str) -> Component:
        """A component's engines, loaded at the first use, and tested at the first on this device."""
        with self._lock:
            if name not in self._loaded:
                self._loaded[name] = self._load(name)
            return self._loaded[name]

    def _load(self, name: str) -> Component:
        """Loads a component from the files that were opened, and tests it."""
        with ExitStack() as undo:
            with self.bundle.held(self.bundle.component_files(name)):
                component = self._backend.load(self.bundle.folder, name, self.bundle.manifest.components[name])
                undo.callback(component.close)
                check_at_first_use(self.bundle, name, lambda: [component], self._backend.device)
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
        try:
            self.bundle.check_loaded(files)
            yield component
            self.bundle.check_loaded(files)
        finally:
            with self._lock:
                users[name] -= 1
            self.release_idle(but=plan.kept)

    def engines(self, name: str, plan: MemoryPlan) -> Generator[Engine, None, None]:
        """A component's engines in the order they run: all of them loaded or, where no plan keeps them, one by one."""
        self.release_idle(but=plan.kept)
        if name not in plan.kept and not self._keepers[name] and name not in self._loaded:
            spec = self.bundle.manifest.components[name]
            shards = partial(load_shards, self._backend, self.bundle.folder, name, spec)
            with self.bundle.held(self.bundle.component_files(name)):
                check_at_first_use(self.bundle, name, shards, self._backend.device)
                for shard in shards():
                    yield from shard.engines.values()
            return
        with self.stage(name, plan) as component:
            yield from component.engines.values()

    def release_idle(self, but: Collection[str] = ()) -> None:
        """Closes what no stage uses and no running plan keeps, but for some components."""
        with self._lock:
            held = {*but, *(+self._users), *(+self._keepers)}
            components = [self._loaded.pop(name) for name in [*self._loaded] if name not in held]
        for component in components:
            component.close()

    def release(self, name: str) -> None:
        """Closes a component's engines unless a stage is using them; the next use loads them again."""
        with self._lock:
            component = None if self._users[name] else self._loaded.pop(name, None)
        if component is not None:
            component.close()

    def close(self) -> None:
        """Releases all engines that no stage is using; a later use loads them again."""
        for name in self.loaded:
            self.release(name)
