"""Cancellation: where a request stops, and that the pipeline goes on afterwards."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from t2v_rt import CancelledError, RequestError, T2VError, TextToVideoPipeline
from t2v_rt.runtime.denoise.denoiser import Denoiser, Prompts
from tests.conftest import Tiny

REQUEST: dict[str, Any] = {"seed": 5, "num_frames": 9}


def cancelled(pipe: TextToVideoPipeline, cancel: threading.Event, **settings: Any) -> list[tuple[str, int]]:
    """The progress of a request that must be cancelled."""
    seen: list[tuple[str, int]] = []
    watch = settings.pop("progress", lambda *_: None)

    def progress(stage: str, done: int, total: int) -> None:
        seen.append((stage, done))
        watch(stage, done, total)

    with pytest.raises(CancelledError, match="was cancelled in stage") as caught:
        pipe("a red ball", cancel=cancel, progress=progress, **REQUEST, **settings)
    assert isinstance(caught.value, T2VError)
    assert caught.value.exit_code == 130
    return seen


@pytest.fixture(scope="module")
def fresh(narrow: Tiny) -> Any:
    return TextToVideoPipeline.from_pretrained(narrow.bundle)("a red ball", **REQUEST).frames


def test_before_the_call(pipe: TextToVideoPipeline, fresh: Any) -> None:
    cancel = threading.Event()
    cancel.set()
    assert cancelled(pipe, cancel) == []
    cancel.clear()
    assert np.array_equal(pipe("a red ball", cancel=cancel, **REQUEST).frames, fresh)


@pytest.mark.parametrize("guidance_batch", [True, False])
def test_in_a_step_callback(pipe: TextToVideoPipeline, fresh: Any, guidance_batch: bool) -> None:
    cancel = threading.Event()

    def stop(_: Any, step: int, t: float, tensors: dict[str, Any]) -> None:
        if step == 1:
            cancel.set()

    seen = cancelled(pipe, cancel, callback_on_step_end=stop, guidance_batch=guidance_batch)
    assert seen[-1] == ("denoise", 2)
    assert not [stage for stage, _ in seen if stage == "decode"]
    assert np.array_equal(pipe("a red ball", **REQUEST).frames, fresh)


def test_after_the_last_step_nothing_is_decoded(pipe: TextToVideoPipeline, fresh: Any) -> None:
    cancel = threading.Event()
    seen = cancelled(pipe, cancel, progress=lambda stage, done, total: cancel.set() if done == 4 else None)
    assert seen[-1] == ("denoise", 4)
    assert np.array_equal(pipe("a red ball", **REQUEST).frames, fresh)


def test_while_decoding(pipe: TextToVideoPipeline, fresh: Any) -> None:
    cancel = threading.Event()

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "decode":
            cancel.set()

    seen = cancelled(pipe, cancel, progress=stop)
    assert seen[-1] == ("decode", 1)  # of three
    assert np.array_equal(pipe("a red ball", **REQUEST).frames, fresh)


def test_a_stream_ends_at_the_next_chunk(pipe: TextToVideoPipeline, fresh: Any) -> None:
    cancel = threading.Event()
    stream = pipe.stream("a red ball", cancel=cancel, **REQUEST)
    assert np.array_equal(next(stream), fresh[0, 0])
    cancel.set()
    with pytest.raises(CancelledError, match="stage decode"):
        next(stream)
    assert np.array_equal(pipe("a red ball", **REQUEST).frames, fresh)


def test_between_the_two_calls_of_a_step(pipe: TextToVideoPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    cancel, calls = threading.Event(), []
    component = pipe.stages.components.get("transformer")
    infer = component["model"].infer

    def watched(feeds: Any) -> Any:
        calls.append(len(feeds["timestep"]))
        cancel.set()
        return infer(feeds)

    monkeypatch.setattr(component["model"], "infer", watched)
    embeds = pipe.encode_prompt(["a ball"])
    denoiser = Denoiser(component, pipe.stages.text, Prompts(embeds, embeds), False, cancel)
    with pytest.raises(CancelledError):
        denoiser.predict(np.zeros((1, 4, 1, 4, 4), np.float32), 500.0, 2)
    assert calls == [1]


def test_a_small_budget_releases_what_was_cancelled(narrow: Tiny, fresh: Any) -> None:
    whole = TextToVideoPipeline.from_pretrained(narrow.bundle)
    stages = whole.plan(whole.stream("a red ball", **REQUEST).request).stages
    largest = max(stage.total_bytes for stage in stages)
    pipe = TextToVideoPipeline.from_pretrained(narrow.bundle, vram_budget=largest)
    cancel = threading.Event()
    cancelled(pipe, cancel, progress=lambda stage, done, total: cancel.set() if stage == "denoise" else None)
    assert not pipe.stages.components.loaded
    assert np.array_equal(pipe("a red ball", **REQUEST).frames, fresh)


def test_what_is_refused(pipe: TextToVideoPipeline) -> None:
    with pytest.raises(RequestError, match=r"cancel is a bool; expected a threading\.Event"):
        pipe("a ball", cancel=True)  # type: ignore[arg-type]
