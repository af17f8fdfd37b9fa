"""How much work a graph is, counted from its nodes: floating-point operations of products, and bytes that must move.

A multiplication and an addition are two operations. Counted are matrix products, convolutions and attention (the
scores and their product with the values); norms, gates and the like are a per cent of them. Bytes are the least that an
engine must move: weights once, inputs, outputs and states once. What lies between nodes may stay in caches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from t2v_rt.engines.bundle.manifest import GraphSpec
from t2v_rt.errors import InputError

Shapes = Mapping[str, Sequence[int]]
# operators that onnx infers no shapes of -> input whose shape the output has
OPAQUE = {"MultiHeadAttention": 0, "GroupQueryAttention": 0, "RotaryEmbedding": 0}
NBITS = "MatMulNBits"


@dataclass(frozen=True)
class Work:
    """What one call of a graph is.

    Args:
        products: operations of matrix products.
        attention: operations of attention.
        convolutions: operations of convolutions.
        weights_bytes: of weights that are read.
        boundary_bytes: of inputs, outputs and states.
        matrices: (rows, inner, columns) of the matrix products -> operations in all of that shape.
    """

    products: int = 0
    attention: int = 0
    convolutions: int = 0
    weights_bytes: int = 0
    boundary_bytes: int = 0
    matrices: Mapping[tuple[int, int, int], int] = field(default_factory=dict)

    @property
    def flops(self) -> int:
        """All operations."""
        return self.products + self.attention + self.convolutions

    @property
    def bytes(self) -> int:
        """All bytes."""
        return self.weights_bytes + self.boundary_bytes


def count(path: Path, graph: GraphSpec, sizes: Mapping[str, int]) -> Work:
    """The work of one call.

    Args:
        path: of the ONNX graph; its weights are not read.
        graph: from the manifest.
        sizes: of the symbols in its inputs' and states' shapes.

    Raises:
        InputError: the package onnx is missing, or the sizes of some product cannot be told.
    """
    model, shapes = _shapes(path, graph, sizes)
    work = {"products": 0, "attention": 0, "convolutions": 0}
    matrices: dict[tuple[int, int, int], int] = {}
    for node in model.graph.node:
        kind, operations, matrix = _operations(node, shapes)
        if kind:
            work[kind] += operations
        if matrix is not None:
            matrices[matrix] = matrices.get(matrix, 0) + operations
    specs = [*graph.inputs, *graph.outputs]
    boundary = sum(spec.nbytes(sizes) for spec in specs)
    for state in graph.states:
        boundary += state.tensor.nbytes(sizes) * ((state.input is not None) + (state.output is not None))
    return Work(**work, weights_bytes=graph.weights_bytes, boundary_bytes=boundary, matrices=matrices)


def _onnx() -> Any:
    try:
        import onnx.shape_inference  # an import of the name `onnx` alone does not load it
    except ImportError as exc:
        raise InputError(f"counting a graph's work needs the package {exc.name!r}; install t2v-rt[bench]") from exc
    return onnx


def _shapes(path: Path, graph: GraphSpec, sizes: Mapping[str, int]) -> tuple[Any, Shapes]:
    """The graph, and the shape of each value in it."""
    onnx = _onnx()
    model = onnx.load_model_from_string(path.read_bytes())  # its weights lie in another file
    fixed = {spec.name: spec.resolve(sizes) for spec in graph.inputs}
    fixed |= {state.input: state.tensor.resolve(sizes) for state in graph.states if state.input is not None}
    for item in model.graph.input:
        for dim, size in zip(item.type.tensor_type.shape.dim, fixed.get(item.name, ()), strict=False):
            dim.dim_value = size
    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    _make_plain(plain.graph)
    inferred = onnx.shape_inference.infer_shapes(plain, data_prop=True).graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    for item in (*inferred.input, *inferred.value_info, *inferred.output):
        dims = item.type.tensor_type.shape.dim
        if all(dim.HasField("dim_value") for dim in dims):
            shapes.setdefault(item.name, tuple(dim.dim_value for dim in dims))
    return model, shapes


def _make_plain(graph: Any) -> None:
    """Puts nodes whose results have the same shape in the place of those that onnx knows nothing of."""
    for node in graph.node:
        if node.domain and node.op_type in OPAQUE:
            source, result = node.input[OPAQUE[node.op_type]], node.output[0]
            node.Clear()
            node.op_type = "Identity"
            node.input.append(source)
            node.output.append(result)
        elif node.op_type == NBITS:
            values = _attributes(node)
            weight = graph.initializer.add()
            weight.name, weight.data_type = f"{node.output[0]}.weight", 1
            weight.dims.extend([values["K"], values["N"]])
            weight.raw_data = b""
            source, result = node.input[0], node.output[0]
            node.Clear()
            node.op_type = "MatMul"
            node.input.extend([source, weight.name])
            node.output.append(result)


def _attributes(node: Any) -> dict[str, Any]:
    return {item.name: item.i if item.type == 2 else list(item.ints) for item in node.attribute}


def _operations(node: Any, shapes: Shapes) -> tuple[str, int, tuple[int, int, int] | None]:
    """Of one node: which kind of work it is, how many operations, and the shape of a matrix product."""
    kind = node.op_type
    if kind in ("MatMul", "Gemm", NBITS):
        first = _shape(node, node.input[0], shapes)
        if kind == NBITS:
            values = _attributes(node)
            inner, columns = values["K"], values["N"]
        else:
            second = _shape(node, node.input[1], shapes)
            transposed = _attributes(node).get("transB", 0)
            inner, columns = (second[-1], second[-2]) if transposed else (second[-2], second[-1])
        rows = prod(first) // inner
        batch = 1 if kind != "MatMul" else max(1, prod(second[:-2]) // max(1, prod(first[:-2])))
        return "products", 2 * batch * rows * inner * columns, (batch * rows, inner, columns)
    if kind == "Conv":
        out, weight = _shape(node, node.output[0], shapes), _shape(node, node.input[1], shapes)
        return "convolutions", 2 * prod(out) * prod(weight[1:]), None
    if kind in ("Attention", "MultiHeadAttention"):
        query, key, value = (_shape(node, name, shapes) for name in node.input[:3])
        return "attention", _attention(query, key, value), None
    return "", 0, None


def _attention(query: Sequence[int], key: Sequence[int], value: Sequence[int]) -> int:
    """Scores and their product with the values; (B, L, heads x D), or (B, heads, L, D)."""
    if len(query) == 3:
        batch, rows, width = query
        return 2 * batch * rows * key[1] * (width + value[2])
    batch, heads, rows, width = query
    return 2 * batch * heads * rows * key[2] * (width + value[3])


def _shape(node: Any, name: str, shapes: Shapes) -> Sequence[int]:
    if name not in shapes:
        raise InputError(f"the shape of {name!r}, of {node.op_type} {node.name!r}, cannot be told; count it by hand")
    return shapes[name]
