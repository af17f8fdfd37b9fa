"""The work of a graph, counted from its nodes, against the same counted by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from t2v_rt.benchmarks.bounds import better, shares, works
from t2v_rt.benchmarks.wan_tensors import CONFIGS
from t2v_rt.benchmarks.work import Work, count
from t2v_rt.engines.bundle.manifest import GraphSpec
from t2v_rt.engines.bundle.store import open_bundle
from t2v_rt.engines.specs import TensorSpec
from t2v_rt.export.graph import GraphWriter
from t2v_rt.export.tensors import CheckpointWeights, Transform
from t2v_rt.export.wan.transformer import TransformerConfig, input_specs, output_spec, write_transformer
from t2v_rt.export.weight_file import WeightFile, WeightPlace
from tests.conftest import Tiny

TEXT = 41
LARGE = {"batch": 1, "frames": 21, "height": 60, "width": 104, "text": TEXT}  # latents of 832x480 with 81 frames
TOKENS = 21 * 30 * 52


class Outline(WeightFile):
    """Places of weights that nobody reads, so that a graph of any width takes no disk."""

    def add(
        self, name: str, source: CheckpointWeights, shape: tuple[int, ...], transform: Transform | None, dtype: str
    ) -> WeightPlace:
        zeros: NDArray[np.float32] = np.broadcast_to(np.float32(0), shape)
        stored = (transform(zeros) if transform else zeros).shape
        self.places[name] = WeightPlace(0, 4 * int(np.prod(shape)), dtype, stored)
        return self.places[name]


def true_width(folder: Path, layers: int) -> Work:
    """What one call of the published denoiser is, with so many of its layers."""
    config = TransformerConfig.from_config({**CONFIGS["transformer"], "num_layers": layers})
    with Outline(folder / "weights.bin") as store:
        writer = GraphWriter("transformer", CheckpointWeights(folder, [], {}), store)
        write_transformer(writer, config)
        writer.save(folder / "model.onnx")
    spec = GraphSpec(
        "model.onnx", tuple(input_specs(config)), (output_spec(config),), weights_bytes=writer.weights_bytes
    )
    return count(folder / "model.onnx", spec, LARGE)


def test_the_denoiser_of_a_large_video_is_82_and_198_teraflop_a_call(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one, two = true_width(tmp_path / "one", 1), true_width(tmp_path / "two", 2)
    # of a layer, by hand: six matrices of dim x dim on the tokens, two on the text, and the two of the feed-forward
    dim, wide = 1536, 8960
    products = 2 * TOKENS * (6 * dim**2 + 2 * dim * wide) + 2 * TEXT * 2 * dim**2
    assert two.products - one.products == products
    assert 30 * (two.products - one.products) == pytest.approx(82e12, rel=0.01)
    # attention: scores, and their product with the values, of the tokens among themselves and with the text
    assert two.attention - one.attention == 4 * TOKENS * (TOKENS + TEXT) * dim
    assert 30 * 4 * TOKENS**2 * dim == pytest.approx(198e12, rel=0.01)
    # the patches: 16 channels of 2x2 to the width
    assert one.convolutions == 2 * TOKENS * dim * 16 * 4
    rows, inner, columns = max(two.matrices, key=lambda matrix: two.matrices[matrix])
    assert (rows, inner, columns) in {(TOKENS, dim, wide), (TOKENS, wide, dim), (TOKENS, dim, dim)}
    # all of them are read once, at 4 bytes
    assert two.weights_bytes - one.weights_bytes == pytest.approx(4 * (8 * dim**2 + 2 * dim * wide), rel=0.01)


def count_one(tmp_path: Path, nodes: list[object], inputs: dict[str, tuple[int, ...]]) -> Work:
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "one", infos, [out])
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    path = tmp_path / "one.onnx"
    path.write_bytes(helper.make_model(graph, opset_imports=opsets).SerializeToString())
    specs = tuple(TensorSpec(name, "float32", shape) for name, shape in inputs.items())
    return count(path, GraphSpec("one.onnx", specs, ()), {})


def test_operators_of_onnx_runtime_are_counted_and_seen_through(tmp_path: Path) -> None:
    attention = helper.make_node("MultiHeadAttention", ["q", "k", "v"], ["a"], domain="com.microsoft", num_heads=2)
    product = helper.make_node("MatMulNBits", ["a", "b"], ["p"], domain="com.microsoft", K=8, N=6, bits=8, block_size=8)
    last = helper.make_node("MatMul", ["p", "w"], ["out"])
    inputs = {"q": (1, 5, 8), "k": (1, 7, 8), "v": (1, 7, 8), "b": (6, 1, 8), "w": (6, 3)}
    found = count_one(tmp_path, [attention, product, last], inputs)
    assert found.attention == 2 * 5 * 7 * (8 + 8)
    assert found.products == 2 * 5 * 8 * 6 + 2 * 5 * 6 * 3
    assert found.boundary_bytes == 4 * sum(int(np.prod(shape)) for shape in inputs.values())


def test_a_transposed_product_and_a_convolution_in_groups_are_counted_as_they_are(tmp_path: Path) -> None:
    gemm = helper.make_node("Gemm", ["a", "b"], ["out"], transB=1)
    assert count_one(tmp_path, [gemm], {"a": (4, 5), "b": (6, 5)}).products == 2 * 4 * 5 * 6
    grouped = helper.make_node("Conv", ["x", "w"], ["out"], group=2, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    found = count_one(tmp_path, [grouped], {"x": (1, 4, 10, 10), "w": (6, 2, 3, 3)})
    assert found.convolutions == 2 * (6 * 10 * 10) * (2 * 3 * 3)


def test_the_higher_rate_is_the_limit() -> None:
    quick, slow = ({"matmul_gflops": rate, "copy_gbytes": 10 / rate, "shapes": {}} for rate in (2.0, 1.0))
    assert better(slow, quick) == {"matmul_gflops": 2.0, "copy_gbytes": 10.0}


def test_the_share_of_the_limit_is_that_of_the_slower_of_both_limits(narrow: Tiny) -> None:
    sizes = {"batch": 1, "frames": 3, "height": 8, "width": 8, "text": 5}
    call = {"component": "transformer", "role": "model", "sizes": sizes, "calls": 2, "seconds": 1.0}
    ((_, work),) = counted = works(open_bundle(narrow.bundle), [call])
    quick_copies, slow_copies = ({"matmul_gflops": 1.0, "copy_gbytes": rate} for rate in (1e6, 1e-6))
    (by_products,), (by_copies,) = (shares(counted, rates) for rates in (quick_copies, slow_copies))
    assert by_products["share"] == pytest.approx(2 * work.flops / 1e9)
    assert by_copies["share"] == pytest.approx(2 * work.bytes / 1e3)
