"""Plans on the GPU of this machine, where there is one; each test on the card in host memory too, wherever it runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from t2v_rt import BackendError, TextToVideoPipeline, build_engines
from t2v_rt.cli import main
from t2v_rt.engines.bundle.store import Bundle
from t2v_rt.engines.tensorrt.cuda import Cuda
from t2v_rt.runtime.memory.estimates import tile_ways
from tests.conftest import Tiny
from tests.support.card_slot import RTX, Readable, build_plans, card_slot, readable_plans

pytestmark = pytest.mark.slow  # builds plans

SIZE: dict[str, Any] = {"height": 64, "width": 96, "num_frames": 9}
REQUEST: dict[str, Any] = {"seed": 1, **SIZE}
ROOM = 10**9
SAME_VIDEO = 2e-2  # mean difference of frames in [0, 1]: half operands summed in another order
CARDS = ["host", pytest.param("gpu", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module", params=CARDS)
def built(
    request: pytest.FixtureRequest, narrow: Tiny, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Bundle, Readable]:
    """Plans for a card, and what the one in host memory has to know of them."""
    pytest.importorskip("tensorrt_rtx", reason="needs t2v-rt[tensorrt-rtx]")
    pytest.importorskip("cuda.bindings", reason="needs t2v-rt[tensorrt-rtx]")
    if request.param == "host":
        bundle = build_plans(narrow.checkpoint, tmp_path_factory, SIZE)
        return bundle, readable_plans(bundle, narrow.checkpoint, tmp_path_factory, SIZE)
    try:
        target = Cuda(RTX).info.target
    except BackendError as exc:
        pytest.skip(str(exc))
    folder = tmp_path_factory.mktemp("plans") / "bundle"
    return build_engines(narrow.checkpoint, folder, backend=RTX, gpus=target, **SIZE), {}


@pytest.fixture
def plans(built: tuple[Bundle, Readable], monkeypatch: pytest.MonkeyPatch) -> Iterator[Bundle]:
    """A bundle of plans, and the card that they were built for in the machine."""
    bundle, readable = built
    with card_slot(monkeypatch) as slot:
        if readable:
            slot.insert(bundle, readable, ROOM)
        yield bundle


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
