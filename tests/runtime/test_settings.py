"""What a result's settings tell is read back: the same request, and the same sampler."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from t2v_rt import RequestError, TextToVideoPipeline
from t2v_rt.runtime.noise import Generator
from t2v_rt.runtime.options import SAME, CallOptions
from t2v_rt.runtime.request import CallArrays, Request, make_request
from t2v_rt.runtime.schedulers import MODULES, fitting_schedulers, get_scheduler

CASES = 300  # drawn at random; each kind of value comes up in dozens of them
FORM = {"output_type"}  # how frames are handed over, which determines none of them
DRAWN: dict[str, Callable[[random.Random], Any]] = {
    "prompt": lambda rng: rng.choice(["a red ball", "一个红色的球", "", ["a"], ["a", "b"], ["a", "b", "c"]]),
    "negative_prompt": lambda rng: rng.choice([None, "", "dark", "模糊"]),
    "height": lambda rng: rng.choice([None, 32, 64]),
    "width": lambda rng: rng.choice([None, 48, 96]),
    "num_frames": lambda rng: rng.choice([None, 1, 9]),
    "num_inference_steps": lambda rng: rng.choice([None, 1, 7]),
    "guidance_scale": lambda rng: rng.choice([None, 0, 1, 1.5, np.float32(7.1)]),
    "num_videos_per_prompt": lambda rng: rng.choice([1, 1, 2, 3]),
    "seed": lambda rng: rng.choice([None, -1, 0, -5, 2**63, np.int16(9)]),
    "guidance_rescale": lambda rng: rng.choice([0.0, 0.7]),
    "guidance_interval": lambda rng: rng.choice([None, (0.1, 0.9), [0, 1]]),
    "cfg_zero_star": lambda rng: rng.choice([False, True]),
    "zero_init_steps": lambda rng: rng.choice([None, 0]),
    "guidance_batch": lambda rng: rng.choice([None, True, False]),
    "step_cache": lambda rng: rng.choice([None, 0, 0.05]),
    "timesteps": lambda rng: rng.choice([None, None, [900, 500.5, 1]]),
    "sigmas": lambda rng: rng.choice([None, None, (1.0, 0.5)]),
}


def draw(rng: random.Random) -> CallOptions:
    values = {name: value(rng) for name, value in DRAWN.items()}
    if values["timesteps"] is not None:
        values["sigmas"] = None
    if values["timesteps"] is not None or values["sigmas"] is not None:
        values["num_inference_steps"] = None
    if values["cfg_zero_star"] and rng.random() < 0.5:
        values["zero_init_steps"] = 3
    count = len(values["prompt"]) if isinstance(values["prompt"], list) else 1
    if values["negative_prompt"] is not None and rng.random() < 0.5:
        values["negative_prompt"] = [f"{values['negative_prompt']} {i}" for i in range(count)]
    if rng.random() < 0.3:
        values["seed"] = list(range(count * values["num_videos_per_prompt"]))
    return CallOptions(**values)


def through_json(settings: dict[str, Any]) -> dict[str, Any]:
    return dict(json.loads(json.dumps(settings)))


def test_every_option_is_drawn() -> None:
    assert {item.name for item in fields(CallOptions)} == DRAWN.keys() | FORM
    assert set(SAME) <= DRAWN.keys()


def test_settings_come_back_whatever_they_are(pipe: TextToVideoPipeline) -> None:
    rng, seen = random.Random(0), dict[str, set[str]]()
    scheduler = pipe.scheduler.settings()
    for _ in range(CASES):
        request = make_request(pipe.manifest, draw(rng))
        settings = through_json(request.settings(scheduler))
        again = Request.from_settings(pipe.manifest, settings)
        assert through_json(again.settings(scheduler)) == settings
        assert again == request
        for name, value in settings.items():
            seen.setdefault(name, set()).add(json.dumps(value))
    varied = {name for name, values in seen.items() if len(values) > 1}
    assert varied >= set(SAME) | {"num_videos_per_prompt"}


def test_the_frames_come_back(pipe: TextToVideoPipeline) -> None:
    options: dict[str, Any] = {
        "guidance_scale": 3.0,
        "cfg_zero_star": True,
        "sigmas": [1.0, 0.6, 0.2],
        "num_videos_per_prompt": 2,
    }
    saved = pipe.scheduler
    try:
        pipe.scheduler = get_scheduler("euler", saved.config, shift=3.0)
        out = pipe(["a ball", "a cat"], seed=[4, 5, 6, 7], **options)
        settings = through_json(dict(out.settings))
        pipe.scheduler = get_scheduler(settings["scheduler"]["_class_name"], settings["scheduler"])
        again = Request.from_settings(pipe.manifest, settings)
        values = {name: getattr(again, name) for name in ("height", "width", "num_frames", "sigmas")}
        star: dict[str, Any] = {"guidance_scale": again.guidance.scale, "cfg_zero_star": again.guidance.cfg_zero_star}
        second = pipe(again.prompts, seed=again.seeds, num_videos_per_prompt=2, **values, **star)
    finally:
        pipe.scheduler = saved
    assert second.settings == out.settings
    assert np.array_equal(second.frames, out.frames)


def test_arrays_must_be_the_same_again(pipe: TextToVideoPipeline) -> None:
    embeds, scheduler = pipe.encode_prompt(["a ball"]), pipe.scheduler.settings()
    latents = Generator(1).randn((1, 4, 2, 4, 6))
    for options, arrays in (
        (CallOptions(seed=1), CallArrays(prompt_embeds=embeds, negative_prompt_embeds=embeds)),
        (CallOptions(seed=1), CallArrays(prompt_embeds=embeds)),
        (CallOptions(seed=1, prompt="a"), CallArrays(negative_prompt_embeds=embeds)),
        (CallOptions(prompt="a"), CallArrays(latents=latents)),
        (CallOptions(prompt="a", seed=1), CallArrays(latents=latents)),
    ):
        settings = through_json(make_request(pipe.manifest, options, arrays).settings(scheduler))
        assert through_json(Request.from_settings(pipe.manifest, settings, arrays).settings(scheduler)) == settings
        changed = {name: array + 1 for name, array in vars(arrays).items() if array is not None}
        for other in (CallArrays(), CallArrays(**changed)):
            with pytest.raises(RequestError):
                Request.from_settings(pipe.manifest, settings, other)


def test_a_prompt_beside_negative_embeddings(pipe: TextToVideoPipeline) -> None:
    out = pipe("a ball", seed=1, negative_prompt_embeds=pipe.encode_prompt(["dark"]))
    assert out.settings["negative_prompt"] == []
    assert np.array_equal(out.frames, pipe("a ball", "dark", seed=1).frames)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda settings: settings.pop("seed"), "the settings have no seed"),
        (lambda settings: settings.pop("scheduler"), "the settings have no scheduler"),
        (lambda settings: settings.update(eta=1), "'eta', which this version does not know"),
        (lambda settings: settings.update(seed="7"), "seed is '7'"),
        (lambda settings: settings.update(seed=[]), "a generator was given"),
        (lambda settings: settings.update(height="32"), "height is '32'"),
        (lambda settings: settings.update(num_frames=8), "num_frames"),
        (lambda settings: settings.update(guidance_batch="on"), "guidance_batch is 'on'"),
        (lambda settings: settings.update(cfg_zero_star="yes"), "cfg_zero_star is 'yes'"),
        (lambda settings: settings.update(scheduler="euler"), "the scheduler 'euler'"),
        (lambda settings: settings.update(scheduler={}), "the scheduler {}"),
    ],
)
def test_settings_that_cannot_be_read_back(
    pipe: TextToVideoPipeline, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    settings = make_request(pipe.manifest, CallOptions(prompt="a", seed=1)).settings(pipe.scheduler.settings())
    change(settings)
    with pytest.raises(RequestError, match=message):
        Request.from_settings(pipe.manifest, settings)


def test_samplers_come_back_from_their_settings(pipe: TextToVideoPipeline) -> None:
    made = [get_scheduler(name, pipe.scheduler.config) for name in fitting_schedulers(pipe.scheduler.config)]
    made += [get_scheduler(name) for name in MODULES]
    assert len(made) > len(MODULES)
    for scheduler in made:
        settings = through_json(scheduler.settings())
        again = get_scheduler(settings["_class_name"], settings)
        assert through_json(again.settings()) == settings


def test_a_misspelt_option_is_refused_where_it_is_given(pipe: TextToVideoPipeline) -> None:
    calls: tuple[Callable[..., Any], ...] = (pipe.stream, pipe, pipe.generate)
    for call in calls:
        with pytest.raises(TypeError, match=r"unexpected keyword argument 'guidence_scale'") as refusal:
            call("a ball", guidence_scale=3.0)
        assert "\n" not in str(refusal.value)
        assert Path(refusal.traceback[-1].path).name == "test_settings.py"
