"""Attention as it is written for plans: what goes into it decides what a fused kernel adds up in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from t2v_rt.engines.bundle.profiles import parse_profiles
from t2v_rt.export.checkpoint import open_checkpoint
from t2v_rt.export.graph import GraphOptions, Precision
from t2v_rt.export.wan.family import FAMILY
from t2v_rt.runtime.families.wan import relative_buckets
from tests.conftest import Tiny
from tests.export.test_graph_forms import TOLERANCES, export, relative, run

FLOAT, HALF = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16


def casts_around(path: Path) -> list[tuple[set[int], set[int]]]:
    """Of each attention: what query, key and value are cast to right before it, and its result right after."""
    graph = onnx.load(str(path), load_external_data=False).graph
    makers = {output: node for node in graph.node for output in node.output}
    found = []
    for attention in (node for node in graph.node if node.op_type == "Attention"):
        users = [node for node in graph.node if attention.output[0] in node.input]
        found.append((_targets(makers[name] for name in attention.input[:3]), _targets(users)))
    return found


def _targets(nodes: Any) -> set[int]:
    return {node.attribute[0].i if node.op_type == "Cast" else 0 for node in nodes}


@pytest.mark.parametrize("name", ["text_encoder", "transformer"])
def test_halves_are_added_up_in_float32_only_where_that_is_asked_for(tiny: Tiny, tmp_path: Path, name: str) -> None:
    fixed = {"text": 512} if name == "transformer" else {}
    asked = export(tiny, name, tmp_path / "asked", GraphOptions(fixed, accumulation="fp32"), "fp16")
    found = casts_around(asked)
    assert found
    assert all(pair == ({FLOAT}, {HALF}) for pair in found)
    for precision, options in (("fp32", GraphOptions(fixed, accumulation="fp32")), ("fp16", GraphOptions(fixed))):
        plain = export(tiny, name, tmp_path / precision, options, precision)  # type: ignore[arg-type]
        assert all(FLOAT not in before for before, _ in casts_around(plain))


def test_graphs_for_plans_ask_for_float32_sums(tiny: Tiny) -> None:
    configs = FAMILY.read_configs(open_checkpoint(tiny.checkpoint).configs)
    options = configs.graph_options(configs.ranges(parse_profiles(64, 96, 5, (0, 0, 0))), float32_matmul=True)
    assert {form.accumulation for roles in options.values() for form in roles.values()} == {"fp32"}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_bias_stays_in_half_beside_operands_in_float32(tiny: Tiny, tmp_path: Path, precision: Precision) -> None:
    width = FAMILY.read_configs(open_checkpoint(tiny.checkpoint).configs).text_encoder.dim
    hidden = np.random.default_rng(0).standard_normal((1, 4, width)).astype(np.float32)
    feeds: dict[str, NDArray[Any]] = {"hidden_states": hidden, "relative_buckets": relative_buckets(4, 32, 128)}
    expected = run(export(tiny, "text_encoder", tmp_path / "plain", GraphOptions(), "fp32"), feeds)
    path = export(tiny, "text_encoder", tmp_path / "asked", GraphOptions(accumulation="fp32"), precision)
    assert relative(run(path, feeds), expected) < TOLERANCES[precision]
