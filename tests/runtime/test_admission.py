"""Runs of one pipeline at the same time: each follows its own memory plan, and all keep to the budget together."""

from __future__ import annotations

import gc
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from t2v_rt import CancelledError, RequestError, TextToVideoPipeline
from t2v_rt.engines.backends import Backend, get_backend
from t2v_rt.engines.bundle.manifest import ComponentSpec
from t2v_rt.engines.bundle.store import open_bundle
from t2v_rt.engines.contract import Component
from t2v_rt.runtime.memory.admission import Admission
from t2v_rt.runtime.memory.estimates import StageMemory
from t2v_rt.runtime.memory.plan import ALL, MemoryPlan, make_plan, together_bytes
from tests.conftest import Tiny

SMALL: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 1, "seed": 1}
LARGE: dict[str, Any] = {**SMALL, "height": 64, "width": 96, "num_frames": 9}
WAIT = 60.0  # seconds after which a thread that should have ended counts as hanging


class Watched:
    """A backend that tells how many bytes of weights were loaded at most."""

    device = identity = ""
    own_memory: bool = False
    memory_bytes: int | None = None
    device_key: str | None = None

    def __init__(self, backend: Backend) -> None:
        self.backend, self.loaded, self.most = backend, 0, 0
        self._lock = threading.Lock()

    def free_bytes(self) -> int | None:
        return None

    def buffer_bytes(self) -> int | None:
        return None

    def load(self, folder: Path, name: str, spec: ComponentSpec) -> Component:
        component, close = self.backend.load(folder, name, spec), Component.close
        self._count(spec.weights_bytes)

        def closed() -> None:
            self._count(-spec.weights_bytes)
            close(component)

        component.close = closed  # type: ignore[method-assign]
        return component

    def _count(self, nbytes: int) -> None:
        with self._lock:
            self.loaded += nbytes
            self.most = max(self.most, self.loaded)


def plan_of(pipe: TextToVideoPipeline, settings: dict[str, Any]) -> MemoryPlan:
    return pipe.plan(pipe.stream("a ball", **settings).request)


def made(weights: int, own: int, resident: bool = True) -> MemoryPlan:
    """A plan of two stages."""
    stages = tuple(StageMemory(name, weights, own, 0, 0) for name in ("denoise", "decode"))
    kept = ALL if resident else frozenset[str]()
    return MemoryPlan(stages, StageMemory("encode", 0, 0, 0, 0), (((1, 1), False),), 0, None, kept=kept)


# -- plans --


