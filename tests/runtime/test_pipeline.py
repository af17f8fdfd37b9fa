"""The pipeline's call: what goes in, what comes out, what a caller can steer."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from t2v_rt import EngineError, RequestError, TextToVideoPipeline
from t2v_rt.runtime.noise import Generator
from t2v_rt.runtime.schedulers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, get_scheduler
from tests.conftest import Tiny

BATCH_TOLERANCE = 1e-5  # a batch sums in another order than the videos one by one


def test_defaults_come_from_the_bundle(pipe: TextToVideoPipeline) -> None:
    out = pipe("a red ball", seed=1)
    assert out.frames.shape == (1, 5, 32, 48, 3)
    assert out.frames.dtype == np.float32
    assert 0.0 <= out.frames.min() < out.frames.max() <= 1.0
    assert out.seed == 1
    assert out.step_calls == (2,) * 4
    assert set(out.stage_seconds) == {"encode", "denoise", "decode"}
    assert out.peak_rss_bytes > 0
    assert out.settings["prompt"] == "a red ball"


def test_a_drawn_seed_makes_the_same_video_again(pipe: TextToVideoPipeline) -> None:
    first = pipe("a red ball")
    assert np.array_equal(pipe("a red ball", seed=first.seed).frames, first.frames)
    assert not np.array_equal(pipe("a red ball").frames, first.frames)


def test_seed_generator_and_latents_are_three_ways_to_say_the_same(pipe: TextToVideoPipeline) -> None:
    expected = pipe("a red ball", seed=9).frames
    assert np.array_equal(pipe("a red ball", generator=Generator(9)).frames, expected)
    noise = Generator(9).randn((1, 4, 2, 4, 6))
    kept = noise.copy()
    assert np.array_equal(pipe("a red ball", latents=noise).frames, expected)
    assert np.array_equal(noise, kept)


def test_embeddings_stand_for_prompts(pipe: TextToVideoPipeline) -> None:
    expected = pipe("a red ball", "lazy dog", seed=2).frames
    embeds, negative = pipe.encode_prompt(["a red ball"]), pipe.encode_prompt(["lazy dog"])
    assert embeds.shape == (1, 512, 24)
    found = pipe(prompt_embeds=embeds, negative_prompt_embeds=negative, seed=2).frames
    assert np.array_equal(found, expected)
    short = pipe(prompt_embeds=embeds[:, :4], seed=2).frames  # as many positions as the caller wants
    assert short.shape == expected.shape


def test_no_second_denoiser_call_without_guidance(pipe: TextToVideoPipeline) -> None:
    assert pipe("a red ball", guidance_scale=1.0, seed=1).step_calls == (1,) * 4


def test_output_types(pipe: TextToVideoPipeline) -> None:
    floats = pipe("a ball", seed=1).frames
    levels = pipe("a ball", seed=1, output_type="uint8").frames
    assert levels.dtype == np.uint8
    assert np.array_equal(levels, np.rint(floats * 255).astype(np.uint8))
    images = pipe("a ball", seed=1, output_type="pil").frames
    assert np.array_equal(np.asarray(images[0][3]), levels[0, 3])
    latents = pipe("a ball", seed=1, output_type="latent").frames
    assert latents.shape == (1, 4, 2, 4, 6)
    assert np.array_equal(np.concatenate(list(pipe.decode(latents))), floats[0])


SAMPLERS = ("unipc", "euler", "dpm++", "lcm", "dpm++-sde")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_each_video_of_a_batch_is_the_one_it_would_be_alone(pipe: TextToVideoPipeline, sampler: str) -> None:
    prompts, negatives, seeds = ["a red ball", "green cat runs over the dog"], ["lazy", "blue"], [3, 2**40 + 4, -5, 6]
    saved = pipe.scheduler
    pipe.scheduler = get_scheduler(sampler, saved.config)
    try:
        batch = pipe(prompts, negatives, num_videos_per_prompt=2, seed=seeds, output_type="latent")
        drawn = pipe(prompts, negatives, num_videos_per_prompt=2, generator=list(map(Generator, seeds)))
        for i, seed in enumerate(seeds):
            alone = pipe(prompts[i // 2], negatives[i // 2], seed=seed, output_type="latent").frames[0]
            assert np.abs(batch.frames[i] - alone).max() < BATCH_TOLERANCE
            assert np.abs(drawn.frames[i] - next(iter(_decoded(pipe, alone)))).max() < BATCH_TOLERANCE
    finally:
        pipe.scheduler = saved
    assert batch.seed == seeds
    assert drawn.seed is None


def _decoded(pipe: TextToVideoPipeline, latents: Any) -> Iterator[Any]:
    yield np.concatenate(list(pipe.decode(latents[None])))


def test_one_seed_draws_all_videos_in_one_go(pipe: TextToVideoPipeline) -> None:
    noise = Generator(7).randn((2, 4, 2, 4, 6))
    both = pipe("a ball", num_videos_per_prompt=2, seed=7).frames
    assert np.array_equal(both, pipe("a ball", num_videos_per_prompt=2, latents=noise).frames)


def test_streamed_frames_are_the_whole_video(pipe: TextToVideoPipeline) -> None:
    expected = pipe("a ball", seed=1, num_frames=9).frames[0]
    assert np.array_equal(np.stack(list(pipe.stream("a ball", seed=1, num_frames=9))), expected)


def test_the_first_frame_arrives_before_the_second_latent_frame_is_decoded(pipe: TextToVideoPipeline) -> None:
    seen: list[tuple[str, int]] = []
    stream = pipe.stream("a ball", seed=1, num_frames=9, progress=lambda stage, done, total: seen.append((stage, done)))
    next(stream)
    assert [done for stage, done in seen if stage == "decode"] == [1]
    stream.close()


def test_a_step_callback_sees_and_replaces_tensors(pipe: TextToVideoPipeline) -> None:
    seen: list[tuple[int, float, tuple[int, ...]]] = []

    def watch(owner: TextToVideoPipeline, step: int, t: float, tensors: dict[str, Any]) -> dict[str, Any]:
        assert owner is pipe
        seen.append((step, float(t), tensors["latents"].shape))
        return {"latents": np.zeros_like(tensors["latents"])}

    out = pipe("a ball", seed=1, output_type="latent", callback_on_step_end=watch)
    assert [step for step, _, _ in seen] == [0, 1, 2, 3]
    assert [t for _, t, _ in seen] == sorted((t for _, t, _ in seen), reverse=True)
    assert not out.frames.any()
    with pytest.raises(RequestError, match="step callback returned 'latents'"):
        pipe("a ball", callback_on_step_end=lambda *_: {"latents": np.zeros(3)})
    with pytest.raises(RequestError, match="callback tensors"):
        pipe("a ball", callback_on_step_end=watch, callback_on_step_end_tensor_inputs=["noise"])


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ({"latents": np.full((1, 4, 2, 4, 6), np.nan)}, "left 'latents' with values that are not finite"),
        ({"latents": np.full((1, 4, 2, 4, 6), 1e300)}, "left 'latents' with values that are not finite"),
        ({"latents": np.full((1, 4, 2, 4, 6), "x")}, "returned 'latents' of shape"),
        ({"latents": None}, "returned 'latents' of shape"),
        ({"noise": np.zeros(3)}, "returned 'noise' of shape"),
        (np.zeros((1, 4, 2, 4, 6)), "returned a ndarray; expected a dict"),
    ],
)
def test_what_a_step_callback_may_not_return(pipe: TextToVideoPipeline, returned: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        pipe("a ball", callback_on_step_end=lambda *_: returned)


def test_latents_that_a_step_callback_spoils_in_place(pipe: TextToVideoPipeline) -> None:
    with pytest.raises(RequestError, match="left 'latents' with values that are not finite"):
        pipe("a ball", callback_on_step_end=lambda owner, step, t, tensors: tensors["latents"].fill(np.inf))


def test_a_schedule_of_ones_own(pipe: TextToVideoPipeline) -> None:
    seen: list[float] = []

    def watch(owner: TextToVideoPipeline, step: int, t: float, tensors: dict[str, Any]) -> None:
        seen.append(float(t))

    saved = pipe.scheduler
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    try:
        request: dict[str, Any] = {"prompt": "a ball", "seed": 1, "callback_on_step_end": watch}
        out = pipe(timesteps=[1000, 750.5, 500, 250], **request)
        assert seen == [1000, 750.5, 500, 250]
        assert out.step_calls == (2,) * 4
        assert out.settings["timesteps"] == [1000.0, 750.5, 500.0, 250.0]
        assert out.settings["num_inference_steps"] == 4
        levels: Any = np.array([1.0, 0.7505, 0.5, 0.25])  # arrays are taken as well, though lists are what is asked for
        same = pipe(sigmas=levels, **request)
        assert same.settings["sigmas"] == [1.0, 0.7505, 0.5, 0.25]
        assert np.abs(same.frames - out.frames).max() < BATCH_TOLERANCE
        stream = pipe.stream("a ball", timesteps=(900, 10))
        assert stream.request.num_inference_steps == 2
        with pytest.raises(RequestError, match="timesteps"):
            pipe.stream("a ball", timesteps=[10, 900])  # refused before anything is made
    finally:
        pipe.scheduler = saved
    with pytest.raises(RequestError, match="UniPCMultistepScheduler"):
        pipe.stream("a ball", timesteps=[900, 10])


def test_prompts_are_encoded_once(narrow: Tiny) -> None:
    pipe = TextToVideoPipeline.from_pretrained(narrow.bundle, prompt_cache=False)  # which other tests fill as well
    pipe("a ball", "lazy", seed=1)
    pipe.stages.components.release("text_encoder")
    pipe("a ball", "lazy", seed=2)
    assert "text_encoder" not in pipe.stages.components.loaded
    pipe("a cat", "lazy", seed=2)
    assert "text_encoder" in pipe.stages.components.loaded


def test_a_small_budget_releases_each_stage(narrow: Tiny) -> None:
    unlimited = TextToVideoPipeline.from_pretrained(narrow.bundle, prompt_cache=False)
    expected = unlimited("a ball", seed=1).frames
    assert set(unlimited.stages.components.loaded) == set(unlimited.manifest.components)
    plan = unlimited.plan(unlimited.stream("a ball", seed=1).request)
    assert plan.resident
    largest = max(stage.total_bytes for stage in plan.stages)
    assert largest < plan.peak_bytes
    tight = TextToVideoPipeline.from_pretrained(narrow.bundle, prompt_cache=False, vram_budget=largest)
    assert np.array_equal(tight("a ball", seed=1).frames, expected)
    assert tight.stages.components.loaded == ("vae_decoder",)  # whose own stage is the largest
    roomy = TextToVideoPipeline.from_pretrained(narrow.bundle, prompt_cache=False, vram_budget=plan.peak_bytes)
    assert np.array_equal(roomy("a ball", seed=1).frames, expected)
    assert set(roomy.stages.components.loaded) == set(unlimited.manifest.components)


def test_threads_do_not_mix(pipe: TextToVideoPipeline) -> None:
    expected = {seed: pipe("a ball", seed=seed).frames for seed in range(4)}
    found: dict[int, Any] = {}

    def work(seed: int) -> None:
        found[seed] = pipe("a ball", seed=seed).frames

    threads = [threading.Thread(target=work, args=(seed,)) for seed in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(found[seed], expected[seed]) for seed in expected)


def test_a_call_leaves_the_pipeline_as_it_was(pipe: TextToVideoPipeline) -> None:
    saved = pipe.scheduler
    pipe.scheduler = UniPCMultistepScheduler.from_config(saved.config, flow_shift=8.0)
    shifted = pipe("a ball", seed=1).frames
    assert pipe.scheduler.num_inference_steps is None
    pipe.scheduler = saved
    assert not np.array_equal(pipe("a ball", seed=1).frames, shifted)


def test_closing_and_calling_again(narrow: Tiny) -> None:
    with TextToVideoPipeline.from_pretrained(narrow.bundle) as pipe:
        expected = pipe("a ball", seed=1).frames
        engine = pipe.stages.components.get("transformer")["model"]
    with pytest.raises(EngineError, match="closed"):
        engine.infer({spec.name: _zeros(spec) for spec in engine.inputs})
    assert np.array_equal(pipe("a ball", seed=1).frames, expected)


def _zeros(spec: Any) -> Any:
    sizes = {"batch": 1, "frames": 1, "height": 2, "width": 2, "text": 1}
    return np.zeros(spec.resolve(sizes), spec.numpy_dtype)


def test_a_long_prompt_is_cut_with_a_warning(pipe: TextToVideoPipeline, caplog: pytest.LogCaptureFixture) -> None:
    assert len(pipe.stages.tokenizer.encode("red " * 600)) == 512
    assert "only the first 512" in caplog.text
    caplog.clear()
    assert len(pipe.stages.tokenizer.encode("red " * 511)) == 512
    assert not caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "neither prompt nor prompt_embeds"),
        ({"prompt": "a", "prompt_embeds": np.zeros((1, 4, 24), np.float32)}, "both prompt and prompt_embeds"),
        ({"prompt": 3}, "prompt is 3"),
        ({"prompt": []}, "prompt is"),
        ({"prompt": ["a", "b"], "negative_prompt": ["c", "d", "e"]}, "3 of negative_prompt"),
        ({"prompt": "a", "num_frames": 80}, "77 or 81"),
        ({"prompt": "a", "height": 500}, "496 or 512"),
        ({"prompt": "a", "width": 7}, "nearest valid value is 16"),
        ({"prompt": "a", "num_frames": 0}, "num_frames is 0"),
        ({"prompt": "a", "guidance_scale": float("inf")}, "guidance_scale"),
        ({"prompt": "a", "guidance_scale": "5"}, "guidance_scale"),
        ({"prompt": "a", "output_type": "gif"}, "output_type"),
        ({"prompt": "a", "seed": [1, 2]}, "2 seeds"),
        ({"prompt": "a", "generator": "x"}, "generator is of type str"),
        ({"prompt": "a", "latents": np.full((1, 4, 2, 4, 6), np.nan, np.float32)}, "not finite"),
        ({"prompt": "a", "latents": np.full((1, 4, 2, 4, 6), 1e300)}, "not finite"),
        ({"prompt": "a", "latents": np.zeros((1, 5, 2, 4, 6), np.float32)}, "channels"),
        ({"prompt": "a", "latents": np.zeros((4, 6), np.float32)}, "5 dimensions"),
        ({"prompt": "a", "latents": np.zeros((1, 4, 2, 4, 6), np.float32), "height": 64}, "another size"),
        ({"prompt_embeds": np.zeros((1, 4, 25), np.float32)}, "prompt_embeds has shape"),
        ({"prompt": "a", "num_videos_per_prompt": 0}, "num_videos_per_prompt"),
        ({"prompt": "a", "timesteps": [900, 10], "sigmas": [0.9, 0.1]}, "timesteps and sigmas were both given"),
        ({"prompt": "a", "timesteps": [900, 10], "num_inference_steps": 2}, "2 timesteps and num_inference_steps 2"),
        ({"prompt": "a", "sigmas": [0.9], "num_inference_steps": 5}, "1 sigmas and num_inference_steps 5"),
        ({"prompt": "a", "timesteps": []}, r"timesteps is \[\]; expected a list of numbers"),
        ({"prompt": "a", "timesteps": "900"}, "timesteps is '900'"),
        ({"prompt": "a", "timesteps": 900}, "timesteps is 900"),
        ({"prompt": "a", "timesteps": [900, True]}, "timesteps is"),
        ({"prompt": "a", "sigmas": [1.0, float("nan")]}, "sigmas is"),
    ],
)
def test_what_a_call_refuses(pipe: TextToVideoPipeline, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        pipe(**settings)


def test_what_a_stream_refuses(pipe: TextToVideoPipeline) -> None:
    for settings in ({"prompt": ["a", "b"]}, {"prompt": "a", "output_type": "pil"}):
        with pytest.raises(RequestError, match="stream makes one video"):
            pipe.stream(**settings)
