"""Several threads on one pipeline: with one set of engines, and with sets of their own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from t2v_rt import RequestError, TextToVideoPipeline
from t2v_rt.runtime.options import CallOptions
from t2v_rt.runtime.request import make_request
from tests.conftest import Tiny

SEEDS = range(8)


@pytest.fixture
def two(narrow: Tiny) -> TextToVideoPipeline:
    return TextToVideoPipeline.from_pretrained(narrow.bundle, threads=1, engines=2, prompt_cache=False)


def loaded(pipe: TextToVideoPipeline) -> list[tuple[str, ...]]:
    """Names of the loaded components of each set."""
    return [engines.stages.components.loaded for engines in pipe._pool.sets]


def make(pipe: TextToVideoPipeline, seed: int) -> np.ndarray:
    return np.asarray(pipe(f"a ball {seed % 3}", seed=seed, num_inference_steps=2).frames)


@pytest.mark.parametrize("sets", [1, 2])
def test_calls_of_several_threads_give_what_serial_ones_give(narrow: Tiny, sets: int) -> None:
    expected = [make(TextToVideoPipeline.from_pretrained(narrow.bundle), seed) for seed in SEEDS]
    for count in (1, 2, 4, 8):
        shared = TextToVideoPipeline.from_pretrained(narrow.bundle, engines=sets, prompt_cache=False)
        with shared, ThreadPoolExecutor(count) as threads:
            found = list(threads.map(make, [shared] * len(SEEDS), SEEDS))
        assert all(np.array_equal(*pair) for pair in zip(found, expected, strict=True))


def test_videos_at_the_same_time_have_engines_of_their_own(two: TextToVideoPipeline) -> None:
    make(two, 0)
    everything = tuple(two.manifest.components)
    assert [set(names) for names in loaded(two)] == [{*everything}, set()]  # one after another, one set is enough
    streams = [two.stream("a ball", seed=seed, num_frames=9) for seed in (0, 1, 2)]
    first = [next(stream) for stream in streams]
    assert "vae_decoder" in loaded(two)[1]
    vaes = [engines.stages.components.get("vae_decoder") for engines in two._pool.sets]
    assert vaes[0] is not vaes[1]
    rest = [np.stack([frame, *stream]) for frame, stream in zip(first, streams, strict=True)]
    for seed, video in enumerate(rest):
        assert np.array_equal(video, two("a ball", seed=seed, num_frames=9).frames[0])
    two.close()
    assert loaded(two) == [(), ()]


def test_a_prompt_is_encoded_once_for_all_sets(two: TextToVideoPipeline) -> None:
    make(two, 0)
    with two.stream("a ball 0", seed=1, num_inference_steps=2)._run._pool.taken():  # the first set is taken
        make(two, 0)
    assert "text_encoder" not in loaded(two)[1]
    assert "transformer" in loaded(two)[1]


def test_a_preview_is_made_with_the_engines_of_its_own_run(two: TextToVideoPipeline) -> None:
    def look(pipe: TextToVideoPipeline, step: int, t: float, tensors: dict[str, np.ndarray]) -> None:
        assert pipe.preview(tensors["latents"]).any()

    with two._pool.taken():
        two("a ball", seed=1, num_inference_steps=1, callback_on_step_end=look, output_type="latent", previews=True)
    assert loaded(two)[0] == ()
    assert "vae_decoder" in loaded(two)[1]


def test_a_budget_is_divided_among_the_sets(narrow: Tiny) -> None:
    pipe = TextToVideoPipeline.from_pretrained(narrow.bundle, vram_budget=100_000_000, engines=2)
    request = make_request(pipe.manifest, CallOptions(prompt="a ball", seed=0))
    assert pipe.vram_budget == 100_000_000
    assert pipe.plan(request).budget_bytes == 50_000_000
    needed = TextToVideoPipeline.from_pretrained(narrow.bundle).plan(request).least_bytes
    TextToVideoPipeline.from_pretrained(narrow.bundle, vram_budget=needed)("a ball", num_inference_steps=1)
    with pytest.raises(RequestError, match="needs about"):
        TextToVideoPipeline.from_pretrained(narrow.bundle, vram_budget=needed, engines=2)("a ball")


@pytest.mark.parametrize("count", [0, -1, 1.0, True, "2"])
def test_a_number_of_sets_is_an_integer_of_one_or_more(narrow: Tiny, count: object) -> None:
    with pytest.raises(RequestError, match="engines is"):
        TextToVideoPipeline.from_pretrained(narrow.bundle, engines=count)  # type: ignore[arg-type]
