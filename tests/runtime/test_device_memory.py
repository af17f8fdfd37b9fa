"""The memory of a card: what is free of it is what is planned with, and all pipelines of a process share it."""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from t2v_rt import RequestError, TextToVideoPipeline
from t2v_rt.engines.backends import Backend, get_backend
from t2v_rt.engines.bundle.manifest import ComponentSpec
from t2v_rt.engines.bundle.store import open_bundle
from t2v_rt.engines.contract import Component
from t2v_rt.runtime.memory.admission import Admission
from t2v_rt.runtime.memory.device_memory import GROWTH, UNPLANNED, DeviceMemory, memory_of
from t2v_rt.runtime.memory.estimates import StageMemory
from t2v_rt.runtime.memory.plan import CARD_RESERVE, MemoryPlan
from tests.conftest import Tiny

REQUEST: dict[str, Any] = {"height": 64, "width": 96, "num_frames": 9, "num_inference_steps": 1, "seed": 1}
GB = 10**9
WAIT = 60.0  # seconds after which a thread that should have ended counts as hanging


@dataclass
class Card:
    """ONNX Runtime on the CPU, as if its engines were on a card that tells what is free.

    Args:
        total: bytes in all.
        others: bytes that other programs hold.
        key: of the card.
        buffers: bytes that it tells of its engines' memory beside weights, or None.
    """

    total: int
    others: int = 0
    key: str | None = None
    buffers: int | None = 0
    backend: Backend = field(default_factory=lambda: get_backend("onnxruntime"))
    own_memory: bool = True
    device: str = ""
    identity: str = "card"
    loaded: int = 0

    @property
    def memory_bytes(self) -> int | None:
        return self.total

    @property
    def device_key(self) -> str | None:
        return self.key

    def free_bytes(self) -> int | None:
        return self.total - self.others - self.loaded - (self.buffers or 0)

    def buffer_bytes(self) -> int | None:
        return self.buffers

    def load(self, folder: Path, name: str, spec: ComponentSpec) -> Component:
        component = self.backend.load(folder, name, spec)
        close = component.close

        def closed() -> None:
            self.loaded -= spec.weights_bytes
            close()

        component.close = closed  # type: ignore[method-assign]
        self.loaded += spec.weights_bytes
        return component


def opened(narrow: Tiny, card: Card, budget: int | None = None, **settings: Any) -> TextToVideoPipeline:
    return TextToVideoPipeline(open_bundle(narrow.bundle), card, budget, **settings)


def plan_of(pipe: TextToVideoPipeline, **settings: Any) -> MemoryPlan:
    return pipe.plan(pipe.stream("a ball", **{**REQUEST, **settings}).request)


def made(weights: int, own: int) -> MemoryPlan:
    stages = tuple(StageMemory(name, weights, own, 0, 0) for name in ("denoise", "decode"))
    return MemoryPlan(stages, StageMemory("encode", 0, 0, 0, 0), (((1, 1), False),), 0, None)


# -- what is free --


@pytest.mark.parametrize(
    ("total", "others", "budget"),
    [
        (8 * GB, 0, 8 * GB - UNPLANNED),
        (8 * GB, 1 * GB, 7 * GB - GROWTH),
        (8 * GB, 8 * GB, 0),
    ],
)
def test_the_budget_is_what_is_free_now(narrow: Tiny, total: int, others: int, budget: int) -> None:
    memory = DeviceMemory()
    room = memory.measure(Card(total, others))
    assert (room.bytes, room.reserve_bytes, room.free_bytes) == (budget, 0, total - others)


def test_what_is_on_the_card_already_counts_once(narrow: Tiny) -> None:
    plan = plan_of(opened(narrow, Card(8 * GB, others=1 * GB)))
    assert (plan.budget_bytes, plan.reserve_bytes, plan.free_bytes) == (7 * GB - GROWTH, 0, 7 * GB)
    told = plan_of(opened(narrow, Card(8 * GB, others=1 * GB), budget=8 * GB))
    assert (told.budget_bytes, told.reserve_bytes, told.free_bytes) == (8 * GB, CARD_RESERVE, None)


