"""Weights in 8 or 4 bits, in the two forms that backends take.

ONNX Runtime has an operator of its own, MatMulNBits: weights in blocks along the inputs, each with a scale and a zero
point. TensorRT fuses DequantizeLinear into the multiplication: 8 bits with a scale for each output, 4 bits with one for
each block. In both, activations and sums keep the graph's precision.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from t2v_rt.errors import RequestError

BITS: Mapping[str, int] = {"int8": 8, "int4": 4}
BLOCK = 32  # weights with one scale; 4 bits in blocks of 128 have a fifth more error
Nodes = Literal["MatMulNBits", "DequantizeLinear"]
Stored = tuple[NDArray[Any], str]  # values as they lie in the file, and their dtype


@dataclass(frozen=True)
class Quantization:
    """How the matrices of a graph are stored.

    Args:
        name: `int8` or `int4`.
        nodes: operator that takes them.
    """

    name: str
    nodes: Nodes

    def __post_init__(self) -> None:
        if self.name not in BITS:
            raise RequestError(f"text_encoder_weights is {self.name!r}; expected one of {', '.join(BITS)}")

    @property
    def bits(self) -> int:
        return BITS[self.name]

    def fits(self, inputs: int, outputs: int) -> bool:
        """Whether a matrix can be stored so: DequantizeLinear takes whole blocks only."""
        return self.nodes == "MatMulNBits" or self.bits == 8 or inputs % BLOCK == 0

    def outline(self, inputs: int, outputs: int, scale_dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Part -> dtype and shape, as `split` makes them of a Linear's weight."""
        blocks = -(-inputs // BLOCK)
        if self.nodes == "MatMulNBits":
            points = outputs * (blocks if self.bits == 8 else -(-blocks // 2))
            return {
                "quantized": ("uint8", (outputs, blocks, BLOCK * self.bits // 8)),
                "scales": ("float32", (outputs * blocks,)),
                "zero_points": ("uint8", (points,)),
            }
        scales = (outputs,) if self.bits == 8 else (blocks, outputs)
        return {"quantized": (self.name, (inputs, outputs)), "scales": (scale_dtype, scales)}

    def split(self, weight: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        """A Linear's weight (outputs, inputs) in parts: integers, packed, and float32 scales."""
        if self.nodes == "MatMulNBits":
            return _in_blocks(weight, self.bits)
        return _per_output(weight) if self.bits == 8 else _blocks_of_inputs(weight)


def _in_blocks(weight: NDArray[np.float32], bits: int) -> dict[str, NDArray[Any]]:
    """Unsigned, with zero points: the range of each block is used whole."""
    outputs, inputs = weight.shape
    blocks, most = -(-inputs // BLOCK), 2**bits - 1
    values = np.zeros((outputs, blocks * BLOCK), np.float32)
    values[:, :inputs] = weight
    values = values.reshape(outputs, blocks, BLOCK)
    low = np.minimum(values.min(-1, keepdims=True), 0)  # zero itself stays exact
    scales = _no_zeros((np.maximum(values.max(-1, keepdims=True), 0) - low) / np.float32(most))
    points = np.clip(np.rint(-low / scales), 0, most)
    integers = np.clip(np.rint(values / scales) + points, 0, most).astype(np.uint8)
    packed_points = points[..., 0].astype(np.uint8)
    if bits == 4:
        packed_points = _pairs(np.pad(packed_points, ((0, 0), (0, blocks % 2))))
        integers = _pairs(integers)
    return {"quantized": integers, "scales": scales.reshape(-1), "zero_points": packed_points.reshape(-1)}


def _per_output(weight: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
    scales = _no_zeros(np.abs(weight).max(1) / np.float32(127))
    integers = np.clip(np.rint(weight / scales[:, None]), -127, 127).astype(np.int8)
    return {"quantized": np.ascontiguousarray(integers.T), "scales": scales}


def _blocks_of_inputs(weight: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
    """Signed 4 bits: the value of the largest magnitude in a block becomes -8, whatever its sign."""
    outputs, inputs = weight.shape
    values = weight.T.reshape(inputs // BLOCK, BLOCK, outputs)
    largest = np.take_along_axis(values, np.abs(values).argmax(1)[:, None], 1)
    scales = _no_zeros(largest / np.float32(-8))
    integers = np.clip(np.rint(values / scales), -8, 7).astype(np.int8).astype(np.uint8) & 15
    return {"quantized": _pairs(integers.reshape(inputs, outputs)), "scales": scales[:, 0]}


def _no_zeros(scales: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.where(scales == 0, np.float32(1), scales)


def _pairs(nibbles: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Two values of 4 bits a byte, the first in the lower half."""
    return np.bitwise_or(nibbles[..., 0::2], np.left_shift(nibbles[..., 1::2], np.uint8(4)), dtype=np.uint8)
