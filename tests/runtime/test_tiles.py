"""Tiles of the VAE decoder's tail: equal to the whole, wherever the cuts fall."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from t2v_rt import RequestError, TextToVideoPipeline
from t2v_rt.engines.bundle.manifest import GRIDS, TileSpec
from t2v_rt.engines.contract import EngineState, Feeds
from t2v_rt.engines.onnxruntime.backend import OrtEngine
from t2v_rt.errors import OutOfMemoryError
from t2v_rt.runtime.decode.tiles import make_tiles, parse_grid, spans
from t2v_rt.runtime.memory.plan import make_plan
from t2v_rt.runtime.noise import Generator
from tests.conftest import Tiny

TOLERANCE = 1e-5  # a convolution may sum a tile's pixels in another order than the whole's
HEIGHT, WIDTH = 11, 13  # of the latents: 44 and 52 features, which the grids below do not divide evenly
SPEC = TileSpec(scale=4, upscale=2, halo=7)


def decoded(pipe: TextToVideoPipeline, grid: tuple[int, int]) -> np.ndarray:
    latents = Generator(1).randn((1, pipe.manifest.model.latents.channels, 3, HEIGHT, WIDTH))
    return np.concatenate(list(pipe.stages.frames(pipe.stages.components.get("vae_decoder"), latents, (grid, False))))


@pytest.mark.parametrize("grid", [(1, 2), (2, 1), (2, 2), (3, 2), (4, 3)])
def test_tiles_equal_the_whole(tiny: Tiny, grid: tuple[int, int]) -> None:
    pipe = TextToVideoPipeline.from_pretrained(tiny.bundle)
    assert np.abs(decoded(pipe, grid) - decoded(pipe, (1, 1))).max() <= TOLERANCE


def test_the_halo_is_as_wide_as_what_the_tail_sees(narrow: Tiny) -> None:
    """One feature less on each side, and the cuts show."""
    pipe = TextToVideoPipeline.from_pretrained(narrow.bundle)
    whole = decoded(pipe, (1, 1))
    component = pipe.stages.components.get("vae_decoder")
    spec = component.spec.tiles
    assert spec is not None
    component.spec = type(component.spec)(
        component.spec.graphs,
        component.spec.precision,
        component.spec.weights_bytes,
        TileSpec(spec.scale, spec.upscale, spec.halo - 1),
    )
    assert np.abs(decoded(pipe, (2, 2)) - whole).max() > TOLERANCE


@pytest.mark.parametrize("length", [1, 5, 44, 240])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_spans_cover_an_axis_once_and_see_enough(length: int, count: int) -> None:
    if count > length:
        with pytest.raises(RequestError, match=f"{count} tiles were asked for along an axis of {length}"):
            spans(length, count, SPEC)
        return
    parts = spans(length, count, SPEC)
    assert len({part.fed.stop - part.fed.start for part in parts}) == 1
    covered = np.zeros(length * SPEC.upscale, int)
    for part in parts:
        covered[part.target] += 1
        assert part.kept.stop - part.kept.start == part.target.stop - part.target.start
        assert part.fed.start * SPEC.upscale + part.kept.start == part.target.start
        assert part.fed.start in (0, *range(part.target.start // SPEC.upscale - SPEC.halo + 1))
        assert part.fed.stop == length or part.fed.stop * SPEC.upscale >= part.target.stop + SPEC.halo * SPEC.upscale
    assert np.all(covered == 1)


def test_tiles_come_row_by_row() -> None:
    tiles = make_tiles(44, 52, (2, 3), SPEC)
    assert [(tile.rows.target.start, tile.columns.target.start) for tile in tiles] == [
        (0, 0), (0, 34), (0, 68), (44, 0), (44, 34), (44, 68),
    ]  # fmt: skip


def test_a_budget_chooses_the_coarsest_grid_that_fits(narrow: Tiny) -> None:
    manifest = TextToVideoPipeline.from_pretrained(narrow.bundle).manifest
    shape = (1, manifest.model.latents.channels, 3, 60, 104)
    needs = {grid: make_plan(manifest, shape, grid=grid).stages[-1].total_bytes for grid in GRIDS}
    assert needs[1, 1] > needs[1, 2] > needs[2, 2]
    assert make_plan(manifest, shape).grid == (1, 1)
    assert make_plan(manifest, shape, budget=needs[2, 2]).grid == (2, 2)
    assert make_plan(manifest, shape, budget=1).grid == min(needs, key=lambda grid: needs[grid])


def test_a_whole_video_in_tiles_is_the_same_video(narrow: Tiny) -> None:
    whole = TextToVideoPipeline.from_pretrained(narrow.bundle)("a red ball", seed=1)
    tiled = TextToVideoPipeline.from_pretrained(narrow.bundle, vae_tiles="2x3")("a red ball", seed=1)
    assert np.abs(whole.frames - tiled.frames).max() <= TOLERANCE


def test_out_of_memory_goes_on_in_smaller_tiles(
    narrow: Tiny, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pipe = TextToVideoPipeline.from_pretrained(narrow.bundle)
    whole = decoded(pipe, (1, 1))
    calls, infer = 0, OrtEngine.infer

    def fail_on_large_tiles(
        engine: OrtEngine, feeds: Feeds, state: EngineState | None = None, keep: Sequence[str] = ()
    ) -> dict[str, NDArray[Any]]:
        nonlocal calls
        calls += engine.name.endswith("tail")
        if calls > 2 and state is not None and engine.name.endswith("tail") and state.nbytes > room:
            raise OutOfMemoryError("no room")  # in the second latent frame: the first is out already
        return infer(engine, feeds, state, keep=keep)

    vae = pipe.stages.components.get("vae_decoder")
    spec = vae.spec.tiles
    assert spec is not None
    fed = (spec.fed_length(length * spec.scale, 2) for length in (HEIGHT, WIDTH))
    room = vae.new_state(
        **dict(zip(("height", "width"), fed, strict=True)), role_prefix="tail"
    ).nbytes  # four tiles fit
    monkeypatch.setattr(OrtEngine, "infer", fail_on_large_tiles)
    latents = Generator(1).randn((1, pipe.manifest.model.latents.channels, 3, HEIGHT, WIDTH))
    chunks = list(pipe.decode(latents))
    assert [len(chunk) for chunk in chunks] == [1, 4, 4]
    assert np.abs(np.concatenate(chunks) - whole).max() <= TOLERANCE
    assert [record.getMessage() for record in caplog.records] == [
        "no room; decoding again in 1x2 tiles", "no room; decoding again in 2x2 tiles"
    ]  # fmt: skip
    with pytest.raises(OutOfMemoryError, match="no room"):
        list(pipe.stages.decode(latents, make_plan(pipe.manifest, latents.shape, grid=(1, 1))))


def test_more_tiles_than_features_are_refused(narrow: Tiny) -> None:
    pipe = TextToVideoPipeline.from_pretrained(narrow.bundle, vae_tiles=(1, 99))
    with pytest.raises(RequestError, match="99 tiles were asked for along an axis of 12 features"):
        pipe("a red ball", seed=1)


def test_grids_are_read() -> None:
    assert parse_grid("2x3") == parse_grid((2, 3)) == parse_grid([2, 3]) == (2, 3)


@pytest.mark.parametrize("text", ["2", "0x1", "2x3x4", "axb", (0, 1), (1, True), 3, None])
def test_bad_grids(text: object) -> None:
    with pytest.raises(RequestError, match="expected rows x columns"):
        parse_grid(text)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(1, 5, 3, 4, 6), (2, 4, 3, 4, 6), (1, 4, 0, 4, 6)])
def test_latents_of_another_model_are_refused(narrow: Tiny, shape: tuple[int, ...]) -> None:
    pipe = TextToVideoPipeline.from_pretrained(narrow.bundle)
    with pytest.raises(RequestError, match=r"expected \(1, 4, frames, …\): those of one video of this model"):
        next(pipe.decode(np.zeros(shape, np.float32)))
