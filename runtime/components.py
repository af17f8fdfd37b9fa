"""A bundle's components in memory: loaded when a stage needs them, kept for as long as a running plan keeps them."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Generator, Iterator
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

    What a run keeps loaded is for its own plan to say, for as long as it is on its way: where its plan releases each
    stage, a component goes when that stage ends, unless another stage uses it or another running plan keeps it.

    Args:
        bundle: the opened bundle.
        backend: loads its engines.
    """

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self.bundle = bundle
        self._backend = backend
        self._loaded: dict[str, Component] = {}
        self._users: Counter[str] = Counter()  # stages that are using a component now
        self._runs: Counter[bool] = Counter()  # runs on their way whose plans keep what is loaded, and others
        self._lock = threading.RLock()
        forked.watch(self)

    def after_fork(self) -> None:
        """Leaves the engines to the parent; the next use loads them again. See `t2v_rt.system.forked`."""
        self._loaded, self._users, self._runs, self._lock = {}, Counter(), Counter(), threading.RLock()

    @property
    def loaded(self) -> tuple[str, ...]:
        """Names of the components that are loaded now."""
        return tuple(self._loaded)

    @contextmanager
    def following(self, plan: MemoryPlan) -> Iterator[None]:
        """Keeps what is loaded while a run with such a plan is on its way, where the plan says so."""
        with self._lock:
            runs = self._runs  # a child that is forked in the block counts anew; so below
            runs[plan.resident] += 1
        try:
            yield
        finally:
            with self._lock:
                runs[plan.resident] -= 1

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
                component.trim()  # of what a test of other sizes than a plan counts has left
            undo.pop_all()
        return component

    @contextmanager
    def stage(self, name: str, plan: MemoryPlan) -> Iterator[Component]:
        """A component for one stage of a run.

        Args:
            name: of the component.
            plan: of the run. Where it keeps nothing loaded, what nobody uses is released before the stage, and the
                component after it, also after an error.
        """
        if not plan.resident:
            self.release_idle(but=name)
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
            if not plan.resident:
                self.release_idle()

    def engines(self, name: str, plan: MemoryPlan) -> Generator[Engine, None, None]:
        """A component's engines in the order they run, all of them loaded or, where a plan streams them, one by one."""
        if plan.streamed and name not in self._loaded:
            if not plan.resident:
                self.release_idle()
            spec = self.bundle.manifest.components[name]
            shards = partial(load_shards, self._backend, self.bundle.folder, name, spec)
            with self.bundle.held(self.bundle.component_files(name)):
                check_at_first_use(self.bundle, name, shards, self._backend.device)
                for shard in shards():
                    yield from shard.engines.values()
            return
        with self.stage(name, plan) as component:
            yield from component.engines.values()

    def release_idle(self, but: str = "") -> None:
        """Closes what no stage uses, but for one component, unless a running plan keeps it."""
        with self._lock:
            idle = [] if self._runs[True] else [name for name in self._loaded if name != but and not self._users[name]]
            components = [self._loaded.pop(name) for name in idle]
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
