"""Calls after the first ones leave nothing behind, and `close` frees all."""

from __future__ import annotations

import gc
import tracemalloc
import weakref

import pytest

from t2v_rt import TextToVideoPipeline
from t2v_rt.engines.contract import Engine
from t2v_rt.engines.onnxruntime.backend import OrtComponent, OrtState
from tests.conftest import Tiny

SETTLING = 20  # calls in which caches of the interpreter and of libraries fill
CALLS = 5
MOST_BYTES = 25_000  # of all calls: tables of interpreter and libraries settle by 1 to 5 KB each; a video has more
MOST_OBJECTS = 20


@pytest.fixture
def warm(narrow: Tiny) -> TextToVideoPipeline:
    pipe = TextToVideoPipeline.from_pretrained(narrow.bundle, prompt_cache=False)
    pipe.warmup()
    for _ in range(2):
        call(pipe)
    return pipe


def call(pipe: TextToVideoPipeline) -> None:
    pipe("a ball", seed=1)


def test_steady_calls_do_not_grow(warm: TextToVideoPipeline) -> None:
    tracemalloc.start()
    try:
        for _ in range(SETTLING):
            call(warm)
        gc.collect()
        objects, (held, _) = len(gc.get_objects()), tracemalloc.get_traced_memory()
        for _ in range(CALLS):
            call(warm)
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - held, len(gc.get_objects()) - objects
    finally:
        tracemalloc.stop()
    assert grown[0] < MOST_BYTES
    assert grown[1] < MOST_OBJECTS


def test_a_call_leaves_no_state_behind(warm: TextToVideoPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    states: list[weakref.ref[OrtState]] = []
    make = OrtComponent.new_states

    def noted(self, count, **sizes):  # type: ignore[no-untyped-def]
        made = make(self, count, **sizes)
        states.extend(map(weakref.ref, made))
        return made

    monkeypatch.setattr(OrtComponent, "new_states", noted)
    call(warm)
    gc.collect()
    assert len(states) == 2  # head and tail
    assert all(state() is None for state in states)


def test_close_frees_all_engines(warm: TextToVideoPipeline) -> None:
    engines: list[Engine] = []
    for name in warm.stages.components.loaded:
        engines += warm.stages.components.get(name).engines.values()
    assert len(engines) >= 5
    sessions = [weakref.ref(vars(engine)["_session"]) for engine in engines]
    gone = [weakref.ref(engine) for engine in engines]
    engines.clear()
    warm.close()
    gc.collect()
    assert warm.stages.components.held_bytes == 0
    assert all(reference() is None for reference in [*sessions, *gone])


def test_a_run_on_its_way_keeps_its_engines_until_it_ends(warm: TextToVideoPipeline) -> None:
    stream = warm.stream("a ball", seed=1, num_frames=9)
    next(stream)
    warm.close()
    assert warm.stages.components.loaded == ("vae_decoder",)
    assert len(list(stream)) == 8
    warm.close()
    assert not warm.stages.components.held_bytes