def test_a_call_makes_one_plan_and_follows_it(narrow: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = []

    def counted(*arguments: Any, **options: Any) -> MemoryPlan:
        plans.append(make(*arguments, **options))
        return plans[-1]

    make = make_plan
    pipe = TextToVideoPipeline.from_pretrained(narrow.bundle)
    monkeypatch.setattr("t2v_rt.runtime.memory.planner.make_plan", counted)
    pipe("a ball", **SMALL)
    assert len(plans) == 1
    stream = pipe.stream("a ball", **SMALL)
    assert stream._run.plan is plans[1]
    list(stream)
    assert len(plans) == 2


def test_weights_count_once_and_what_runs_take_beside_them_for_each() -> None:
    one, other = made(10, 1), made(10, 5)
    assert together_bytes([one]) == one.peak_bytes == 21
    assert together_bytes([one, other]) == 20 + 1 + 5
    released = made(10, 5, resident=False)
    assert together_bytes([released]) == released.least_bytes == 15
    assert together_bytes([released, one]) == 20 + 5 + 1
    assert together_bytes([released] * 2) == 20 + 5 + 5  # which may be in different stages
    assert together_bytes([released] * 3) == 20 + 15
    assert together_bytes([released.of_stage("decode")] * 2) == 10 + 10


# -- streams --


def test_a_stream_keeps_to_its_plan_while_another_is_opened(narrow: Tiny) -> None:
    watched = Watched(get_backend("onnxruntime"))
    bundle = open_bundle(narrow.bundle)
    free = TextToVideoPipeline(bundle, watched)
    budget = plan_of(free, LARGE).least_bytes  # where the large one keeps the VAE only, and the small one everything
    pipe = TextToVideoPipeline(bundle, watched, budget)
    assert (plan_of(pipe, LARGE).resident, plan_of(pipe, SMALL).resident) == (False, True)
    large = pipe.stream("a ball", **LARGE)
    small = pipe.stream("a cat", **SMALL)  # opened, and nothing of it begun
    next(large)
    loaded = pipe.stages.components.loaded
    assert loaded == ("vae_decoder",)
    list(large)
    assert {*pipe.stages.components.loaded} == plan_of(pipe, LARGE).kept == {"vae_decoder"}
    list(small)
    assert set(pipe.stages.components.loaded) == set(bundle.manifest.components)
    next(pipe.stream("a ball", **LARGE))  # what the small one left loaded goes first
    weights = [spec.weights_bytes for spec in bundle.manifest.components.values()]
    assert watched.most <= sum(weights)
    gc.collect()
    assert pipe.admission.running == ()


def test_two_streams_under_one_budget_take_turns(narrow: Tiny) -> None:
    free = TextToVideoPipeline.from_pretrained(narrow.bundle)
    expected = [list(free.stream("a ball", **settings)) for settings in (LARGE, SMALL)]
    plans = [plan_of(free, LARGE), plan_of(free, SMALL).releasing()]
    pipe = TextToVideoPipeline.from_pretrained(narrow.bundle, vram_budget=together_bytes(plans))
    assert plan_of(pipe, SMALL).resident  # by itself; beside the other it is content with less
    streams = [pipe.stream("a ball", **settings) for settings in (LARGE, SMALL)]
    found: list[list[np.ndarray]] = [[], []]
    running: set[int] = set()
    for i in (0, 1, 0, 1):
        found[i].append(next(streams[i]))
        running.add(len(pipe.admission.running))
        assert together_bytes(pipe.admission.running) <= together_bytes(plans)
    for stream, frames in zip(streams, found, strict=True):
        frames.extend(stream)
    assert running == {1, 2}
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_thread_does_not_wait_for_itself(narrow: Tiny) -> None:
    free = TextToVideoPipeline.from_pretrained(narrow.bundle)
    pipe = TextToVideoPipeline.from_pretrained(narrow.bundle, vram_budget=plan_of(free, LARGE).least_bytes)
    first, second = (pipe.stream("a ball", **LARGE) for _ in range(2))
    next(first)
    with pytest.raises(RequestError, match=r"1 that this thread has begun need about .* GB together, the budget is"):
        next(second)
    first.close()
    assert len(list(pipe.stream("a ball", **LARGE))) == LARGE["num_frames"]
    next(pipe.stream("a ball", **LARGE))  # dropped where it stands, and its memory with it
    gc.collect()
    assert pipe.admission.running == ()


def test_what_fails_gives_its_memory_back(narrow: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = TextToVideoPipeline.from_pretrained(narrow.bundle, vram_budget="1GB")
    cancel = threading.Event()
    for stage in ("encode", "denoise", "decode"):
        with pytest.raises(CancelledError):
            pipe(
                "a ball",
                cancel=cancel,
                progress=lambda found, *_, stage=stage: cancel.set() if found == stage else None,
                **SMALL,
            )
        cancel.clear()
        assert pipe.admission.running == ()
        assert not +pipe.stages.components._keepers


# -- threads --


def test_threads_of_mixed_sizes_under_a_budget_for_two(narrow: Tiny) -> None:
    free = TextToVideoPipeline.from_pretrained(narrow.bundle)
    sizes = [LARGE, SMALL]
    expected = [free("a ball", **settings).frames for settings in sizes]
    budget = together_bytes([plan_of(free, LARGE)] * 2)
    pipe = TextToVideoPipeline.from_pretrained(narrow.bundle, vram_budget=budget)
    found: dict[int, Any] = {}
    together: list[int] = []

    def work(i: int) -> None:
        look = lambda *_: together.append(together_bytes(pipe.admission.running))  # noqa: E731
        found[i] = pipe("a ball", progress=look, **sizes[i % 2]).frames

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert sorted(found) == list(range(8))
    assert all(np.array_equal(found[i], expected[i % 2]) for i in found)
    assert max(together) <= budget
    assert pipe.admission.running == ()


def test_runs_begin_in_the_order_they_came() -> None:
    admission, order = Admission(100), list[int]()
    began = threading.Event()

    def work(i: int, plan: MemoryPlan) -> None:
        began.set()
        with admission.admitted(plan):
            order.append(i)

    with ExitStack() as held:
        held.enter_context(admission.admitted(made(10, 60)))
        threads = []
        for i, own in enumerate((70, 1)):  # the second would fit at once, and waits for its turn
            threads.append(threading.Thread(target=work, args=(i, made(10, own)), daemon=True))
            threads[-1].start()
            began.wait(WAIT)
            began.clear()
            while len(admission._device.queue) <= i:
                pass
        assert order == []
    for thread in threads:
        thread.join(WAIT)
    assert order == [0, 1]


def test_waiting_ends_where_it_is_cancelled_or_not_wanted() -> None:
    plan, cancel = made(10, 60), threading.Event()
    errors = list[BaseException]()

    def work(admission: Admission) -> None:
        try:
            with admission.admitted(plan, cancel):
                pass
        except (CancelledError, RequestError) as exc:
            errors.append(exc)

    for admission in (Admission(100), Admission(100, waits=False)):
        with admission.admitted(plan):
            thread = threading.Thread(target=work, args=(admission,), daemon=True)
            thread.start()
            cancel.set()
            thread.join(WAIT)
        assert not admission._device.queue
        with admission.admitted(plan):  # nothing is left of it
            assert len(admission.running) == 1
    assert [type(error) for error in errors] == [CancelledError, RequestError]
    assert "this request and 1 on their way need about" in str(errors[1])


def test_without_a_budget_all_begin_at_once() -> None:
    admission = Admission(None)
    with ExitStack() as held:
        for _ in range(5):
            held.enter_context(admission.admitted(made(10, 10**12)))
        assert len(admission.running) == 5
