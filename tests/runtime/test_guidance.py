"""Guidance in the pipeline, and its two ways to the denoiser."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from t2v_rt import RequestError, TextToVideoPipeline
from t2v_rt.runtime.denoise.denoiser import one_batch_is_faster
from t2v_rt.runtime.families.wan import joined, text_context
from t2v_rt.runtime.noise import Generator
from tests.conftest import Tiny

BATCH_TOLERANCE = 1e-5  # on latents of size 1; one batch may sum in another order than two calls


def latents(pipe: TextToVideoPipeline, **settings: Any) -> Any:
    return pipe("a red ball", "lazy dog", seed=5, output_type="latent", **settings)


def test_outside_the_interval_there_is_one_prediction(pipe: TextToVideoPipeline) -> None:
    out = latents(pipe, guidance_interval=(0.25, 0.75))
    assert out.step_calls == (1, 2, 2, 1)
    assert out.settings["guidance_interval"] == [0.25, 0.75]
    whole = latents(pipe)
    assert np.array_equal(latents(pipe, guidance_interval=(0.0, 1.0)).frames, whole.frames)
    assert not np.array_equal(out.frames, whole.frames)
    none = latents(pipe, guidance_interval=(0.0, 0.1))  # less than one of four steps
    assert none.step_calls == (1,) * 4
    assert np.array_equal(none.frames, latents(pipe, guidance_scale=1.0).frames)


def test_zero_init_makes_no_prediction(pipe: TextToVideoPipeline) -> None:
    out = latents(pipe, cfg_zero_star=True)
    assert out.step_calls == (0, 2, 2, 2)
    assert out.settings["zero_init_steps"] == 1
    assert latents(pipe, cfg_zero_star=True, zero_init_steps=0).step_calls == (2,) * 4
    still = latents(pipe, cfg_zero_star=True, zero_init_steps=4)
    assert still.step_calls == (0,) * 4
    assert np.abs(still.frames - Generator(5).randn(still.frames.shape)).max() < BATCH_TOLERANCE  # no flow, no change


def test_rescale_changes_the_video(pipe: TextToVideoPipeline) -> None:
    plain = latents(pipe).frames
    assert np.array_equal(latents(pipe, guidance_rescale=0.0).frames, plain)
    assert not np.allclose(latents(pipe, guidance_rescale=0.7).frames, plain)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance_scale": True}, "guidance_scale is True"),
        ({"guidance_scale": 10**400}, "guidance_scale is 1000"),
        ({"guidance_rescale": 1.5}, "guidance_rescale is 1.5; expected a number from 0 to 1"),
        ({"guidance_rescale": float("nan")}, "guidance_rescale is nan"),
        ({"guidance_rescale": None}, "guidance_rescale is None"),
        ({"guidance_interval": (0.5, 0.5)}, "guidance_interval is"),
        ({"guidance_interval": (-0.1, 0.5)}, "guidance_interval is"),
        ({"guidance_interval": (0.0, 1.1)}, "guidance_interval is"),
        ({"guidance_interval": (0.0,)}, "guidance_interval is"),
        ({"guidance_interval": 0.5}, "guidance_interval is 0.5"),
        ({"guidance_interval": (0.0, True)}, "guidance_interval is"),
        ({"guidance_interval": (0.0, float("nan"))}, "guidance_interval is"),
        ({"cfg_zero_star": 1}, "cfg_zero_star is 1"),
        ({"cfg_zero_star": True, "zero_init_steps": -1}, "zero_init_steps is -1"),
        ({"cfg_zero_star": True, "zero_init_steps": 1.0}, "zero_init_steps is 1.0"),
        ({"zero_init_steps": 1}, "cfg_zero_star is off"),
        ({"guidance_batch": 1}, "guidance_batch is 1"),
        ({"guidance_batch": "auto"}, "guidance_batch is 'auto'"),
    ],
)
def test_what_is_refused(pipe: TextToVideoPipeline, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        pipe("a ball", **settings)


# -- one batch or two calls --------------------------------------------------------------------------------------------


def test_one_batch_and_two_calls_make_the_same_video(tiny: Tiny) -> None:
    pipe = TextToVideoPipeline.from_pretrained(tiny.bundle)
    prompts, negative = ["a red ball", "green cat"], ["the quick brown fox jumps over the lazy dog", ""]
    request: dict[str, Any] = {"seed": [3, 4], "output_type": "latent", "num_frames": 9}
    one, two = (pipe(prompts, negative, guidance_batch=mode, **request) for mode in (True, False))
    assert (one.settings["guidance_batch"], two.settings["guidance_batch"]) == (True, False)
    assert one.step_calls == two.step_calls == (2,) * 4
    assert np.abs(one.frames - two.frames).max() < BATCH_TOLERANCE


def test_prompts_of_two_lengths_in_one_batch() -> None:
    long, short = (text_context(np.ones((1, length, 3), np.float32)) for length in (5, 2))
    both = joined((long, short))
    assert both.embeds.shape == (2, 5, 3)
    assert both.bias.tolist() == [[0.0] * 5, [0.0, 0.0, -np.inf, -np.inf, -np.inf]]


def test_the_choice_is_made_by_size_and_told(pipe: TextToVideoPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    assert latents(pipe).settings["guidance_batch"] is True  # 12 tokens
    assert (
        latents(pipe, height=256, width=512, num_inference_steps=1).settings["guidance_batch"] is False
    )  # 1024 tokens
    assert latents(pipe, guidance_scale=1.0, guidance_batch=True).settings["guidance_batch"] is False
    assert pipe.stream("a ball").settings["guidance_batch"] is True
    card = SimpleNamespace(own_memory=True, memory_bytes=None, free_bytes=lambda: None)
    monkeypatch.setattr(pipe._planner, "_backend", card)
    assert latents(pipe).settings["guidance_batch"] is False
    assert not one_batch_is_faster(True, 1)


def test_two_calls_where_one_batch_does_not_fit(narrow: Tiny) -> None:
    pipe = TextToVideoPipeline.from_pretrained(narrow.bundle)
    # 484 tokens, so narrow that denoising takes more memory than decoding
    size: dict[str, Any] = {"height": 32, "width": 32, "num_frames": 481, "num_inference_steps": 1}
    assert pipe.stream("a red ball", **size).settings["guidance_batch"] is True
    pipe = TextToVideoPipeline.from_pretrained(
        narrow.bundle, vram_budget=4_000_000
    )  # the estimate is 3.1 MB for two calls, 5.9 MB for one batch
    assert pipe.stream("a red ball", **size).settings["guidance_batch"] is False
    with pytest.raises(RequestError, match="in denoise, the budget"):
        pipe.stream("a red ball", guidance_batch=True, **size)
