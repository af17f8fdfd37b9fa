"""The emulated kernel: exact where it adds up in float32, and off where the real one is known to be."""

from __future__ import annotations

import math

import numpy as np
import pytest

from t2v_rt.benchmarks.attention_sums import ACCUMULATORS, KEYS, SETTINGS, attention, error, exact_attention, operands
from t2v_rt.runtime.self_test import TOLERANCES

NAMED = {setting.name: setting for setting in SETTINGS}
ROUNDED = 5e-3  # of half operands and results, relative to the largest result; most where one key gets all weight
FEW = 4  # queries


@pytest.mark.parametrize("name", ["equal values", "flat head, values about 2", "sharp head, values about 0.5"])
def test_sums_in_float32_are_right(name: str) -> None:
    assert error(NAMED[name], 4_100, "float32", FEW) < ROUNDED  # keys that fill no whole number of blocks


def test_sums_in_half_are_as_wrong_as_they_are_known_to_be() -> None:
    assert error(NAMED["flat head, values about 2"], KEYS[1], "half", FEW) == math.inf
    assert error(NAMED["flat head, values about 2"], KEYS[0], "half centred", FEW) < ROUNDED
    assert error(NAMED["equal values"], 64, "half", FEW) < ROUNDED  # few keys are no trouble


def test_a_wrong_sum_is_beyond_what_a_self_test_allows_and_a_right_one_is_not() -> None:
    equal = NAMED["equal values"]
    assert error(equal, KEYS[0], "half", FEW) > TOLERANCES["fp16"]
    assert error(equal, KEYS[0], "float32", FEW) < TOLERANCES["fp16"]


def test_it_takes_the_place_of_an_attention_of_many_heads() -> None:
    rng = np.random.default_rng(1)
    query, key, value = (rng.standard_normal((2, 3, rows, 16)).astype(np.float32) for rows in (5, 130, 130))
    expected = exact_attention(query, key, value)
    for name in ACCUMULATORS:
        found = attention(query, key, value, accumulator=name)
        assert found.shape == (2, 3, 5, 16)
        assert found.dtype == np.float32
        assert np.abs(found - expected).max() < 2e-2 * np.abs(expected).max()
    scaled = attention(query * 2, key, value, scale=0.5 / 16**0.5)
    assert np.allclose(scaled, expected, atol=ROUNDED)


def test_operands_are_as_spread_as_they_say() -> None:
    for setting in SETTINGS:
        query, key, value = operands(setting, 4096)
        scores = query @ key.T / math.sqrt(query.shape[-1])
        assert scores.std(axis=1).mean() == pytest.approx(setting.spread, rel=0.15)
        assert abs(scores.mean()) == pytest.approx(setting.offset, abs=0.2 * setting.spread + 0.1 * setting.offset)
        assert np.abs(value.mean(axis=0)).mean() == pytest.approx(setting.mean, abs=0.02 * setting.deviation)
