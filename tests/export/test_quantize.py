"""Weights in 8 and 4 bits: what is stored, what ONNX Runtime makes of it, and what it costs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from t2v_rt import RequestError, TextToVideoPipeline, build_engines
from t2v_rt.cli import main
from t2v_rt.commands.verify import verify
from t2v_rt.engines.onnxruntime.imported import ort
from t2v_rt.export.quantize import BLOCK, Nodes, Quantization
from tests.conftest import Tiny

INPUTS, OUTPUTS = 3 * BLOCK, 48
# of weights drawn from a normal distribution: half a step of 255, or of 15, over a block's range
ERRORS = {("int8", "MatMulNBits"): 0.006, ("int8", "DequantizeLinear"): 0.009, ("int4", "MatMulNBits"): 0.09,
          ("int4", "DequantizeLinear"): 0.1}  # fmt: skip
TINY_ERROR = 0.06  # of 8 bits in rows of 24 or 40 weights, where errors hardly average out; 0.01 in rows of 4096


def weight(inputs: int = INPUTS) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((OUTPUTS, inputs)).astype(np.float32)


def tensor(name: str, dtype: str, shape: tuple[int, ...], values: np.ndarray) -> onnx.TensorProto:
    kind = {"uint8": TensorProto.UINT8, "int8": TensorProto.INT8, "int4": TensorProto.INT4}.get(
        dtype, TensorProto.FLOAT
    )
    return TensorProto(name=name, data_type=kind, dims=shape, raw_data=np.ascontiguousarray(values).tobytes())


def multiplied(scheme: Quantization, matrix: np.ndarray, x: np.ndarray) -> np.ndarray:
    """x @ matrix.T by ONNX Runtime from the stored parts."""
    outputs, inputs = matrix.shape
    outline, parts = scheme.outline(inputs, outputs, "float32"), scheme.split(matrix)
    assert set(outline) == set(parts)
    if scheme.nodes == "MatMulNBits":
        sizes = {"K": inputs, "N": outputs, "bits": scheme.bits, "block_size": BLOCK}
        nodes = [
            helper.make_node("MatMulNBits", ["x", *parts], ["y"], domain="com.microsoft", accuracy_level=0, **sizes)
        ]
    else:
        blocks = {"axis": 1} if scheme.bits == 8 else {"axis": 0, "block_size": BLOCK}
        nodes = [helper.make_node("DequantizeLinear", list(parts), ["w"], **blocks)]
        nodes.append(helper.make_node("MatMul", ["x", "w"], ["y"]))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (len(x), outputs))],
        [tensor(name, *outline[name], values) for name, values in parts.items()],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


@pytest.mark.parametrize(("name", "nodes"), ERRORS)
def test_backends_read_what_is_stored(name: str, nodes: Nodes) -> None:
    matrix = weight()
    found = multiplied(Quantization(name, nodes), matrix, np.eye(INPUTS, dtype=np.float32)).T
    error = np.linalg.norm(found - matrix) / np.linalg.norm(matrix)
    assert 0 < error < ERRORS[name, nodes]


@pytest.mark.parametrize(("name", "nodes"), ERRORS)
def test_rows_of_zeros_stay_zero(name: str, nodes: Nodes) -> None:
    matrix = weight()
    matrix[5] = 0
    found = multiplied(Quantization(name, nodes), matrix, np.eye(INPUTS, dtype=np.float32)).T
    assert not found[5].any()


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_last_block_that_is_not_full(name: str) -> None:
    scheme, matrix = Quantization(name, "MatMulNBits"), weight(INPUTS - 8)
    x = np.random.default_rng(1).standard_normal((3, INPUTS - 8)).astype(np.float32)
    expected = x @ matrix.T
    assert np.abs(multiplied(scheme, matrix, x) - expected).max() < 0.15 * np.abs(expected).max()
    assert Quantization("int8", "DequantizeLinear").fits(INPUTS - 8, OUTPUTS)
    assert not Quantization("int4", "DequantizeLinear").fits(INPUTS - 8, OUTPUTS)


def test_a_bundle_tells_what_its_weights_cost(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = TextToVideoPipeline.from_pretrained(tiny.bundle)
    expected, full = whole.encode_prompt(["a red ball"]), whole.manifest.components["text_encoder"]
    told, found = {}, {}
    for name, shrinks in (("int8", 2), ("int4", 3)):
        folder = tmp_path / name
        arguments = ["build-engines", str(tiny.checkpoint), "--output", str(folder), "--text-encoder-weights", name]
        assert main(arguments) == 0
        pipe = TextToVideoPipeline.from_pretrained(folder)
        spec = pipe.manifest.components["text_encoder"]
        assert spec.weights == name
        assert spec.weights_error is not None
        assert f"{name} weights, error {spec.weights_error:.2g}" in capsys.readouterr().out
        assert spec.weights_bytes < full.weights_bytes / shrinks
        assert verify(folder)["passed"]
        assert pipe.manifest.components["transformer"].weights == ""
        told[name] = spec.weights_error
        found[name] = float(np.abs(pipe.encode_prompt(["a red ball"]) - expected).max() / np.abs(expected).max())
    for errors in (told, found):
        assert 0 < errors["int8"] < TINY_ERROR
        assert errors["int8"] < errors["int4"] / 3


@pytest.mark.slow  # builds plans
def test_plans_of_quantized_weights(tiny: Tiny, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs t2v-rt[tensorrt-rtx]")
    built = [
        build_engines(
            tiny.checkpoint, tmp_path / str(kind), backend="tensorrt-rtx", text_encoder_weights=kind, gpus="sm89"
        )
        for kind in (None, "int8")
    ]
    full, small = (bundle.manifest.components["text_encoder"] for bundle in built)
    assert small.weights_bytes < full.weights_bytes
    assert small.weights_error is not None
    assert 0 < small.weights_error < TINY_ERROR
    assert small.graphs["blocks_0"].plan is not None
    assert small.graphs["blocks_0"].plan.nodes["DequantizeLinear"] > 0


def test_unknown_kinds_are_refused(narrow: Tiny, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="text_encoder_weights is 'int3'; expected one of int8, int4"):
        build_engines(narrow.checkpoint, tmp_path / "x", text_encoder_weights="int3")
    assert not list(tmp_path.iterdir())