def test_engines_of_this_process_are_free_to_its_plans(narrow: Tiny) -> None:
    card = Card(8 * GB)
    pipe = opened(narrow, card)
    first = plan_of(pipe)
    pipe("a ball", **REQUEST)
    card.buffers = 3 * GB
    assert card.loaded > 0
    assert plan_of(pipe) == first
    card.others = 2 * GB
    assert plan_of(pipe).budget_bytes == 6 * GB - GROWTH


def test_what_a_library_holds_besides_does_not_make_the_next_plan_smaller(narrow: Tiny) -> None:
    card = Card(8 * GB, others=1 * GB)
    pipe = opened(narrow, card)
    first = plan_of(pipe)
    card.others += GROWTH
    assert plan_of(pipe) == first
    card.others += 1
    assert plan_of(pipe).budget_bytes == 7 * GB - 2 * GROWTH - 1
    card.others = 0
    assert plan_of(pipe).budget_bytes == 8 * GB - UNPLANNED


def test_engines_whose_memory_is_not_told_are_measured_before_they_are_loaded(narrow: Tiny) -> None:
    card = Card(8 * GB, buffers=None)
    pipe = opened(narrow, card)
    first = plan_of(pipe)
    pipe("a ball", **REQUEST)
    card.others = 3 * GB  # arenas, or another program: who knows
    assert plan_of(pipe) == first
    pipe.close()
    assert plan_of(pipe).budget_bytes == 5 * GB - GROWTH


def test_a_plan_that_is_made_while_a_run_is_on_its_way_knows_what_that_has_yet_to_take(narrow: Tiny) -> None:
    card = Card(8 * GB)
    pipe = opened(narrow, card)
    stream = pipe.stream("a ball", **REQUEST)
    budget = stream._run.plan.budget_bytes
    next(stream)
    card.others = 5 * GB  # the run's own caches, which nobody tells of
    assert plan_of(pipe).budget_bytes == budget
    stream.close()
    assert plan_of(pipe).budget_bytes == 3 * GB - GROWTH


# -- what is said --


def test_a_card_that_is_full_at_the_start_is_told_in_one_line(narrow: Tiny) -> None:
    pipe = opened(narrow, Card(8 * GB, others=8 * GB - GROWTH - 5_000_000))
    with pytest.raises(RequestError) as caught:
        pipe("a ball", **REQUEST)
    assert str(caught.value) == (
        "this request needs about 0.00938 GB in decode, what the GPU has free for it is 0.005 GB; end other programs "
        "that use the GPU, or ask for less: 64x32 with 5 frames would fit (an estimate)"
    )
    assert pipe.stages.components.loaded == ()


@pytest.mark.parametrize(("system", "named"), [("linux", False), ("win32", True)])
def test_a_budget_above_what_is_free_is_warned_of(
    narrow: Tiny, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, system: str, named: bool
) -> None:
    card = Card(8 * GB)
    pipe = opened(narrow, card, budget=8 * GB)
    with caplog.at_level(logging.WARNING):
        pipe.stream("a ball", **REQUEST).close()
        assert caplog.text == ""
        card.others = 8 * GB - 5_000_000
        with monkeypatch.context() as patch:
            patch.setattr("sys.platform", system)
            pipe.stream("a ball", **REQUEST).close()
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("this request is planned with 0.0105 GB, 0.005 GB of the GPU are free; end other programs")
    assert ("Prefer No Sysmem Fallback" in line) == named
    assert "\n" not in line


# -- who shares it --


def test_pipelines_on_one_card_share_its_memory_and_others_do_not(narrow: Tiny) -> None:
    card = Card(8 * GB, key="test:0")
    memory = memory_of(card)
    assert memory_of(Card(8 * GB, key="test:0")) is memory
    assert memory_of(Card(8 * GB, key="test:1")) is not memory
    cpu = get_backend("onnxruntime")
    assert memory_of(cpu) is not memory_of(cpu)
    assert opened(narrow, card)._memory is memory


