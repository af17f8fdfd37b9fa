"""torch with functions that round alike on every processor, so that a reference computed with it is one reference.

Addition, multiplication and division are the same everywhere. Roots, exponentials and logarithms of float32 are not:
libraries choose their code by the processor, and a square root is off in its last bit for one value in five on some.
Near a signal-to-noise ratio of zero that bit moves a sigma by a thousandth.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# `x ** 0.5` is the last; squares come this way too, and are the same either way
ROUNDED = (aten.sqrt.default, aten.exp.default, aten.expm1.default, aten.log.default, aten.pow.Tensor_Scalar)
LINSPACE, SOLVE = aten.linspace.default, aten._linalg_solve_ex.default


@contextlib.contextmanager
def portable_torch() -> Iterator[None]:
    """While it is entered, torch's functions above are exactly rounded: computed in float64, then rounded to float32.

    Evenly spaced values are those of torch's vector code, which takes their step in float32 and rounds each value once;
    its scalar code rounds twice. A system of equations is solved by NumPy's LAPACK, as for the samplers under test.
    """
    with _Portable():  # type: ignore[no-untyped-call]
        yield


class _Portable(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in ROUNDED and args[0].dtype == torch.float32:
            return func(args[0].double(), *args[1:]).float()
        options = kwargs or {}
        if func is LINSPACE and options.get("dtype", torch.float32) == torch.float32:
            return _linspace(*args)
        result = func(*args, **options)
        if func is SOLVE:
            solution = torch.from_numpy(np.linalg.solve(args[0].numpy(), args[1].numpy()))
            return solution, *result[1:]
        return result


def _linspace(start: float, stop: float, count: int) -> torch.Tensor:
    first, last = torch.tensor([start, stop], dtype=torch.float32)
    step = ((last - first) / max(count - 1, 1)).double()
    i = torch.arange(count)
    return torch.where(i < max(count // 2, 1), first + step * i, last - step * (count - 1 - i)).float()
