"""The same request gives the same bytes with any number of threads."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from t2v_rt import TextToVideoPipeline
from tests.support.demo_bundle import build_demo

PROMPTS = ["", "a", "a red ball", "a red ball bouncing on a blue background", "one two three four five six " * 8]
COUNTS = (1, 2, 3, 8)


@pytest.fixture(scope="module")
def pipes(tmp_path_factory: pytest.TempPathFactory) -> list[TextToVideoPipeline]:
    folder: Path = build_demo(tmp_path_factory.mktemp("threads"))
    return [TextToVideoPipeline.from_pretrained(folder, threads=n, prompt_cache=False) for n in COUNTS]


@pytest.mark.parametrize("prompt", PROMPTS)
def test_embeddings_do_not_depend_on_the_number_of_threads(pipes: list[TextToVideoPipeline], prompt: str) -> None:
    found = [pipe.encode_prompt([prompt]) for pipe in pipes]
    assert all(np.array_equal(other, found[0]) for other in found[1:])


@pytest.mark.slow
def test_frames_do_not_depend_on_the_number_of_threads(pipes: list[TextToVideoPipeline]) -> None:
    hashes = {
        hashlib.sha256(
            pipe("a red ball", seed=7, num_inference_steps=3, height=96, width=160, num_frames=9).frames.tobytes()
        ).hexdigest()
        for pipe in pipes
    }
    assert len(hashes) == 1
