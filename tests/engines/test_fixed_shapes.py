"""The graphs that plans are built from, run by ONNX Runtime: what a pipeline and a self-test do with fixed shapes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from t2v_rt import EngineError, RequestError, TextToVideoPipeline, build_engines
from t2v_rt.commands.verify import verify
from t2v_rt.engines.backends import get_backend
from t2v_rt.engines.bundle.profiles import PlanProfile, PlanSpec, parse_profiles
from t2v_rt.engines.bundle.store import Bundle, open_bundle, write_manifest
from t2v_rt.export.checkpoint import open_checkpoint
from t2v_rt.export.components import export_component
from t2v_rt.export.wan.family import FAMILY
from t2v_rt.runtime import self_test
from t2v_rt.runtime.memory.advice import advise, largest_fitting
from t2v_rt.runtime.memory.plan import make_plan
from t2v_rt.system.outputs import MANIFEST_NAME
from tests.conftest import Tiny

HEIGHT, WIDTH, FRAMES = 64, 96, 5
REQUEST = {"seed": 1, "height": HEIGHT, "width": WIDTH, "num_frames": FRAMES, "num_inference_steps": 4}
SAME_VIDEO = 1e-2  # mean difference of frames in [0, 1]: half operands, summed in another order over a few steps


@pytest.fixture(scope="module")
def half(narrow: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Half precision, of any size."""
    return build_engines(narrow.checkpoint, tmp_path_factory.mktemp("half") / "bundle", precision="fp16")


