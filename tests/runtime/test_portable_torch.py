"""The reference's functions: exactly rounded on every processor, so that the comparison with it is the same on each."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests.support.portable_torch import portable_torch

VALUES = np.random.default_rng(0).uniform(1e-3, 10, 10_000).astype(np.float32)
Function = Callable[[torch.Tensor], torch.Tensor]


@pytest.mark.parametrize(
    ("function", "exact"),
    [
        (torch.sqrt, np.sqrt),
        (torch.Tensor.sqrt, np.sqrt),
        (lambda x: x**0.5, np.sqrt),
        (lambda x: torch.pow(x, 0.5), np.sqrt),
        (torch.exp, np.exp),
        (torch.expm1, np.expm1),
        (torch.log, np.log),
        (lambda x: x**2, np.square),
    ],
)
def test_functions_are_rounded_exactly(function: Function, exact: np.ufunc) -> None:
    with portable_torch():
        found = function(torch.from_numpy(VALUES))
    assert found.dtype == torch.float32
    assert np.array_equal(found.numpy(), exact(VALUES.astype(np.float64)).astype(np.float32))


def test_systems_of_equations_are_solved_as_numpy_solves_them() -> None:
    rng = np.random.default_rng(0)
    for size in (2, 3):
        a, b = rng.standard_normal((size, size)).astype(np.float32), rng.standard_normal(size).astype(np.float32)
        with portable_torch():
            found = torch.linalg.solve(torch.from_numpy(a), torch.from_numpy(b))
        assert np.array_equal(found.numpy(), np.linalg.solve(a, b))


def test_float64_is_left_alone() -> None:
    with portable_torch():
        assert torch.exp(torch.ones(1, dtype=torch.float64)).item() == np.exp(1.0)


def test_evenly_spaced_values_are_those_of_vector_code() -> None:
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("torch runs its scalar code here")
    for start, stop, count in [(0.0001, 0.02, 1000), (-6, 6, 800), (0.00085**0.5, 0.012**0.5, 37), (1, 2, 1)]:
        with portable_torch():
            found = torch.linspace(start, stop, count, dtype=torch.float32)
        assert torch.equal(found, torch.linspace(start, stop, count))
