"""Tensor specs: the name, dtype and shape of what goes into an engine, comes out of it, or stays in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any, Protocol

import numpy as np

from t2v_rt.errors import BundleError, EngineError

DTYPES: dict[str, type[np.generic]] = {"float32": np.float32, "float16": np.float16, "int64": np.int64}
ALIGNMENT = 256  # bytes: where tensors on a card begin at multiples of it, as its allocator and its libraries have it


def aligned(nbytes: int) -> int:
    """Bytes that a tensor takes on a card, before the next one begins."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Shaped(Protocol):
    """What is known of an array without looking into it."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of its values."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        ...


@dataclass(frozen=True)
class TensorSpec:
    """One tensor at an engine's boundary.

    Args:
        name: tensor name in the graph.
        dtype: `float32`, `float16` or `int64`; no other dtype crosses an engine's boundary.
        shape: each dimension a fixed size, a symbol such as `height`, or a multiple of one such as `4*height`.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise BundleError(f"tensor {self.name!r} has dtype {self.dtype!r}; expected one of {', '.join(DTYPES)}")
        _ = self._dims  # refuses what is not understood

    @cached_property
    def _dims(self) -> tuple[tuple[int, str], ...]:
        """Factor and symbol of each dimension, empty for a fixed size: read once, as each call of an engine asks."""
        return tuple((dim, "") if isinstance(dim, int) else _factor(dim) for dim in self.shape)

    @cached_property
    def numpy_dtype(self) -> np.dtype[Any]:
        return np.dtype(DTYPES[self.dtype])

    def fixed(self, sizes: Mapping[str, int]) -> TensorSpec:
        """The same tensor with the given symbols replaced by their sizes; other symbols stay."""
        dims = zip(self.shape, self._dims, strict=True)
        shape = tuple(factor * sizes[symbol] if symbol in sizes else dim for dim, (factor, symbol) in dims)
        return TensorSpec(self.name, self.dtype, shape)

    def resolve(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The concrete shape for given sizes of the symbols; KeyError for a symbol that has none."""
        return tuple([factor * sizes[symbol] if symbol else factor for factor, symbol in self._dims])

    @property
    def symbols(self) -> frozenset[str]:
        """The symbols in the shape."""
        return frozenset(symbol for _, symbol in self._dims if symbol)

    def nbytes(self, sizes: Mapping[str, int]) -> int:
        """Bytes of the tensor for given sizes of the symbols."""
        return prod(self.resolve(sizes)) * self.numpy_dtype.itemsize

    def check(self, array: Shaped, sizes: dict[str, int], engine: str) -> None:
        """Checks an array against the spec and binds the symbols it meets first.

        Args:
            array: what is about to be fed.
            sizes: symbol -> size; extended in place.
            engine: named in the error.

        Raises:
            EngineError: dtype, rank or a size differs.
        """
        fits = array.dtype == self.numpy_dtype and len(array.shape) == len(self.shape)
        for (factor, symbol), size in zip(self._dims, array.shape, strict=False):
            expected = factor * (sizes.setdefault(symbol, size // factor) if symbol else 1)
            fits = fits and size == expected
        if not fits:
            known = {symbol: size for symbol, size in sizes.items() if symbol in str(self.shape)}
            raise EngineError(
                f"{engine}: input {self.name!r} is {array.dtype} {list(array.shape)}; expected {self.dtype} "
                f"[{', '.join(map(str, self.shape))}]" + (f" with {known}" if known else "")
            )


@dataclass(frozen=True)
class StateSpec:
    """A tensor that an engine reads and rewrites from call to call.

    Args:
        name: of the state; also the spec's name in a `new_state`.
        input: name of the graph input that reads it, or None where a graph only writes it.
        output: name of the graph output that rewrites it, or None where a graph does not.
        tensor: its dtype and shape.
        follows: name of the state, a written one, whose value from before the call it takes after the call; None for
            none.
    """

    input: str | None
    output: str | None
    tensor: TensorSpec
    follows: str | None = None


def _factor(dim: str) -> tuple[int, str]:
    head, star, tail = dim.partition("*")
    if not star:
        return 1, dim
    if not head.isdigit() or int(head) < 1:
        raise BundleError(f"dimension {dim!r} is not understood; expected a size, a symbol or n*symbol")
    return int(head), tail
