"""Graphs of ONNX Runtime that work through a video's tokens in parts: the same values, and less memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from t2v_rt import TextToVideoPipeline, build_engines
from t2v_rt.build.units import SLICES, graph_form
from t2v_rt.engines.bundle.manifest import GraphSpec, from_plain, to_plain
from t2v_rt.export.graph import GraphOptions
from t2v_rt.export.precision import Precision
from t2v_rt.runtime.memory.estimates import denoise_stage
from tests.conftest import Tiny
from tests.export.test_attention_form import PADDED, attentions, denoiser_feeds
from tests.export.test_graph_forms import TOLERANCES, export, relative, run

ROUNDING = 5e-6  # float32 sums in another order, measured 7e-7 at the true width
LARGE = {"height": 256, "width": 256, "num_frames": 9}


@pytest.fixture(scope="module")
def large(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose default video has many tokens."""
    folder = tmp_path_factory.mktemp("large") / "bundle"
    build_engines(tiny.checkpoint, folder, **LARGE)  # type: ignore[arg-type]
    return folder


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_parts_give_what_the_whole_gives(tiny: Tiny, tmp_path: Path, precision: Precision) -> None:
    feeds = denoiser_feeds(tiny)
    whole = export(tiny, "transformer", tmp_path / "whole", GraphOptions(PADDED), "fp32")
    parts = GraphOptions(PADDED, tiled_attention=True, slices=SLICES)
    tiled = export(tiny, "transformer", tmp_path / "tiled", parts, precision)
    assert attentions(whole)
    assert not attentions(tiled)
    assert relative(run(tiled, feeds), run(whole, feeds)) < (ROUNDING if precision == "fp32" else TOLERANCES["fp16"])


def test_the_default_video_decides(tiny: Tiny, large: Path) -> None:
    small = TextToVideoPipeline.from_pretrained(tiny.bundle).manifest
    spec = TextToVideoPipeline.from_pretrained(large).manifest
    assert graph_form(small.model, small.defaults) == GraphOptions()
    assert graph_form(spec.model, spec.defaults).tiled_attention
    for manifest, tiled in ((small, False), (spec, True)):
        graphs = [graph for component in manifest.components.values() for graph in component.graphs.values()]
        assert {graph.tiled for graph in graphs} == {tiled}


def test_only_attention_without_a_mask_is_in_tiles(large: Path) -> None:
    found = set()
    for path in sorted(large.rglob("*.onnx")):
        for node in onnx.load(str(path), load_external_data=False).graph.node:
            if node.op_type.endswith("Attention"):
                found.add((node.op_type, len(node.input)))
    assert found == {("MultiHeadAttention", 3), ("Attention", 4)}


def test_either_form_makes_the_same_video_of_any_size(tiny: Tiny, large: Path) -> None:
    def frames(bundle: Path, height: int) -> np.ndarray:
        pipe = TextToVideoPipeline.from_pretrained(bundle)
        size = {"height": height, "width": 32, "num_frames": 5}
        return np.asarray(pipe("a red ball", seed=0, num_inference_steps=2, **size).frames)  # type: ignore[arg-type]

    least = TextToVideoPipeline.from_pretrained(large).manifest.model.steps[0]
    for height in (least, 2 * least):
        assert np.abs(frames(large, height) - frames(tiny.bundle, height)).max() < 0.05 / 255


def test_scores_that_are_not_held_are_not_planned(large: Path) -> None:
    manifest = TextToVideoPipeline.from_pretrained(large).manifest
    plain = to_plain(manifest.components["transformer"].graphs["model"])
    del plain["tiled"]  # a bundle from before it was told
    whole = from_plain(plain, GraphSpec)
    assert not whole.tiled
    denoiser = manifest.components["transformer"]
    held = manifest.with_components({**manifest.components, "transformer": type(denoiser)(
        {"model": whole}, denoiser.precision, denoiser.weights_bytes
    )})  # fmt: skip
    growth = []
    for spec in (manifest, held):
        small, large_one = (
            denoise_stage(spec, spec.model.latent_shape(1, size, size, 9), False)[0].context_bytes
            for size in (512, 1024)
        )
        growth.append(large_one / small)
    assert growth[0] == 4  # as the tokens
    assert growth[1] > 14  # nearly as their square
