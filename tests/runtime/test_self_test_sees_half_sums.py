"""The self-test of a denoiser over 32,760 tokens, whose attention is computed as a fused kernel adds up.

The calls, the answers and the verdict are the product's own, and so is the graph; tokens are few channels wide.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from t2v_rt.benchmarks.attention_sums import attention
from t2v_rt.benchmarks.self_test import SETTINGS, SUMS, Setting, Trial, exact, prepare
from t2v_rt.runtime import self_test
from tests.support.checkpoints import TinyWan

RIGHT = 5e-3  # half of what is allowed


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Trial:
    """A tiny network as it is initialised, whose gates are small."""
    return make(SETTINGS[0], tmp_path_factory.mktemp("trial"))


def make(setting: Setting, folder: Path) -> Trial:
    return prepare(setting, TinyWan("small", layers=4).configs(), folder)


def test_half_sums_fail(trial: Trial) -> None:
    verdict = trial.verdict("half")
    assert not verdict.passed
    assert 1.5 * verdict.tolerance < verdict.error < 0.1  # not by far: gates of random weights are small


@pytest.mark.parametrize("sums", [sums for sums in SUMS if sums != "half"])
def test_right_sums_pass(trial: Trial, sums: str) -> None:
    verdict = trial.verdict(sums)
    assert verdict.passed
    assert 0 < verdict.error < RIGHT


def test_half_sums_of_large_values_are_infinite_and_fail(tmp_path: Path) -> None:
    verdict = make(Setting("large values", values=20.0), tmp_path).verdict("half")
    assert not verdict.passed
    assert np.isinf(verdict.error)


def test_against_loud_latents_half_sums_would_not_show(tmp_path: Path) -> None:
    loud = make(Setting("loud latents", loud=True), tmp_path)
    assert loud.verdict("half").error < self_test.TOLERANCES["fp16"]


def test_the_emulation_of_one_key_is_exact() -> None:
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((2, count, 8), np.float32) for count in (3, 5, 5))
    assert np.abs(attention(query, key, value) - exact(query, key, value)).max() < 2e-3
