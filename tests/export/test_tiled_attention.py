"""Attention in tiles, as ONNX Runtime's graphs have it: the same values, and no scores in memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx
import pytest

from t2v_rt.engines.bundle.manifest import GraphSpec, from_plain, to_plain
from t2v_rt.export.checkpoint import open_checkpoint
from t2v_rt.export.components import export_component
from t2v_rt.export.graph import FOR_ONNXRUNTIME, GraphOptions
from t2v_rt.export.precision import Precision
from t2v_rt.export.wan.family import FAMILY
from tests.conftest import Tiny
from tests.export.test_attention_form import PADDED, attentions, denoiser_feeds
from tests.export.test_graph_forms import TOLERANCES, export, relative, run

ROUNDING = 5e-6  # float32 sums in another order, measured 7e-7 at the true width


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_tiles_give_what_whole_scores_give(tiny: Tiny, tmp_path: Path, precision: Precision) -> None:
    feeds = denoiser_feeds(tiny)
    whole = export(tiny, "transformer", tmp_path / "whole", GraphOptions(PADDED), "fp32")
    tiled = export(tiny, "transformer", tmp_path / "tiled", replace(FOR_ONNXRUNTIME, sizes=PADDED), precision)
    assert attentions(whole)
    assert not attentions(tiled)
    assert relative(run(tiled, feeds), run(whole, feeds)) < (ROUNDING if precision == "fp32" else TOLERANCES["fp16"])


def test_only_attention_without_a_mask_is_in_tiles(narrow: Tiny) -> None:
    for path in sorted(narrow.bundle.rglob("*.onnx")):
        nodes = onnx.load(str(path), load_external_data=False).graph.node
        assert all(len(node.input) == 3 for node in nodes if node.op_type == "MultiHeadAttention")
        assert all(len(node.input) == 4 for node in nodes if node.op_type == "Attention")


def test_a_bundle_tells_which_graphs_hold_scores(tiny: Tiny, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny.checkpoint)
    configs = FAMILY.read_configs(checkpoint.configs)
    for name, role, holds in (("transformer", "model", True), ("vae_decoder", "tail", False)):
        forms: tuple[GraphOptions | None, ...] = (None, GraphOptions())
        told = []
        for form in forms:
            folder = tmp_path / f"{name}-{form is None}"
            folder.mkdir()
            options = None if form is None else {role: form}
            told.append(export_component(name, checkpoint, configs, folder, "fp32", options, (role,)))
        assert [spec.graphs[role].holds_scores for spec in told] == [False, holds]
        plain = to_plain(told[0].graphs[role])
        del plain["holds_scores"]
        assert from_plain(plain, GraphSpec).holds_scores  # a bundle from before it was told
