"""Guidance against diffusers' guiders."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ClassifierFreeGuidance, ClassifierFreeZeroStarGuidance
from diffusers.guiders.guider_utils import rescale_noise_cfg
from numpy.typing import NDArray

from t2v_rt.runtime.denoise.guidance import Guidance, rescaled
from t2v_rt.runtime.noise import Generator

TOLERANCE = 1e-6  # relative to the largest value; float32 sums in another order
SHAPE = (2, 4, 3, 6, 5)
STEPS = 25


def predictions() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Two that are alike, as those of a denoiser, with a mean and a scale of their own for each video."""
    noise: tuple[NDArray[np.float32], ...] = tuple(Generator(seed).randn(SHAPE) for seed in (0, 1))
    conditional = np.float32(0.3) + noise[0] * np.array([1.0, 2.5], np.float32).reshape(2, 1, 1, 1, 1)
    return conditional, conditional * np.float32(0.8) + np.float32(0.4) * noise[1]


def reference(guider: Any, step: int, pair: tuple[NDArray[np.float32], ...]) -> tuple[int, NDArray[np.float32]]:
    """How many predictions a guider of diffusers asks for in a step, and what it makes of them."""
    guider.set_state(step, STEPS, None)
    asked = guider.num_conditions
    return asked, guider.forward(*[torch.from_numpy(item) for item in pair[:asked]]).pred.numpy()


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.getLogger("diffusers").setLevel(logging.ERROR)  # every guider warns that guiders are experimental


def assert_equal(found: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize("rescale", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("scale", [1.5, 5.0, 12.0])
def test_guidance_with_rescale_matches(scale: float, rescale: float) -> None:
    pair = predictions()
    guider = ClassifierFreeGuidance(guidance_scale=scale, guidance_rescale=rescale)
    asked, expected = reference(guider, 3, pair)
    found = Guidance(scale, rescale)
    assert found.passes(3, STEPS) == asked == 2
    assert_equal(found.combine(pair), expected)


def test_rescale_matches_the_function_of_the_pipelines() -> None:
    conditional, guided = predictions()
    expected = rescale_noise_cfg(torch.from_numpy(guided), torch.from_numpy(conditional), 0.7).numpy()
    assert_equal(rescaled(guided, conditional, 0.7), expected)
    constant = np.zeros_like(guided)
    assert np.array_equal(rescaled(constant, conditional, 0.7), constant)  # the reference divides 0 by 0 here


@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.2, 0.8), (0.1, 0.15), (0.29, 0.58), (0.0, 0.03), (0.99, 1.0)])
def test_the_interval_takes_the_steps_that_diffusers_takes(interval: tuple[float, float]) -> None:
    pair = predictions()
    guider = ClassifierFreeGuidance(guidance_scale=5.0, start=interval[0], stop=interval[1])
    guidance = Guidance(5.0, interval=interval)
    for step in range(STEPS):
        asked, expected = reference(guider, step, pair)
        assert guidance.passes(step, STEPS) == asked
        assert_equal(guidance.combine(pair[:asked]), expected)


@pytest.mark.parametrize("rescale", [0.0, 0.5])
@pytest.mark.parametrize("zero_init_steps", [0, 1, 3])
def test_cfg_zero_star_matches(zero_init_steps: int, rescale: float) -> None:
    pair = predictions()
    guider = ClassifierFreeZeroStarGuidance(
        guidance_scale=5.0, zero_init_steps=zero_init_steps, guidance_rescale=rescale, start=0.0, stop=0.5
    )
    guidance = Guidance(5.0, rescale, (0.0, 0.5), True, zero_init_steps)
    for step in range(STEPS):
        asked, expected = reference(guider, step, pair)
        if (
            step < zero_init_steps
        ):  # the reference makes predictions and throws them away, and with rescale divides by 0
            assert guidance.passes(step, STEPS) == 0
            assert rescale or not expected.any()
            continue
        assert guidance.passes(step, STEPS) == asked
        assert_equal(guidance.combine(pair[:asked]), expected)


def test_cfg_zero_star_of_an_unconditional_prediction_of_zeros() -> None:
    conditional, _ = predictions()
    found = Guidance(5.0, cfg_zero_star=True).combine([conditional, np.zeros_like(conditional)])
    assert_equal(found, 5 * conditional)