def test_an_idle_pipeline_lets_go_where_another_needs_the_room(narrow: Tiny) -> None:
    alone = plan_of(opened(narrow, Card(8 * GB)))
    card = Card(alone.peak_bytes + UNPLANNED, key="test:shared")
    pipes = [opened(narrow, card) for _ in range(3)]
    frames, held = [], 0
    for i in (0, 1, 2, 0, 1):
        frames.append(pipes[i]("a ball", **REQUEST).frames)
        held = held or pipes[i].stages.components.held_bytes  # of all, as no prompt is remembered yet
        loaded = [bool(pipe.stages.components.loaded) for pipe in pipes]
        assert loaded == [pipe is pipes[i] for pipe in pipes]
    assert all(np.array_equal(found, frames[0]) for found in frames)
    with_room = Card(alone.peak_bytes + held + UNPLANNED, key="test:two")
    pipes = [opened(narrow, with_room) for _ in range(3)]
    for i in (0, 1, 2):
        pipes[i]("a ball", **REQUEST)
    assert [bool(pipe.stages.components.loaded) for pipe in pipes] == [False, True, True]  # the longest unused went


def test_each_keeps_to_its_own_budget_and_all_to_the_card() -> None:
    memory, plan = DeviceMemory(), made(10, 60)  # 80 alone, 140 two of one pipeline, 160 two of different ones
    memory.measure(Card(UNPLANNED + 159))
    admissions = [Admission(budget, waits=False, device=memory, holder=Held()) for budget in (140, 139)]
    for admission, fits in zip(admissions, (True, False), strict=True):
        with admission.admitted(plan):
            if fits:
                with admission.admitted(plan):
                    assert len(admission.running) == 2
            else:
                with pytest.raises(RequestError, match=r"need about 1.4e-07 GB together, the budget is 1.39e-07 GB"):
                    admission.admitted(plan).__enter__()
    with admissions[0].admitted(plan), admissions[1].admitted(plan) as less:  # which keeps less, so that both fit
        assert not less.resident
        assert len(admissions[0].running) == len(admissions[1].running) == 1
        assert memory.needed(memory.running.values()) == 80 + 70
    with admissions[0].admitted(made(10, 100)), pytest.raises(RequestError, match="1 on their way need about"):
        admissions[1].admitted(plan).__enter__()
    assert memory.running == {}
    assert not memory.queue


@dataclass(eq=False)
class Held:
    """Components that are not loaded."""

    weights_bytes: int = 0
    held_bytes: int = 0

    def release_idle(self) -> None:
        pass


def test_a_thread_with_a_run_on_its_way_does_not_wait_behind_one_that_waits_for_it() -> None:
    memory = DeviceMemory()
    memory.measure(Card(UNPLANNED + 200))
    admissions = [Admission(None, device=memory, holder=Held()) for _ in range(2)]
    done = []

    def work() -> None:
        with admissions[1].admitted(made(10, 170)):
            done.append(1)

    with admissions[0].admitted(made(10, 60)):
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        while not memory.queue:
            pass
        with admissions[1].admitted(made(10, 60)):
            assert done == []
    thread.join(WAIT)
    assert done == [1]


def test_streams_of_two_pipelines_keep_to_the_card_together(narrow: Tiny) -> None:
    alone = plan_of(opened(narrow, Card(8 * GB)))
    both = alone.peak_bytes + alone.releasing().peak_bytes
    card = Card(both + UNPLANNED, key="test:streams")
    pipes = [opened(narrow, card) for _ in range(2)]
    expected = [list(pipe.stream("a ball", **REQUEST)) for pipe in pipes]
    streams = [pipe.stream("a ball", **REQUEST) for pipe in pipes]
    assert all(stream._run.plan.resident for stream in streams)  # each by itself
    found = list(zip(*streams, strict=True))
    for stream, frames in zip(expected, zip(*found, strict=True), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(stream, frames, strict=True))
    smaller = Card(both - 1 + UNPLANNED, key="test:smaller")
    streams = [opened(narrow, smaller).stream("a ball", **REQUEST) for _ in range(2)]
    next(streams[0])
    with pytest.raises(RequestError, match="1 that this thread has begun need about"):
        next(streams[1])
