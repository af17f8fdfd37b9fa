"""Attention as it is written for plans: what goes into it decides what a fused kernel adds up in, and for how long."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from t2v_rt.engines.bundle.profiles import Accumulation, parse_profiles
from t2v_rt.export.checkpoint import open_checkpoint
from t2v_rt.export.graph import GraphOptions
from t2v_rt.export.precision import ACCUMULATIONS, Precision
from t2v_rt.export.wan.family import FAMILY
from t2v_rt.runtime.families.wan import relative_buckets
from tests.conftest import Tiny
from tests.export.test_graph_forms import TOLERANCES, export, relative, run

FLOAT, HALF = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
PADDED = {"text": 512}


def attentions(path: Path) -> list[tuple[set[int], set[int], int]]:
    """Of each attention: what query, key and value are cast to right before it, its result right after, and its heads;
    those whose keys are a video's tokens come first in each layer."""
    graph = onnx.load(str(path), load_external_data=False).graph
    makers = {output: node for node in graph.node for output in node.output}
    found = []
    for attention in (node for node in graph.node if node.op_type == "Attention"):
        users = [node for node in graph.node if attention.output[0] in node.input]
        heads = next(value.i for value in attention.attribute if value.name == "q_num_heads")
        found.append((_casts(makers[name] for name in attention.input[:3]), _casts(users), heads))
    return found


def _casts(nodes: Iterable[Any]) -> set[int]:
    return {node.attribute[0].i if node.op_type == "Cast" else 0 for node in nodes}


def denoiser_feeds(tiny: Tiny) -> dict[str, NDArray[Any]]:
    config = FAMILY.read_configs(open_checkpoint(tiny.checkpoint).configs).transformer
    rng = np.random.default_rng(0)
    return {
        "hidden_states": rng.standard_normal((1, config.in_channels, 3, 4, 6)).astype(np.float32),
        "timestep": np.array([310.0], np.float32),
        "encoder_hidden_states": rng.standard_normal((1, 512, config.text_dim)).astype(np.float32),
    }


@pytest.mark.parametrize("name", ["text_encoder", "transformer"])
def test_halves_are_added_up_in_float32_only_where_that_is_asked_for(tiny: Tiny, tmp_path: Path, name: str) -> None:
    fixed = PADDED if name == "transformer" else {}
    asked = export(tiny, name, tmp_path / "asked", GraphOptions(fixed, accumulation="fp32"), "fp16")
    found = attentions(asked)
    assert found
    assert all((before, after) == ({FLOAT}, {HALF}) for before, after, _ in found)
    others: list[tuple[Precision, GraphOptions]] = [
        ("fp32", GraphOptions(fixed, accumulation="fp32")),
        ("bf16", GraphOptions(fixed, accumulation="fp32")),
        ("fp16", GraphOptions(fixed)),
    ]
    for precision, options in others:
        plain = export(tiny, name, tmp_path / precision, options, precision)
        assert all(FLOAT not in before for before, *_ in attentions(plain))


def test_sums_in_half_are_those_among_a_videos_tokens_only(tiny: Tiny, tmp_path: Path) -> None:
    found = attentions(export(tiny, "transformer", tmp_path / "a", GraphOptions(PADDED, accumulation="fp16"), "fp16"))
    own, to_text = found[::2], found[1::2]
    assert all(FLOAT not in before for before, *_ in own)
    assert all(before == {FLOAT} for before, *_ in to_text)
    assert len(own) == len(to_text) > 0
    text = attentions(export(tiny, "text_encoder", tmp_path / "b", GraphOptions(accumulation="fp16"), "fp16"))
    assert all(before == {FLOAT} for before, *_ in text)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_centred_values_and_shares_of_the_heads_give_the_same(tiny: Tiny, tmp_path: Path, precision: Precision) -> None:
    feeds, heads = denoiser_feeds(tiny), tiny.config.heads
    plain = export(tiny, "transformer", tmp_path / "plain", GraphOptions(PADDED), "fp32")
    expected, layers = run(plain, feeds), len(attentions(plain)) // 2
    cases: list[tuple[Accumulation, int]] = [("fp32", 1), ("fp16", 1), ("fp32", 2), ("fp16", 2)]
    for accumulation, parts in cases:
        options = GraphOptions(PADDED, accumulation=accumulation, attention_parts=parts)
        path = export(tiny, "transformer", tmp_path / f"{accumulation}-{parts}", options, precision)
        assert relative(run(path, feeds), expected) < TOLERANCES[precision]
        found = [count for *_, count in attentions(path)]
        assert found == layers * [*([heads] if parts == 1 else heads * [1]), heads]  # three heads in three parts


def test_graphs_for_plans_ask_for_it(tiny: Tiny) -> None:
    configs = FAMILY.read_configs(open_checkpoint(tiny.checkpoint).configs)
    ranges = configs.ranges(parse_profiles(64, 96, 5, (0, 0, 0)))
    assert {form.accumulation for roles in configs.graph_options(ranges, True).values() for form in roles.values()} == {
        "fp32"
    }
    for kind in ACCUMULATIONS:
        options = configs.graph_options(ranges, True, kind)
        assert {form.accumulation for roles in options.values() for form in roles.values()} == {kind}


@pytest.mark.parametrize(("height", "parts"), [("480", 1), ("720", 2), ("480,720", 2), ("480:720", 2)])
def test_an_attention_too_long_for_one_kernel_is_shared_out(tiny: Tiny, height: str, parts: int) -> None:
    configs = FAMILY.read_configs(open_checkpoint(tiny.checkpoint).configs)
    profiles = parse_profiles(height, 1280, 77, (0, 0, 0))
    options = configs.graph_options(configs.ranges(profiles), float32_matmul=True)
    assert options["transformer"]["model"].attention_parts == parts
    assert options["vae_decoder"]["head_next"].attention_parts == 1


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_bias_stays_in_half_beside_operands_in_float32(tiny: Tiny, tmp_path: Path, precision: Precision) -> None:
    width = FAMILY.read_configs(open_checkpoint(tiny.checkpoint).configs).text_encoder.dim
    hidden = np.random.default_rng(0).standard_normal((1, 4, width)).astype(np.float32)
    feeds: dict[str, NDArray[Any]] = {"hidden_states": hidden, "relative_buckets": relative_buckets(4, 32, 128)}
    expected = run(export(tiny, "text_encoder", tmp_path / "plain", GraphOptions(), "fp32"), feeds)
    path = export(tiny, "text_encoder", tmp_path / "asked", GraphOptions(accumulation="fp32"), precision)
    assert relative(run(path, feeds), expected) < TOLERANCES[precision]
