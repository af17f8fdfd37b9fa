"""Floats as they lie in files, to float32 and from it: what is not finite, or does not fit, is found and named."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from t2v_rt.errors import CheckpointError

# dtype -> an unsigned integer as wide, and the bits that are all set in nan and inf alone: twice as fast as isfinite
EXPONENTS = {
    "F64": ("<u8", 0x7FF0 << 48),
    "F32": ("<u4", 0x7F80 << 16),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
}
NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
BEYOND = {"float16": "build at fp32, or plans at bf16"}  # what to do about values that a dtype cannot hold
PIECE = 1 << 18  # values looked at together, which a core's cache holds


def to_float32(raw: NDArray[np.uint8], dtype: str, label: str) -> NDArray[np.float32]:
    """The values of a tensor's bytes; arguments and errors are those of `check_finite`."""
    check_finite(raw, dtype, label)
    if dtype == "BF16":
        widened: NDArray[np.float32] = raw.view("<u2").view(ml_dtypes.bfloat16).astype(np.float32)
        return widened
    if dtype == "F64":
        return narrowed(raw.view("<f8"), "float32", label)
    return raw.view({"F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float32, copy=False)


def _is_finite(raw: NDArray[np.uint8], dtype: str) -> bool:
    unsigned, exponent = EXPONENTS[dtype]
    bits = raw.view(unsigned)
    ones = bits.dtype.type(exponent)
    return all((bits[start : start + PIECE] & ones).max() != ones for start in range(0, len(bits), PIECE))


def check_finite(raw: NDArray[np.uint8], dtype: str, label: str) -> None:
    """Refuses values that are not finite.

    Args:
        raw: bytes of the values.
        dtype: theirs, as safetensors calls it.
        label: of the tensor, for the error.

    Raises:
        CheckpointError: one is nan or infinite.
    """
    if not _is_finite(raw, dtype):
        raise CheckpointError(
            f"{label} holds values that are not finite (nan or inf), and every video would; the file is damaged or was "
            "saved from a training that failed: download it again, or take another"
        )


def narrowed(array: NDArray[Any], dtype: str, label: str) -> NDArray[Any]:
    """Values in a narrower dtype, bfloat16 as its bits; raises CheckpointError for a value that is beyond its range."""
    with np.errstate(over="ignore"):
        values = to_bfloat16(array) if dtype == "bfloat16" else array.astype(dtype)
    if not _is_finite(values.reshape(-1).view(np.uint8), NAMES[dtype]):
        raise CheckpointError(
            f"{label} holds {float(np.abs(array).max()):.6g}, which {dtype} cannot; "
            + BEYOND.get(dtype, "the file is damaged: download it again")
        )
    return values


def to_bfloat16(array: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of float32 values rounded to bfloat16, to nearest even; what is no number stays none."""
    with np.errstate(invalid="ignore"):  # of nan that signals
        return array.astype(ml_dtypes.bfloat16).view(np.uint16)
