"""Writing ONNX graphs: a thin layer over onnx.helper that names values, shares constants and streams weights out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from t2v_rt.engines.bundle.profiles import Accumulation
from t2v_rt.engines.specs import DTYPES as BOUNDARY_DTYPES
from t2v_rt.engines.specs import TensorSpec
from t2v_rt.export.precision import COMPUTE_DTYPES, Precision
from t2v_rt.export.quantize import BLOCK, Quantization
from t2v_rt.export.tensors import CheckpointWeights, Transform
from t2v_rt.export.weight_file import WeightFile, WeightPlace

OPSET = 23  # the first with Attention
IR_VERSION = 11  # the one that goes with opset 23
DTYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int64": TensorProto.INT64,
    "int8": TensorProto.INT8,
    "uint8": TensorProto.UINT8,
    "int4": TensorProto.INT4,
}
OWN_DOMAIN = "com.microsoft"  # of ONNX Runtime's operators
INT8_PRODUCTS = 4  # accuracy level of MatMulNBits: activations in 8 bits too, ten times as fast as exact products
BAND = 64  # rows: a band of the widest matrix fits a core's cache


@dataclass(frozen=True)
class GraphOptions:
    """How a graph is written for the engine that will run it; what it computes is the same.

    Args:
        sizes: symbols of the graph's inputs that have one size only: a builder plans memory better for fixed shapes.
        slices: parts of the token axis that a feed-forward runs over one after another, for its memory.
        float32_matmul: whether the engine can multiply float32 matrices.
        quantization: of the matrices of Linears, or None.
        accumulation: what attention adds up in, of half operands; None where the engine may choose.
        attention_parts: kernels that one attention among a video's tokens is shared out to.
        tiled_attention: whether attention without a mask is ONNX Runtime's MultiHeadAttention, see `attend`.
    """

    sizes: Mapping[str, int] = field(default_factory=dict)
    slices: int = 1
    float32_matmul: bool = True
    quantization: Quantization | None = None
    accumulation: Accumulation | None = None
    attention_parts: int = 1
    tiled_attention: bool = False


def transpose(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """A Linear's (out, in) as a MatMul's (in, out), in bands of rows: three times as fast as in one go."""
    result = np.empty(weight.shape[::-1], weight.dtype)
    for start in range(0, len(weight), BAND):
        result[:, start : start + BAND] = weight[start : start + BAND].T
    return result


@dataclass
class GraphWriter:
    """One ONNX graph under construction.

    Matmul and convolution operands are in the compute dtype of `precision`; everything between them (norms, gates,
    residual stream) stays float32, and `half`/`full` mark the borders. At fp32 both are no-ops.

    Args:
        name: graph name.
        weights: the checkpoint's tensors.
        store: external data file that takes the large weights.
        precision: of matmul and convolution operands.
        options: what the engine asks of the graph.
    """

    name: str
    weights: CheckpointWeights
    store: WeightFile
    precision: Precision = "fp32"
    options: GraphOptions = field(default_factory=GraphOptions)

    def __post_init__(self) -> None:
        self.compute_dtype = COMPUTE_DTYPES[self.precision]
        self.weights_bytes = 0
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self.inputs: list[TensorSpec] = []
        self.outputs: list[TensorSpec] = []
        self._count = 0

    @property
    def numpy_compute(self) -> type[np.generic]:
        """The compute dtype of a constant; KeyError for bfloat16, which NumPy has not."""
        return BOUNDARY_DTYPES[self.compute_dtype]

    # -- values -----------------------------------------------------------------------------------------------------

    def input(self, spec: TensorSpec) -> str:
        """Declares a graph input and returns its name."""
        self.inputs.append(spec)
        return spec.name

    def output(self, value: str, spec: TensorSpec) -> None:
        """Declares `value` as the graph output of that spec."""
        self._nodes.append(helper.make_node("Identity", [value], [spec.name], name=spec.name))
        self.outputs.append(spec)

    def const(self, value: Any, dtype: type[np.generic] = np.int64) -> str:
        """A small constant inside the graph; equal constants are one initializer."""
        array = np.asarray(value, dtype)
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._constants:
            name = f"const_{len(self._constants)}"
            self._constants[key] = name
            self._initializers[name] = numpy_helper.from_array(array, name)
        return self._constants[key]

    def scalar(self, value: float) -> str:
        """A float32 scalar constant."""
        return self.const(value, np.float32)

    def weight(
        self, name: str, shape: tuple[int, ...], transform: Transform | None = None, *, half: bool = True
    ) -> str:
        """A checkpoint tensor as an external initializer.

        Args:
            name: tensor name in the checkpoint; the initializer's name too.
            shape: shape in the checkpoint, checked.
            transform: applied to the float32 tensor before it is stored.
            half: whether it is stored in the compute dtype, or in float32 at any precision.

        Returns:
            The initializer's name.
        """
        if name not in self._initializers:
            place = self.store.places.get(name)
            if place is None:
                dtype = self.compute_dtype if half else "float32"
                place = self.store.add(name, self.weights, shape, transform, dtype)
            self.weights_bytes += place.length
            self._initializers[name] = _external(name, self.store.path.name, place)
        return name

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Adds a node with one output and returns the output's name."""
        return self.ops(kind, 1, *inputs, **attributes)[0]

    def ops(self, kind: str, outputs: int, *inputs: str, **attributes: Any) -> list[str]:
        """Adds a node with several outputs and returns their names."""
        self._count += 1
        label = f"{kind}_{self._count}"
        names = [label] if outputs == 1 else [f"{label}_{i}" for i in range(outputs)]
        self._nodes.append(helper.make_node(kind, list(inputs), names, name=label, **attributes))
        return names

    # -- arithmetic --------------------------------------------------------------------------------------------------

    def add(self, a: str, b: str) -> str:
        return self.op("Add", a, b)

    def mul(self, a: str, b: str) -> str:
        return self.op("Mul", a, b)

    def concat(self, values: Sequence[str], axis: int) -> str:
        return self.op("Concat", *values, axis=axis)

    def transpose(self, x: str, perm: Sequence[int]) -> str:
        return self.op("Transpose", x, perm=list(perm))

    def silu(self, x: str) -> str:
        return self.mul(x, self.op("Sigmoid", x))

    def half(self, x: str) -> str:
        """Into the compute dtype."""
        return x if self.precision == "fp32" else self.op("Cast", x, to=DTYPES[self.compute_dtype])

    def full(self, x: str) -> str:
        """Into float32."""
        return x if self.precision == "fp32" else self.op("Cast", x, to=TensorProto.FLOAT)

    def linear(self, x: str, name: str, n_in: int, n_out: int, *, bias: bool = True) -> str:
        """A torch Linear of the checkpoint, on and to the compute dtype."""
        scheme = self.options.quantization
        if scheme is not None and scheme.fits(n_in, n_out):
            y = self._quantized(x, f"{name}.weight", n_in, n_out, scheme)
        else:
            y = self.op("MatMul", x, self.weight(f"{name}.weight", (n_out, n_in), transpose))
        return self.add(y, self.weight(f"{name}.bias", (n_out,))) if bias else y

    def _quantized(self, x: str, name: str, n_in: int, n_out: int, scheme: Quantization) -> str:
        parts = [f"{name}.{part}" for part in scheme.outline(n_in, n_out, self.compute_dtype)]
        if parts[0] not in self.store.places:
            self.store.add_quantized(name, self.weights, (n_out, n_in), scheme, self.compute_dtype)
        for part in parts:
            place = self.store.places[part]
            self.weights_bytes += place.length
            self._initializers[part] = _external(part, self.store.path.name, place)
        if scheme.nodes == "MatMulNBits":
            sizes = {"K": n_in, "N": n_out, "bits": scheme.bits, "block_size": BLOCK}
            return self.op("MatMulNBits", x, *parts, domain=OWN_DOMAIN, accuracy_level=INT8_PRODUCTS, **sizes)
        blocks = {"axis": 1} if scheme.bits == 8 else {"axis": 0, "block_size": BLOCK}
        return self.op("MatMul", x, self.op("DequantizeLinear", *parts, **blocks))

    def linear_full(self, x: str, name: str, n_in: int, n_out: int) -> str:
        """A torch Linear of the checkpoint in float32 at any precision, on a value (B, n_in)."""
        bias = self.weight(f"{name}.bias", (n_out,), half=False)
        if self.options.float32_matmul:
            return self.add(
                self.op("MatMul", x, self.weight(f"{name}.weight", (n_out, n_in), transpose, half=False)), bias
            )
        products = self.mul(
            self.op("Unsqueeze", x, self.const([1])), self.weight(f"{name}.weight", (n_out, n_in), half=False)
        )
        return self.add(self.op("ReduceSum", products, self.const([2]), keepdims=0), bias)

    # -- shapes ------------------------------------------------------------------------------------------------------

    def dim(self, x: str, axis: int) -> str:
        """The size of an axis at run time, as an int64 tensor of shape (1,)."""
        return self.op("Shape", x, start=axis, end=axis + 1)

    def shape_of(self, dims: Sequence[str | int]) -> str:
        """An int64 shape tensor put together from constants and run-time sizes."""
        if all(isinstance(dim, int) for dim in dims):
            return self.const(list(dims))
        return self.concat([self.const([dim]) if isinstance(dim, int) else dim for dim in dims], 0)

    def reshape(self, x: str, dims: Sequence[str | int]) -> str:
        return self.op("Reshape", x, self.shape_of(dims))

    def slice(self, x: str, axis: int, start: int | str, end: int | str) -> str:
        bounds = [self.const([bound]) if isinstance(bound, int) else bound for bound in (start, end)]
        return self.op("Slice", x, *bounds, self.const([axis]))

    # -- the file ----------------------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Writes the graph; its weights are in the external file already."""
        used = {name for node in self._nodes for name in node.input}
        graph = helper.make_graph(
            self._nodes,
            self.name,
            [_value_info(spec, self.options.sizes) for spec in self.inputs],
            [_value_info(spec, self.options.sizes) for spec in self.outputs],
            [tensor for name, tensor in self._initializers.items() if name in used],
        )
        opsets = [helper.make_opsetid("", OPSET)]
        if any(node.domain == OWN_DOMAIN for node in self._nodes):
            opsets.append(helper.make_opsetid(OWN_DOMAIN, 1))
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="t2v-rt")
        path.write_bytes(model.SerializeToString(deterministic=True))


def _value_info(spec: TensorSpec, sizes: Mapping[str, int]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(spec.name, DTYPES[spec.dtype], list(spec.fixed(sizes).shape))


def _external(name: str, location: str, place: WeightPlace) -> onnx.TensorProto:
    tensor = TensorProto(
        name=name,
        data_type=DTYPES[place.dtype],
        dims=place.shape,
        data_location=TensorProto.EXTERNAL,
    )
    for key, value in (("location", location), ("offset", place.offset), ("length", place.length)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor
