"""Every seam against diffusers and transformers, on random tiny checkpoints, float32 on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler as ReferenceEuler
from diffusers import UniPCMultistepScheduler as ReferenceUniPC
from numpy.typing import NDArray

from t2v_rt import TextToVideoPipeline
from t2v_rt.runtime.families import wan
from t2v_rt.runtime.frames import denormalize
from t2v_rt.runtime.schedulers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from tests.conftest import Tiny

NETWORK_TOLERANCE = 1e-4  # relative to the largest value; float32 sums in another order, measured 1e-6
CHUNK_TOLERANCE = 1e-4  # absolute, on frames in [-1, 1]; measured 1e-5
VIDEO_TOLERANCE = 0.05 / 255  # largest difference of a frame in [0, 1] after ten steps
OTHER_PROMPT = 2 / 255  # another prompt must move the frames by more, or the comparison would show nothing
PROMPTS = (
    "a red ball",
    "the quick brown fox jumps over the lazy dog " * 3,
    "一只猫 在 red 球 上",
    "  white&amp;amp;space\n\tand <b>tags</b> ",
    "",
    "blue square " * 400,
)


def relative(found: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.fixture(scope="module")
def ours(tiny: Tiny) -> TextToVideoPipeline:
    return TextToVideoPipeline.from_pretrained(tiny.bundle)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_token_ids_are_equal(tiny: Tiny, ours: TextToVideoPipeline, prompt: str) -> None:
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    expected = tiny.reference.tokenizer([prompt_clean(prompt)], max_length=512, truncation=True).input_ids[0]
    assert ours.stages.tokenizer.encode(prompt).tolist() == expected


@pytest.mark.parametrize("prompt", PROMPTS)
def test_prompt_embeddings_match(tiny: Tiny, ours: TextToVideoPipeline, prompt: str) -> None:
    with torch.no_grad():
        expected, _ = tiny.reference.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=512)
    assert relative(ours.encode_prompt([prompt]), expected.numpy()) < NETWORK_TOLERANCE


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 4, 4), (3, 4, 6), (2, 8, 2)])
def test_denoiser_call_matches(tiny: Tiny, ours: TextToVideoPipeline, frames: int, height: int, width: int) -> None:
    rng = np.random.default_rng(frames)
    model = ours.manifest.model
    latents = rng.standard_normal((2, model.latents.channels, frames, height, width)).astype(np.float32)
    timestep = np.array([999.0, 312.5], np.float32)
    embeds = np.zeros((2, 512, model.text.dim), np.float32)
    for row, length in zip(embeds, (3, 11), strict=True):  # prompts of different lengths in one batch
        row[:length] = rng.standard_normal((length, model.text.dim))
    with torch.no_grad():
        expected = tiny.reference.transformer(
            torch.from_numpy(latents), torch.from_numpy(timestep), torch.from_numpy(embeds), return_dict=False
        )[0].numpy()
    context = wan.text_context(embeds)
    found = ours.stages.components.get("transformer")["model"].infer(
        {
            "hidden_states": latents,
            "timestep": timestep,
            "encoder_hidden_states": context.embeds,
            "encoder_attention_bias": context.bias,
        }
    )["noise_pred"]
    assert context.embeds.shape[1] == 12
    assert relative(found, expected) < NETWORK_TOLERANCE


def test_each_vae_chunk_and_the_whole_decode_match(tiny: Tiny, ours: TextToVideoPipeline) -> None:
    model = ours.manifest.model
    latents = np.random.default_rng(5).standard_normal((1, model.latents.channels, 4, 6, 4)).astype(np.float32)
    vae = tiny.reference.vae
    with torch.no_grad():
        z = torch.from_numpy(denormalize(model.latents, latents))
        whole = vae.decode(z, return_dict=False)[0][0].permute(1, 2, 3, 0).numpy() / 2 + 0.5
    chunks = list(ours.decode(latents))
    assert [len(chunk) for chunk in chunks] == [1, 4, 4, 4]
    start = 0
    for chunk in chunks:
        assert np.abs(chunk - whole[start : start + len(chunk)]).max() < CHUNK_TOLERANCE / 2
        start += len(chunk)
    assert start == len(whole)


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("sampler", ["unipc", "euler"])
def test_whole_video_matches(tiny: Tiny, ours: TextToVideoPipeline, sampler: str, guidance: float) -> None:
    reference = tiny.reference
    saved = ours.scheduler, reference.scheduler
    if sampler == "euler":
        ours.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        reference.scheduler = ReferenceEuler(shift=3.0)
    else:
        ours.scheduler = UniPCMultistepScheduler.from_config(ours.scheduler.config, flow_shift=3.0)
        reference.scheduler = ReferenceUniPC.from_config(reference.scheduler.config, flow_shift=3.0)
    size: dict[str, Any] = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 10}
    try:
        found = ours("a red ball jumps", "lazy dog", guidance_scale=guidance, seed=7, **size).frames
        other = ours("blue square over a cat", "lazy dog", guidance_scale=guidance, seed=7, **size).frames
        expected = reference(
            "a red ball jumps",
            "lazy dog",
            guidance_scale=guidance,
            generator=torch.Generator("cpu").manual_seed(7),
            output_type="np",
            **size,
        ).frames
    finally:
        ours.scheduler, reference.scheduler = saved
    assert found.shape == expected.shape
    assert np.abs(found - other).max() > OTHER_PROMPT
    assert np.abs(found - expected).max() < VIDEO_TOLERANCE


def test_a_batch_is_the_videos_one_by_one_with_a_seed_each(ours: TextToVideoPipeline) -> None:
    both = ours(["a red ball", "green cat"], seed=[3, 4]).frames
    alone = [ours(prompt, seed=seed).frames[0] for prompt, seed in (("a red ball", 3), ("green cat", 4))]
    assert np.abs(both - np.stack(alone)).max() < VIDEO_TOLERANCE
