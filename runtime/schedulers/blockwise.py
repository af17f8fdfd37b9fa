"""Element-wise arithmetic on latents, block by block, so that its temporaries stay in the processor's cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
BLOCK = 1 << 14  # values: 64 KiB an array, so that half a dozen of them fit a core's second-level cache


def blockwise(formula: Callable[..., Any], *arrays: Float32) -> Float32:
    """Applies an element-wise formula; the result is its only allocation of the arrays' size.

    Args:
        formula: of as many float32 blocks as there are arrays, to a float32 block. Scalars in it must not be float64,
            and are squared by multiplication: `**` of a NumPy scalar is the C library's pow, which rounds otherwise.
        arrays: float32, all of one shape; not changed.

    Returns:
        float32, of that shape.
    """
    if arrays[0].size <= BLOCK:
        whole: Float32 = formula(*arrays)
        return whole.copy() if any(whole is array for array in arrays) else whole
    flat = [np.ascontiguousarray(array).reshape(-1) for array in arrays]
    result = np.empty(arrays[0].shape, np.float32)
    out = result.reshape(-1)
    for start in range(0, out.size, BLOCK):
        block = slice(start, start + BLOCK)
        np.copyto(out[block], formula(*(array[block] for array in flat)), casting="no")
    return result
