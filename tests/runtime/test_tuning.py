"""Settings of engines that were found to be the quickest on a machine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from t2v_rt import BackendError, TextToVideoPipeline
from t2v_rt.engines.backends import get_backend
from t2v_rt.engines.bundle.store import open_bundle
from t2v_rt.engines.onnxruntime.backend import OnnxRuntimeBackend
from t2v_rt.runtime.tuning import EngineSettings, candidates, check_tunable, choose, kept
from t2v_rt.system.user_cache import UserCache
from tests.conftest import Tiny


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.parametrize("fastest", candidates())
def test_the_fastest_settings_are_kept(narrow: Tiny, fastest: EngineSettings) -> None:
    bundle, backend = open_bundle(narrow.bundle), get_backend("onnxruntime")
    assert kept(bundle, backend) is None
    assert choose(bundle, backend, lambda settings: 1.0 if settings == fastest else 2.0) == fastest
    assert kept(bundle, backend) == fastest
    found = TextToVideoPipeline.from_pretrained(narrow.bundle, tuned=True).backend
    assert isinstance(found, OnnxRuntimeBackend)
    assert found == fastest.applied(backend)
    assert found.spinning is fastest.spinning
    assert fastest.threads in (None, found.threads)


def test_less_than_noise_changes_nothing(narrow: Tiny) -> None:
    bundle, backend = open_bundle(narrow.bundle), get_backend("onnxruntime")
    assert choose(bundle, backend, lambda settings: 0.98 + 0.02 * (settings == EngineSettings())) == EngineSettings()
    assert kept(bundle, backend) == EngineSettings()


def test_all_settings_give_the_same_bytes(narrow: Tiny) -> None:
    frames = []
    for settings in candidates():
        backend = settings.applied(get_backend("onnxruntime"))
        with TextToVideoPipeline(open_bundle(narrow.bundle), backend) as pipe:
            frames.append(pipe("a ball", seed=7, num_inference_steps=2).frames)
    assert all(np.array_equal(other, frames[0]) for other in frames)


def test_a_pipeline_is_tuned_and_stays_as_it_is(narrow: Tiny) -> None:
    with TextToVideoPipeline.from_pretrained(narrow.bundle) as pipe:
        before = pipe.backend
        chosen = pipe.tune(height=32, width=32, num_frames=5)
        assert chosen in candidates()
        assert pipe.backend is before
        assert not pipe.stages.components.loaded
        assert kept(pipe.bundle, pipe.backend) == chosen


def test_a_bundle_that_was_not_tuned_is_told_of(narrow: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    pipe = TextToVideoPipeline.from_pretrained(narrow.bundle, tuned=True)
    assert "was not tuned on this machine" in caplog.text
    assert pipe.backend == get_backend("onnxruntime")


@pytest.mark.parametrize("content", [b"", b"[]", b'{"threads": "many", "spinning": true}'])
def test_an_entry_that_cannot_be_read_counts_as_none(narrow: Tiny, content: bytes) -> None:
    bundle, backend = open_bundle(narrow.bundle), get_backend("onnxruntime")
    choose(bundle, backend, lambda _: 1.0)
    folder = UserCache("tuning").folder
    assert folder is not None
    (entry,) = folder.iterdir()
    entry.write_bytes(content)
    assert kept(bundle, backend) is None


def test_what_cannot_be_tuned_is_refused(narrow: Tiny) -> None:
    with pytest.raises(BackendError, match="run on a GPU here and have no threads to tune"):
        check_tunable("tensorrt-rtx")
    with pytest.raises(BackendError, match="threads 1 and tuned were both given"):
        TextToVideoPipeline.from_pretrained(narrow.bundle, threads=1, tuned=True)
