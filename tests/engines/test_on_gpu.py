"""Plans on the GPU of this machine, where there is one; each test on the card in host memory too, wherever it runs."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from t2v_rt import BackendError, TextToVideoPipeline, build_engines
from t2v_rt.cli import main
from t2v_rt.engines.bundle.profiles import PlanSpec
from t2v_rt.engines.bundle.store import Bundle
from t2v_rt.engines.tensorrt.cuda import Cuda
from t2v_rt.runtime.memory.estimates import tile_ways
from tests.conftest import Tiny
from tests.support.host_card import HostLibrary, export_graphs, plans_by_hash
from tests.support.host_cuda import HostCuda

pytestmark = pytest.mark.slow  # builds plans

RTX = "tensorrt-rtx"
SIZE: dict[str, Any] = {"height": 64, "width": 96, "num_frames": 9}
REQUEST: dict[str, Any] = {"seed": 1, **SIZE}
ROOM = 10**9
SAME_VIDEO = 2e-2  # mean difference of frames in [0, 1]: half operands summed in another order
CARDS = ["host", pytest.param("gpu", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module", params=CARDS)
def built(
    request: pytest.FixtureRequest, narrow: Tiny, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Bundle, dict[str, tuple[Path, PlanSpec]]]:
    """Plans for a card, and what the one in host memory has to know of them."""
    pytest.importorskip("tensorrt_rtx", reason="needs t2v-rt[tensorrt-rtx]")
    pytest.importorskip("cuda.bindings", reason="needs t2v-rt[tensorrt-rtx]")
    target, graphs = "sm86", None
    if request.param == "gpu":
        try:
            target = Cuda(RTX).info.target
        except BackendError as exc:
            pytest.skip(str(exc))
    else:
        graphs = export_graphs(narrow.checkpoint, tuple(SIZE.values()), tmp_path_factory.mktemp("graphs"))
    folder = tmp_path_factory.mktemp("plans") / "bundle"
    bundle = build_engines(narrow.checkpoint, folder, backend=RTX, gpus=target, **SIZE)
    return bundle, {} if graphs is None else plans_by_hash(bundle, graphs)


@pytest.fixture
def plans(built: tuple[Bundle, dict[str, tuple[Path, PlanSpec]]], monkeypatch: pytest.MonkeyPatch) -> Iterator[Bundle]:
    """A bundle of plans, and the card that they were built for in the machine."""
    bundle, readable = built
    cuda = HostCuda(ROOM)
    if readable:
        monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda)
        library = HostLibrary(cuda, bundle.manifest.builder[RTX], readable)
        monkeypatch.setitem(sys.modules, "tensorrt_rtx", library)
    yield bundle
    gc.collect()
    assert cuda.used("d") == cuda.used("h") == 0


@pytest.mark.parametrize("tiles", ["1x1", "2x2", "3x4"])
def test_a_video_is_that_of_the_graphs_and_comes_again(plans: Bundle, narrow: Tiny, tiles: str) -> None:
    settings = {**REQUEST, "num_inference_steps": 4}
    expected = TextToVideoPipeline.from_pretrained(narrow.bundle)("a red ball", **settings)
    with TextToVideoPipeline.from_pretrained(plans.folder, vae_tiles=tiles) as pipe:
        found = pipe("a red ball", **settings)
        assert np.abs(found.frames - expected.frames).mean() < SAME_VIDEO
        again = pipe("a red ball", **settings)
        assert np.array_equal(found.frames, again.frames)


def test_parked_states_decode_the_same_frames(plans: Bundle) -> None:
    with TextToVideoPipeline.from_pretrained(plans.folder, vae_tiles="2x2") as pipe:
        latents = pipe("a red ball", output_type="latent", num_inference_steps=2, **REQUEST).frames
        free = np.concatenate(list(pipe.decode(latents)))
        ways = tile_ways(pipe.manifest, (2, 2))
        assert ways[-1] == ((2, 2), True)
        vae = pipe.stages.components.get("vae_decoder")
        parked = np.concatenate(list(pipe.stages.frames(vae, latents, ways[-1])))
    assert np.array_equal(free, parked)


def test_a_bundle_is_verified(plans: Bundle) -> None:
    assert main(["verify", str(plans.folder)]) == 0
