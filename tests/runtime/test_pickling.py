"""Pickled and copied pipelines: they open their bundle again."""

from __future__ import annotations

import copy
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from t2v_rt import BundleError, TextToVideoPipeline, build_engines
from t2v_rt.runtime.schedulers import FlowMatchEulerDiscreteScheduler
from tests.support.demo_bundle import build_demo, other_checkpoint

CHILD = (
    "import pickle, sys; pickle.load(sys.stdin.buffer)('a', seed=1, num_inference_steps=1, num_frames=1); print('made')"
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_demo(tmp_path_factory.mktemp("pickling"))


def pickled(pipe: TextToVideoPipeline) -> TextToVideoPipeline:
    return pickle.loads(pickle.dumps(pipe))  # type: ignore[no-any-return]


def make(pipe: TextToVideoPipeline) -> np.ndarray:
    return np.asarray(pipe("a red ball", seed=7, num_inference_steps=2, num_frames=5).frames)


@pytest.mark.parametrize("again", [pickled, copy.deepcopy])
def test_a_pipeline_comes_back_with_its_options_and_its_scheduler_and_makes_the_same_video(
    bundle: Path, again: Callable[[TextToVideoPipeline], TextToVideoPipeline]
) -> None:
    pipe = TextToVideoPipeline.from_pretrained(
        bundle, vram_budget="900MB", threads=1, vae_tiles="1x2", prompt_cache=False
    )
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, shift=2.5)
    expected = make(pipe)
    other = again(pipe)
    assert other.stages is not pipe.stages
    assert other.bundle == pipe.bundle
    assert other.vram_budget == pipe.vram_budget == 900_000_000
    assert other.backend == pipe.backend  # provider and threads
    assert repr(other.scheduler) == repr(pipe.scheduler)
    assert other.scheduler is not pipe.scheduler
    assert np.array_equal(make(other), expected)


def test_a_pickle_holds_no_engines(bundle: Path) -> None:
    pipe = TextToVideoPipeline.from_pretrained(bundle)
    make(pipe)
    assert len(pickle.dumps(pipe)) < 10_000


def test_another_process_can_take_one(bundle: Path) -> None:
    content = pickle.dumps(TextToVideoPipeline.from_pretrained(bundle))
    done = subprocess.run([sys.executable, "-c", CHILD], input=content, capture_output=True, check=True)
    assert done.stdout.strip() == b"made"


def test_a_bundle_that_was_replaced_in_between_is_refused(bundle: Path, tmp_path: Path) -> None:
    place = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    content = pickle.dumps(TextToVideoPipeline.from_pretrained(place))
    build_engines(other_checkpoint(tmp_path / "other"), place, force=True)
    with pytest.raises(BundleError, match=r"is bundle \w+ now, and was \w+; it was replaced"):
        pickle.loads(content)
    shutil.rmtree(place)
    with pytest.raises(BundleError, match=r"no bundle\.json there"):
        pickle.loads(content)


def test_a_shallow_copy_shares_the_engines_and_has_a_scheduler_of_its_own(bundle: Path) -> None:
    pipe = TextToVideoPipeline.from_pretrained(bundle)
    expected, twin = make(pipe), copy.copy(pipe)
    assert twin.stages is pipe.stages
    twin.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, shift=9.0)
    assert not np.array_equal(make(twin), expected)
    assert np.array_equal(make(pipe), expected)
