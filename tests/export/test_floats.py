"""bfloat16 and values of 4 bits as they are stored: the library's against arithmetic on the bits."""

from __future__ import annotations

import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from t2v_rt.errors import CheckpointError
from t2v_rt.export.floats import narrowed, to_bfloat16, to_float32
from t2v_rt.export.quantize import Quantization

PATTERNS = np.arange(1 << 16, dtype=np.uint32)
RANDOM = 10_000_000
# what importing the pipeline must not load
LAZY = ("ml_dtypes", "onnx", "filelock", "matplotlib", "psutil", "platformdirs", "msgspec")
CHILD = "import sys; from t2v_rt import TextToVideoPipeline; import t2v_rt.runtime.pipeline; print(*sys.modules)"


def widened(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """bfloat16 is the upper half of a float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(bits: NDArray[np.uint32]) -> NDArray[np.uint16]:
    """Bits of float32 numbers rounded to their upper half, to nearest even."""
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def test_every_bfloat16_is_read_as_it_is() -> None:
    bits = PATTERNS.astype(np.uint16)
    finite = np.isfinite(widened(bits))
    found = to_float32(bits[finite].view(np.uint8), "BF16", "a tensor")
    assert np.array_equal(found.view(np.uint32), widened(bits[finite]).view(np.uint32))
    for pattern in bits[~finite]:
        with pytest.raises(CheckpointError, match="not finite"):
            to_float32(np.array([pattern]).view(np.uint8), "BF16", "a tensor")


def test_every_upper_half_is_rounded_to_nearest_even_and_what_is_no_number_stays_none() -> None:
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)  # below, at and above the tie
    bits = ((PATTERNS[:, None] << 16) | lower).reshape(-1)
    _check(bits.astype(np.uint32))


def test_random_bits_are_rounded_to_nearest_even() -> None:
    _check(np.random.default_rng(0).integers(0, 1 << 32, RANDOM, np.uint32))


def _check(bits: NDArray[np.uint32]) -> None:
    values = bits.view(np.float32)
    numbers, found = ~np.isnan(values), to_bfloat16(values)
    assert np.array_equal(found[numbers], rounded(bits[numbers]))
    assert np.isnan(widened(found[~numbers])).all()


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7FC00000])
def test_what_is_no_number_is_refused_and_not_stored_as_zero(bits: int) -> None:
    value = np.array([bits], np.uint32).view(np.float32)
    with pytest.raises(CheckpointError, match="which bfloat16 cannot"):
        narrowed(value, "bfloat16", "a tensor")


def test_four_bits_are_packed_as_onnx_packs_them() -> None:
    weight = np.random.default_rng(1).normal(size=(6, 64)).astype(np.float32)
    parts = Quantization("int4", "DequantizeLinear").split(weight)
    scales = np.repeat(parts["scales"], 32, axis=0)
    integers = np.clip(np.rint(weight.T / scales), -8, 7).astype(ml_dtypes.int4)
    assert parts["quantized"].tobytes() == numpy_helper.from_array(integers).raw_data


def test_what_builds_need_is_not_loaded_with_the_pipeline() -> None:
    loaded = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True).stdout.split()
    assert "t2v_rt.runtime.pipeline" in loaded
    assert not {name.partition(".")[0] for name in loaded} & set(LAZY)
