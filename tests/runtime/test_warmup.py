"""Engines that are loaded and run before the first call."""

from __future__ import annotations

import pytest

from t2v_rt import RequestError, TextToVideoPipeline
from t2v_rt.engines.bundle.store import open_bundle
from t2v_rt.runtime.options import CallOptions
from t2v_rt.runtime.request import make_request
from tests.conftest import Tiny


def components(pipe: TextToVideoPipeline) -> list[object]:
    holder = pipe.stages.components
    return [holder.get(name) for name in sorted(holder.loaded)]


def test_after_a_warmup_a_call_loads_nothing(narrow: Tiny) -> None:
    with TextToVideoPipeline.from_pretrained(narrow.bundle, prompt_cache=False) as pipe:
        seconds = pipe.warmup(num_frames=9)
        assert list(seconds) == ["encode", "denoise", "decode"]
        assert min(seconds.values()) > 0
        before = components(pipe)
        assert len(before) == len(pipe.manifest.components)
        pipe("a ball", num_inference_steps=1, num_frames=9)
        assert all(left is right for left, right in zip(components(pipe), before, strict=True))


def test_a_warmup_runs_every_engine_of_a_call(narrow: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    with TextToVideoPipeline.from_pretrained(narrow.bundle, prompt_cache=False) as pipe:
        shapes: dict[str, set[tuple[int, ...]]] = {}
        for name in pipe.manifest.components:
            for engine in pipe.stages.components.get(name).engines.values():

                def watch(feeds, *rest, _run=engine._run, _name=engine.name):  # type: ignore[no-untyped-def]
                    shapes.setdefault(_name, set()).update(array.shape for array in feeds.values())
                    return _run(feeds, *rest)

                monkeypatch.setattr(engine, "_run", watch)
        pipe.warmup(height=64, width=48, num_frames=9)
        warmed, shapes = shapes, {}
        pipe("", height=64, width=48, num_frames=9, num_inference_steps=1, seed=0)
        assert {*warmed} == {*shapes}
        latents = [name for name in shapes if name.startswith(("transformer", "vae"))]
        assert len(latents) == 4
        for name in latents:
            assert max(warmed[name], key=len) == max(shapes[name], key=len)


def test_a_warmup_remembers_no_prompt_and_warms_all_sets(narrow: Tiny) -> None:
    with TextToVideoPipeline.from_pretrained(narrow.bundle, engines=2, prompt_cache=False) as pipe:
        pipe.warmup()
        assert pipe.stages._encoder is not None
        assert not pipe.stages._encoder._cache
        assert [len(one.stages.components.loaded) for one in pipe._pool.sets] == [3, 3]


def test_a_warmup_keeps_what_a_call_under_the_budget_keeps(narrow: Tiny) -> None:
    request = make_request(open_bundle(narrow.bundle).manifest, CallOptions(prompt="a ball", seed=0))
    least = TextToVideoPipeline.from_pretrained(narrow.bundle).plan(request).least_bytes
    with TextToVideoPipeline.from_pretrained(narrow.bundle, vram_budget=least, prompt_cache=False) as pipe:
        pipe.warmup()
        kept = pipe.stages.components.loaded
        pipe("a ball", num_inference_steps=1)
        assert pipe.stages.components.loaded == kept
        assert len(kept) < len(pipe.manifest.components)


def test_a_warmup_of_an_impossible_size_is_refused(pipe: TextToVideoPipeline) -> None:
    with pytest.raises(RequestError, match="height"):
        pipe.warmup(height=63)
