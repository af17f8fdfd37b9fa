"""The noise stream: the same bytes everywhere, and what it takes."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from t2v_rt.benchmarks.noise import Draws, hash_here, hash_in_child, pairs_to_compare
from t2v_rt.errors import RequestError
from t2v_rt.runtime.noise import Generator, randn_for

KNOWN_SHA256 = "2e315c3750d77dc0a5a2384697edf5f5466bfca7db5272087f07be87ea01ef55"


def test_seeding_again_starts_over_and_drops_the_cached_value() -> None:
    generator = Generator(5)
    first = generator.randn(3)
    assert np.array_equal(generator.manual_seed(5).randn(3), first)


def test_the_bytes_are_the_same_on_every_machine() -> None:
    noise = Generator(1234).randn((1, 16, 5, 30, 52))
    assert hashlib.sha256(noise.tobytes()).hexdigest() == KNOWN_SHA256


def test_other_dtypes_are_casts() -> None:
    assert np.array_equal(Generator(1).randn(20, np.float16), Generator(1).randn(20).astype(np.float16))


@pytest.mark.parametrize("seed", [1.5, "3", None, True, 2**64, -(2**63) - 1])
def test_bad_seeds(seed: object) -> None:
    with pytest.raises(RequestError, match="seed is"):
        Generator(seed)  # type: ignore[arg-type]


NO_INTEGERS = "expected an integer or a sequence of integers"


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2.5,), NO_INTEGERS),
        (2.0, NO_INTEGERS),
        (True, NO_INTEGERS),
        ((True, 2), NO_INTEGERS),
        ("3", NO_INTEGERS),
        ("", NO_INTEGERS),
        (b"ab", NO_INTEGERS),
        (None, NO_INTEGERS),
        ({3}, NO_INTEGERS),
        ([[2, 3]], NO_INTEGERS),
        (np.array([2.0, 3.0]), NO_INTEGERS),
        (-1, "negative"),
        ((2, -1), "negative"),
        ((2**20, 2**20, 2), "at most 2\\*\\*40 values"),
        ((0, 2**70), "at most 2\\*\\*40 values"),
        ([1] * 65, "65 dimensions; expected at most 64"),
    ],
)
def test_bad_shapes(shape: Any, message: str) -> None:
    generator = Generator(0)
    with pytest.raises(RequestError, match=message):
        generator.randn(shape)
    with pytest.raises(RequestError, match=message):
        randn_for(shape, generator)
    assert np.array_equal(generator.randn(20), Generator(0).randn(20))  # nothing was drawn


@pytest.mark.parametrize("shape", [np.int64(6), np.array([2, 3]), [np.uint8(2), 3], (), [], 0, (0, 3)])
def test_shapes_of_all_kinds(shape: Any) -> None:
    expected = np.empty(shape).shape
    found = Generator(0).randn(shape)
    assert found.shape == expected
    assert np.array_equal(found, Generator(0).randn(int(np.prod(expected))).reshape(expected))


@pytest.mark.parametrize("dtype", [np.int32, "foo", "(2", None, object(), "f4,f4", ">f4", complex])
def test_bad_dtypes(dtype: Any) -> None:
    with pytest.raises(RequestError, match="expected float32, float16 or float64"):
        Generator(0).randn(4, dtype)


def test_one_generator_draws_the_whole_batch_in_one_go() -> None:
    shape = (2, 3, 5)
    expected = Generator(3).randn(shape)
    assert np.array_equal(randn_for(shape, Generator(3)), expected)
    assert np.array_equal(randn_for(shape, (Generator(3),)), expected)


@pytest.mark.parametrize(
    ("generators", "message"),
    [
        (None, "give a seed or a generator"),
        ([], "0 generators were given for 3 videos; give one, or one for each"),
        ([Generator(0), Generator(1)], "2 generators were given for 3 videos"),
        ([Generator(0), None, Generator(1)], "NoneType; expected t2v_rt.runtime.noise.Generator"),
        (7, "type int; expected"),
        ("abc", "type str; expected"),
    ],
)
def test_bad_generators(generators: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        randn_for((3, 4), generators)


def test_a_shape_without_videos_takes_one_generator_only() -> None:
    assert randn_for((), Generator(0)).shape == ()
    with pytest.raises(RequestError, match="2 generators"):
        randn_for((), [Generator(0), Generator(1)])
    with pytest.raises(RequestError, match="2 generators were given for 0 videos"):
        randn_for((0, 3), [Generator(0), Generator(1)])


CHILD_DRAWS: Draws = [(0, [[16384 + 35], [3], [2], [16]]), (2**32 + 1, [[5], [40000], [1]])]


def levels_of_numpy() -> Sequence[str]:
    levels: Sequence[str] = hash_in_child(sys.executable, CHILD_DRAWS)["simd"]
    if not levels:
        pytest.skip("this NumPy uses no instructions above its baseline on this CPU, so there are none to leave out")
    return levels


def test_the_bytes_without_numpys_vector_instructions() -> None:
    found = hash_in_child(sys.executable, CHILD_DRAWS, off=levels_of_numpy(), threads=2)
    assert found["simd"] == []
    assert found["sha256"] == hash_here(CHILD_DRAWS)


def test_a_level_that_stays_on_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = json.dumps({"numpy": "2.0.0", "simd": ["AVX2", "AVX512F"]})
    monkeypatch.setattr("t2v_rt.benchmarks.noise.run_child", lambda command, settings: answer)
    with pytest.raises(RuntimeError, match=r"NumPy 2.0.0 of python3 still uses \['AVX512F'\]"):
        hash_in_child("python3", CHILD_DRAWS, off=["AVX512F", "AVX512_SKX"])


def test_a_child_that_fails_is_noticed() -> None:
    with pytest.raises(RuntimeError, match="a shape that is none"):
        hash_in_child(sys.executable, [(0, ["a shape that is none"])])  # type: ignore[list-item]


def test_the_pairs_that_are_compared_with_torch() -> None:
    draws = pairs_to_compare()
    assert sum(len(shapes) for _, shapes in draws) == 500
    sizes = [int(np.prod(shape)) for _, shapes in draws for shape in shapes]
    assert min(sizes) < 16
    assert any(size > 16 and size % 16 for size in sizes)
    assert any(seed >= 2**32 for seed, _ in draws)
    assert any(seed < 0 for seed, _ in draws)
    assert any(len(shapes) > 1 for _, shapes in draws)
