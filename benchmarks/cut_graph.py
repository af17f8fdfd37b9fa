"""A graph run in pieces by ONNX Runtime, its attentions computed elsewhere: as an emulation of a kernel does it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from t2v_rt.engines.onnxruntime.imported import ort

Array = NDArray[np.float32]
Attend = Callable[[Array, Array, Array], Array]  # (heads, tokens, channels) each


class CutGraph:
    """A graph in pieces that end at its attentions; one is loaded at a time.

    Args:
        path: of the graph, beside its weights.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        model = onnx.load(str(path), load_external_data=False)
        known = onnx.shape_inference.infer_shapes(model).graph
        self._types = {
            item.name: item.type.tensor_type.elem_type for item in (*known.value_info, *known.input, *known.output)
        }
        self._model, self._results = model, [item.name for item in model.graph.output]
        self._steps: list[list[onnx.NodeProto]] = [[]]
        for node in model.graph.node:
            if node.op_type == "Attention":
                self._steps += [[node], []]
            else:
                self._steps[-1].append(node)

    def run(self, feeds: Mapping[str, NDArray[Any]], attend: Attend) -> list[NDArray[Any]]:
        """The graph's outputs.

        Args:
            feeds: its inputs.
            attend: computes an attention of heads.
        """
        values = dict(feeds)
        for i, nodes in enumerate(self._steps):
            if len(nodes) == 1 and nodes[0].op_type == "Attention":
                values[nodes[0].output[0]] = _attended(nodes[0], values, attend)
                continue
            later = {name for step in self._steps[i + 1 :] for node in step for name in node.input}
            made = [name for node in nodes for name in node.output if name in later or name in self._results]
            values |= zip(made, self._run_piece(nodes, values, made), strict=True)
            values = {name: value for name, value in values.items() if name in later or name in self._results}
        return [values[name] for name in self._results]

    def _run_piece(
        self, nodes: Sequence[onnx.NodeProto], values: Mapping[str, NDArray[Any]], made: Sequence[str]
    ) -> list[NDArray[Any]]:
        read = {name for node in nodes for name in node.input}
        names = [name for name in values if name in read]
        piece = onnx.helper.make_graph(
            nodes,
            "piece",
            [onnx.helper.make_tensor_value_info(name, self._types[name], None) for name in names],
            [onnx.helper.make_tensor_value_info(name, self._types[name], None) for name in made],
            [item for item in self._model.graph.initializer if item.name in read],
        )
        place = self._path.with_name("piece.onnx")
        model = onnx.helper.make_model(piece, opset_imports=self._model.opset_import, ir_version=self._model.ir_version)
        onnx.save(model, str(place))
        session = ort.InferenceSession(str(place), providers=["CPUExecutionProvider"])
        result: list[NDArray[Any]] = session.run(list(made), {name: values[name] for name in names})
        return result


def _attended(node: onnx.NodeProto, values: Mapping[str, NDArray[Any]], attend: Attend) -> NDArray[Any]:
    """An Attention node of one video, (1, tokens, heads * channels)."""
    operands = [values[name] for name in node.input if name]
    (heads,) = (item.i for item in node.attribute if item.name == "q_num_heads")
    split = (
        operand[0].astype(np.float32).reshape(operand.shape[1], heads, -1).transpose(1, 0, 2) for operand in operands
    )
    result = attend(*split).transpose(1, 0, 2).reshape(operands[0].shape)
    return result.astype(operands[0].dtype)