@pytest.fixture(scope="module")
def fixed(narrow: Tiny, half: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same as a bundle of plans for one size has it, but with the graphs in the plans' places."""
    folder = tmp_path_factory.mktemp("fixed")
    checkpoint = open_checkpoint(narrow.checkpoint)
    configs, model = FAMILY.read_configs(checkpoint.configs), half.manifest.model
    profiles = parse_profiles(HEIGHT, WIDTH, FRAMES, (0, 0, 0))
    ranges = configs.ranges(profiles)
    forms = configs.graph_options(ranges, float32_matmul=True)
    components = dict(half.manifest.components)
    for name in ("transformer", "vae_decoder"):
        spec = export_component(name, checkpoint, configs, folder, "fp16", forms[name])
        graphs = {
            role: replace(graph, plan=PlanSpec(tuple(PlanProfile(sizes, 1) for sizes in ranges[name][role]), 1))
            for role, graph in spec.graphs.items()
        }
        components[name] = replace(spec, graphs=graphs, tiles=configs.tiles(name, profiles))
        reference = narrow.bundle  # at fp32
        plain = open_bundle(reference).manifest.components[name]
        with get_backend("onnxruntime").load(reference, name, plain) as loaded:
            calls = self_test.make_calls(name, loaded, model, components[name])
            self_test.record(name, {made.call.label: made.result for made in calls}, folder)
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(half.folder / part, folder / part)
    shutil.copy(half.folder / self_test.FOLDER / "text_encoder.npz", folder / self_test.FOLDER)
    write_manifest(folder, replace(half.manifest, components=components, profiles=profiles, files={}), {})
    return open_bundle(folder)


def test_tiles_that_the_engines_were_built_for(fixed: Bundle) -> None:
    tiles = fixed.manifest.components["vae_decoder"].tiles
    assert tiles is not None
    assert tiles.grids == ((1, 1), (2, 2), (3, 4))
    shape = (1, fixed.manifest.model.latents.channels, 2, HEIGHT // 8, WIDTH // 8)
    with pytest.raises(RequestError, match="vae_tiles is 2x3; the engines were built for 1x1, 2x2, 3x4"):
        make_plan(fixed.manifest, shape, grid=(2, 3))


def test_a_card_parks_what_does_not_fit(fixed: Bundle) -> None:
    card = replace(fixed.manifest, backend="tensorrt-rtx")
    shape = (1, card.model.latents.channels, 2, HEIGHT // 8, WIDTH // 8)
    free = make_plan(card, shape)
    assert (free.grid, free.parked_bytes) == ((1, 1), 0)
    tight = make_plan(card, shape, budget=1)
    assert tight.grid != (1, 1)
    assert tight.parked_bytes > tight.stages[-1].state_bytes
    assert tight.stages[-1].total_bytes < free.stages[-1].total_bytes


def test_sizes_that_engines_were_not_built_for_are_estimated(fixed: Bundle) -> None:
    told = {"transformer": 80_000_000, "vae_decoder": 4_000_000}
    components = dict(fixed.manifest.components)
    for name, context in told.items():
        spec = components[name]
        graphs = {
            role: replace(graph, plan=PlanSpec(tuple(PlanProfile(p.sizes, context) for p in graph.plan.profiles), 1))
            for role, graph in spec.graphs.items()
            if graph.plan is not None
        }
        components[name] = replace(spec, graphs=graphs)
    card = replace(fixed.manifest, backend="tensorrt-rtx", components=components)
    at = make_plan(card, card.model.latent_shape(1, HEIGHT, WIDTH, FRAMES))
    below = make_plan(card, card.model.latent_shape(1, HEIGHT, WIDTH, 1))
    assert not at.estimated
    assert at.stages[1].context_bytes == told["transformer"]
    assert below.estimated
    assert below.stages[1].context_bytes == told["transformer"] // 2  # one latent frame of two
    budget = at.peak_bytes - told["transformer"] // 4
    best = largest_fitting(card, HEIGHT, WIDTH, FRAMES, budget)
    assert best == {"height": HEIGHT, "width": WIDTH, "num_frames": 1}
    assert advise(card, best) == "96x64 with 1 frames would fit, by engines built for it (an estimate)"


def test_the_same_video(half: Bundle, fixed: Bundle) -> None:
    expected = TextToVideoPipeline.from_pretrained(half.folder)("a red ball", **REQUEST)  # type: ignore[arg-type]
    found = TextToVideoPipeline.from_pretrained(fixed.folder)("a red ball", **REQUEST)  # type: ignore[arg-type]
    assert np.abs(found.frames - expected.frames).mean() < SAME_VIDEO
    tiled = TextToVideoPipeline.from_pretrained(fixed.folder, vae_tiles="3x4")("a red ball", **REQUEST)  # type: ignore[arg-type]
    assert np.abs(found.frames - tiled.frames).mean() < SAME_VIDEO


def test_batches_in_calls_of_one(fixed: Bundle) -> None:
    pipe = TextToVideoPipeline.from_pretrained(fixed.folder)
    both = pipe(["a red ball", "a blue box"], guidance_batch=True, **REQUEST | {"seed": [1, 2]})  # type: ignore[arg-type]
    one = pipe("a blue box", guidance_batch=False, **REQUEST | {"seed": 2})  # type: ignore[arg-type]
    assert np.array_equal(both.frames[1], one.frames[0])


def test_the_self_test_tells_a_right_engine_from_a_wrong_one(fixed: Bundle, tmp_path: Path) -> None:
    report = verify(fixed.folder)
    assert report["passed"]
    assert all(0 < item["error"] < 1e-2 for item in report["components"].values())
    folder = tmp_path / "wrong"
    shutil.copytree(fixed.folder, folder)
    for path in folder.rglob("*.data"):
        values = np.fromfile(path, np.float16)  # what is float32 changes too, by another factor
        ordinary = np.isfinite(values) & (np.abs(values) < 2) & (np.abs(values) > 1e-3)
        values[ordinary] *= np.float16(1.1)
        values.tofile(path)
    (folder / MANIFEST_NAME).unlink()
    write_manifest(folder, replace(fixed.manifest, files={}), {})
    wrong = verify(folder)["components"]
    assert not any(item["passed"] for item in wrong.values()), json.dumps(wrong)


def test_other_sizes_are_refused(fixed: Bundle) -> None:
    pipe = TextToVideoPipeline.from_pretrained(fixed.folder)
    with pytest.raises(RequestError, match="the nearest video they make is 96x64 with 5 frames"):
        pipe("a red ball", seed=1, height=64, width=64, num_frames=5)
    embeds = np.zeros((1, 4, fixed.manifest.model.text.dim), np.float32)
    with pytest.raises(
        EngineError, match=r"encoder_hidden_states' is float32 \[1, 4, 24\]; expected float32 \[batch, 512"
    ):
        pipe(prompt_embeds=embeds, guidance_scale=1, **REQUEST)  # type: ignore[arg-type]
