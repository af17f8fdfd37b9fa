"""The noise stream against torch's CPU generator."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor

from t2v_rt.errors import RequestError
from t2v_rt.runtime.noise import Generator, randn_for

# torch's vector path differs in its logarithm, sine and cosine, which the radius enlarges up to 5.8 times; its plain
# path rounds the angle differently too, by half a unit in the last place of 2 pi
TOLERANCE = 1e-6 if torch.backends.cpu.get_cpu_capability() in {"AVX2", "AVX512"} else 3e-6


def test_same_stream_as_torch() -> None:
    rng = np.random.default_rng(0)
    for trial in range(200):
        seed = int(rng.integers(0, 2**63)) if trial % 2 else int(rng.integers(0, 100))
        theirs, ours = torch.Generator("cpu").manual_seed(seed), Generator(seed)
        for _ in range(3):  # successive calls, so that cached values are seen
            shape = tuple(int(size) for size in rng.integers(1, 9, size=rng.integers(0, 4)))
            expected = torch.randn(shape, generator=theirs).numpy()
            found = ours.randn(shape)
            assert found.shape == expected.shape
            assert found.dtype == np.float32
            assert np.abs(found - expected).max() <= TOLERANCE


@pytest.mark.parametrize("seed", [0, -1, -(2**63), 2**32, 2**32 + 5, 2**64 - 1])
def test_seeds_of_all_ranges(seed: int) -> None:
    expected = torch.randn((2, 16, 3, 5, 7), generator=torch.Generator("cpu").manual_seed(seed)).numpy()
    assert np.abs(Generator(seed).randn((2, 16, 3, 5, 7)) - expected).max() <= TOLERANCE


@pytest.mark.parametrize("shape", [(3, 5), (3, 4, 2, 5, 7), (1, 16, 2, 3)])
@pytest.mark.parametrize("listed", [False, True])
def test_noise_of_a_batch_is_diffusers(shape: tuple[int, ...], listed: bool) -> None:
    seeds = range(7, 7 + shape[0]) if listed else [7]
    theirs = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    ours = [Generator(seed) for seed in seeds]
    for _ in range(2):  # the second call goes on in the stream
        expected = randn_tensor(shape, generator=theirs, dtype=torch.float32).numpy()
        found = randn_for(shape, ours)
        assert found.shape == shape
        assert found.dtype == np.float32
        assert np.abs(found - expected).max() <= TOLERANCE


def test_one_generator_draws_the_whole_batch_in_one_go() -> None:
    shape = (2, 3, 5)
    theirs = randn_tensor(shape, generator=torch.Generator("cpu").manual_seed(3)).numpy()
    assert np.abs(theirs - randn_for(shape, Generator(3))).max() <= TOLERANCE


def test_objects_of_torch() -> None:
    assert np.array_equal(Generator(0).randn(torch.Size([6])), Generator(0).randn(6))
    with pytest.raises(RequestError, match="expected float32, float16 or float64"):
        Generator(0).randn(4, torch.float32)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=r"torch.*Generator; expected t2v_rt.runtime.noise.Generator"):
        randn_for((3, 4), torch.Generator("cpu"))  # type: ignore[arg-type]
