"""Graphs as TensorRT asks for them compute what the others do; checked with ONNX Runtime on the CPU."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from t2v_rt.engines.onnxruntime.imported import ort
from t2v_rt.export.checkpoint import open_checkpoint
from t2v_rt.export.components import export_component
from t2v_rt.export.graph import GraphOptions
from t2v_rt.export.precision import Precision
from t2v_rt.export.wan.family import FAMILY
from t2v_rt.runtime.families.wan import relative_buckets, text_context
from tests.conftest import Tiny

SIZES = {"batch": 1, "frames": 3, "height": 4, "width": 6}  # 18 tokens
# float32 sums in another order; half operands round at 2^-11, and deep sums of random signs stay near it
TOLERANCES: dict[Precision, float] = {"fp32": 1e-4, "fp16": 1e-2}
FORBIDDEN = {"ScatterND", "ScatterElements", "NonZero", "Loop", "If", "Scan"}


def export(tiny: Tiny, name: str, folder: Path, form: GraphOptions, precision: Precision) -> Path:
    folder.mkdir()
    checkpoint = open_checkpoint(tiny.checkpoint)
    configs = FAMILY.read_configs(checkpoint.configs)
    ((role,),) = configs.units(name)
    spec = export_component(name, checkpoint, configs, folder, precision, {role: form})
    return folder / spec.graphs[role].path


def run(path: Path, feeds: dict[str, NDArray[Any]]) -> NDArray[Any]:
    (result,) = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, feeds)
    return np.asarray(result)


def relative(found: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_denoiser_of_fixed_shapes(tiny: Tiny, tmp_path: Path, precision: Precision) -> None:
    config = FAMILY.read_configs(open_checkpoint(tiny.checkpoint).configs).transformer
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((1, config.in_channels, 3, 4, 6)).astype(np.float32)
    padded = np.zeros((1, 512, config.text_dim), np.float32)
    padded[:, :7] = rng.standard_normal((1, 7, config.text_dim))
    context = text_context(padded)
    feeds = {"hidden_states": latents, "timestep": np.array([310.0], np.float32)}
    expected = run(
        export(tiny, "transformer", tmp_path / "plain", GraphOptions(), "fp32"),
        {**feeds, "encoder_hidden_states": context.embeds, "encoder_attention_bias": context.bias},
    )
    for i, form in enumerate(
        (
            GraphOptions({**SIZES, "text": 512}, slices=5),
            GraphOptions({"batch": 1, "text": 512}, slices=3, float32_matmul=False),
        )
    ):
        path = export(tiny, "transformer", tmp_path / str(i), form, precision)
        assert relative(run(path, {**feeds, "encoder_hidden_states": padded}), expected) < TOLERANCES[precision]
        model = onnx.load(str(path), load_external_data=False)
        kinds = Counter(node.op_type for node in model.graph.node)
        assert kinds["Attention"] == 2 * config.layers
        assert not FORBIDDEN & set(kinds)
        assert kinds["Gelu"] == 1 + config.layers * form.slices
        assert [len(value.type.tensor_type.shape.dim) for value in model.graph.input] == [5, 1, 3]
    fixed = onnx.load(str(tmp_path / "0/transformer/model.onnx"), load_external_data=False).graph.input[0]
    assert [dim.dim_value for dim in fixed.type.tensor_type.shape.dim] == [1, config.in_channels, 3, 4, 6]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_text_encoder_without_float32_matrices(tiny: Tiny, tmp_path: Path, precision: Precision) -> None:
    width = FAMILY.read_configs(open_checkpoint(tiny.checkpoint).configs).text_encoder.dim
    hidden = np.random.default_rng(0).standard_normal((1, 4, width)).astype(np.float32)
    feeds: dict[str, NDArray[Any]] = {"hidden_states": hidden, "relative_buckets": relative_buckets(4, 32, 128)}
    expected = run(export(tiny, "text_encoder", tmp_path / "plain", GraphOptions(), "fp32"), feeds)
    path = export(tiny, "text_encoder", tmp_path / "half", GraphOptions(float32_matmul=False), precision)
    assert relative(run(path, feeds), expected) < TOLERANCES[precision]
    model = onnx.load(str(path), load_external_data=False)
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    matrices = [kinds[node.input[1]] for node in model.graph.node if node.op_type == "MatMul"]
    half = precision == "fp16"
    assert set(matrices) == {onnx.TensorProto.FLOAT16 if half else onnx.TensorProto.FLOAT}
