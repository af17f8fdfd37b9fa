"""The TensorRT runtime around its library: real plans' bundles, on a card in host memory (see `host_card`)."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from t2v_rt import EngineError, RequestError, TextToVideoPipeline
from t2v_rt.cli import main
from t2v_rt.engines.bundle.store import Bundle
from t2v_rt.errors import OutOfMemoryError
from t2v_rt.runtime.memory.device_memory import UNPLANNED
from t2v_rt.runtime.memory.estimates import decode_stage
from t2v_rt.runtime.memory.plan import make_plan, together_bytes
from t2v_rt.runtime.noise import Generator
from tests.conftest import Tiny
from tests.support.card_slot import Readable, build_plans, card_slot, readable_plans
from tests.support.host_card import HostLibrary

pytestmark = pytest.mark.slow  # builds plans

HEIGHT, WIDTH, FRAMES = 192, 256, 9
SIZE: dict[str, Any] = {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES}
SEVERAL: dict[str, Any] = {"height": "64,128", "width": 64, "num_frames": "9,5:9"}
STEPS = 4
REQUEST: dict[str, Any] = {"seed": 1, "num_inference_steps": STEPS, **SIZE}
SHAPE = (1, 4, 3, HEIGHT // 8, WIDTH // 8)  # of the latents
ROOM = 10**9
SAME_VIDEO = 2e-2  # mean difference of frames in [0, 1]: half operands, summed in another order over a few steps
Insert = Callable[[int], HostLibrary]


@pytest.fixture(scope="module")
def plans(narrow: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return build_plans(narrow.checkpoint, tmp_path_factory, SIZE)


@pytest.fixture(scope="module")
def several(narrow: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Two sizes, of which one is a range."""
    return build_plans(narrow.checkpoint, tmp_path_factory, SEVERAL)


@pytest.fixture(scope="module")
def readable(plans: Bundle, several: Bundle, narrow: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Readable:
    """The plans that the library can read."""
    bundles = ((plans, SIZE), (several, SEVERAL))
    known = [readable_plans(bundle, narrow.checkpoint, tmp_path_factory, sizes) for bundle, sizes in bundles]
    return known[0] | known[1]


@pytest.fixture
def insert(plans: Bundle, readable: Readable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Insert]:
    """Puts a card of so many bytes into the machine; all of them are given back in the end."""
    with card_slot(monkeypatch, tmp_path) as slot:
        yield lambda capacity: slot.insert(plans, readable, capacity)


def run(plans: Bundle, **settings: object) -> TextToVideoPipeline:
    return TextToVideoPipeline.from_pretrained(plans.folder, trust=True, prompt_cache=False, **settings)  # type: ignore[arg-type]


def test_a_video(plans: Bundle, narrow: Tiny, insert: Insert) -> None:
    insert(ROOM)
    expected = TextToVideoPipeline.from_pretrained(narrow.bundle)("a red ball", **REQUEST)
    for tiles in ("1x1", "2x2", "3x4"):
        with run(plans, vae_tiles=tiles) as pipe:
            found = pipe("a red ball", **REQUEST)
            assert np.abs(found.frames - expected.frames).mean() < SAME_VIDEO
            again = pipe("a red ball", **REQUEST)
            assert np.array_equal(found.frames, again.frames)


def test_several_sizes(several: Bundle, narrow: Tiny, insert: Insert) -> None:
    insert(ROOM)
    reference = TextToVideoPipeline.from_pretrained(narrow.bundle)
    results = []
    with run(several) as pipe:
        for height, frames in ((64, 9), (128, 5), (128, 9), (64, 9), (128, 5)):
            request: dict[str, Any] = {**REQUEST, "height": height, "width": 64, "num_frames": frames}
            results.append(pipe("a red ball", **request).frames)
            assert np.abs(results[-1] - reference("a red ball", **request).frames).mean() < SAME_VIDEO
        with pytest.raises(RequestError, match="not built for 64x64 with 5 frames"):
            pipe("a red ball", **{**REQUEST, "height": 64, "width": 64, "num_frames": 5})
    assert np.array_equal(results[0], results[3])
    assert np.array_equal(results[1], results[4])


def test_parked_caches(plans: Bundle, insert: Insert) -> None:
    insert(ROOM)
    with run(plans, vae_tiles="2x2") as pipe:
        latents = pipe("a red ball", output_type="latent", **REQUEST).frames
        free = np.concatenate(list(pipe.decode(latents)))
        vae = pipe.stages.components.get("vae_decoder")
        parked = np.concatenate(list(pipe.stages.frames(vae, latents, ((2, 2), True))))
    assert np.array_equal(free, parked)


def test_graphs_are_recorded_once(plans: Bundle, insert: Insert) -> None:
    library = insert(ROOM)
    with run(plans) as pipe:
        for _ in range(2):  # the second after the workspace has grown for decoding
            pipe("a red ball", **REQUEST)
        recorded = library.recorded
        assert recorded >= 2
        pipe("a red ball", **REQUEST)
        assert library.recorded == recorded
        assert library.replayed >= 2 * STEPS


def test_kernels_are_compiled_once(plans: Bundle, insert: Insert) -> None:
    library = insert(ROOM)
    with run(plans) as pipe:
        pipe("a red ball", **REQUEST)
    assert library.compiled
    library.compiled.clear()
    with run(plans) as pipe:
        pipe("a red ball", **REQUEST)
    assert not library.compiled


@pytest.mark.parametrize("tiles", [(1, 1), (2, 2), (3, 4)])
@pytest.mark.parametrize("parks", [False, True])
def test_a_decode_takes_what_was_planned(plans: Bundle, insert: Insert, tiles: tuple[int, int], parks: bool) -> None:
    library = insert(ROOM)
    with run(plans) as pipe:
        vae = pipe.stages.components.get("vae_decoder")  # which tests the engines as well
        latents = Generator(0).randn(SHAPE)
        gc.collect()
        library.cuda.peak = 0
        for _ in pipe.stages.frames(vae, latents, (tiles, parks)):
            pass
        planned, _ = decode_stage(vae.spec, *SHAPE[-2:], tiles, parks and tiles != (1, 1), 0)
        assert library.cuda.peak == planned.total_bytes


def test_the_card_holds_what_was_planned(plans: Bundle, insert: Insert) -> None:
    library = insert(ROOM)
    with run(plans) as pipe:  # tests the engines
        pipe("a red ball", **REQUEST)
        plan = make_plan(pipe.manifest, SHAPE)
    least = plan.least_bytes
    for budget, most in ((None, plan.peak_bytes), (least, least)):
        with run(plans, vram_budget=budget) as pipe:
            library.cuda.peak = 0
            pipe("a red ball", **REQUEST)
            assert library.cuda.peak <= most - plan.reserve_bytes
            assert library.cuda.peak > 0.9 * (most - plan.reserve_bytes)
    assert plan.resident
    assert least < plan.peak_bytes


def test_what_stays_loaded_and_what_does_not_take_what_was_planned(plans: Bundle, insert: Insert) -> None:
    library = insert(ROOM)
    prompts = ["green ball " * 300, "red ball " * 300]  # as long as the plan has to reckon with
    with run(plans) as pipe:  # tests the engines
        expected = pipe(prompts[1], **REQUEST).frames
        *choices, last = make_plan(pipe.manifest, SHAPE).choices()
    assert last.peak_bytes == choices[-1].peak_bytes  # in decoding, beside which the VAE alone costs nothing
    for plan in choices:
        with run(plans, vram_budget=plan.peak_bytes) as pipe:
            gc.collect()
            library.cuda.peak = 0
            for prompt in prompts:  # the second beside what the first has left loaded
                found = pipe(prompt, **REQUEST).frames
                assert set(pipe.stages.components.loaded) == plan.kept
            assert np.array_equal(found, expected)
            assert 0.98 < library.cuda.peak / (plan.peak_bytes - plan.reserve_bytes) <= 1
    assert [len(plan.kept) for plan in choices] == [3, 2, 1]


def test_pipelines_on_one_card_take_turns_with_its_memory(plans: Bundle, insert: Insert) -> None:
    library = insert(ROOM)
    with run(plans) as pipe:  # tests the engines
        expected = pipe("a red ball", **REQUEST).frames
        plan = make_plan(pipe.manifest, SHAPE)
    del pipe
    gc.collect()
    for part in (plan.peak_bytes - plan.reserve_bytes, plan.least_bytes - plan.reserve_bytes):
        library.cuda.capacity = UNPLANNED + part  # room for what one takes; both keep to what is free
        library.cuda.peak = 0
        with run(plans) as one, run(plans) as other:
            for i, prompt in enumerate(("a red ball", "a ball", "a red ball", "a cat", "a red ball")):
                found = (one, other)[i % 2](prompt, **REQUEST).frames
                if prompt == "a red ball":
                    assert np.array_equal(found, expected)
            assert one.plan(one.stream("a red ball", **REQUEST).request).budget_bytes == part
            streams = [pipe.stream("a red ball", **REQUEST) for pipe in (one, other)]
            next(streams[0])
            with pytest.raises(RequestError, match="1 that this thread has begun"):
                next(streams[1])
            streams.clear()
        assert library.cuda.peak <= part
        del one, other
        gc.collect()


def test_two_streams_take_what_was_planned_for_both(plans: Bundle, insert: Insert) -> None:
    library = insert(ROOM)
    with run(plans) as pipe:  # tests the engines
        expected = pipe("a red ball", output_type="uint8", **REQUEST).frames[0]
        plan = make_plan(pipe.manifest, SHAPE)
    for both in ([plan] * 2, [plan, plan.releasing()]):
        with run(plans, vram_budget=together_bytes(both)) as pipe:
            library.cuda.peak = 0
            streams = [pipe.stream("a red ball", output_type="uint8", **REQUEST) for _ in range(2)]
            videos = [np.stack(frames) for frames in zip(*zip(*streams, strict=True), strict=True)]
            assert all(np.array_equal(video, expected) for video in videos)
            assert library.cuda.peak <= together_bytes(both) - plan.reserve_bytes
            assert library.cuda.peak > (together_bytes(both) - plan.reserve_bytes) / 2
            streams.clear()
    with run(plans, vram_budget=together_bytes([plan, plan.releasing()]) - 1) as pipe:
        streams = [pipe.stream("a red ball", **REQUEST) for _ in range(2)]
        next(streams[0])
        with pytest.raises(RequestError, match="1 that this thread has begun"):
            next(streams[1])
        streams.clear()


def test_out_of_memory(plans: Bundle, insert: Insert, caplog: pytest.LogCaptureFixture) -> None:
    library = insert(ROOM)
    latents = Generator(0).randn(SHAPE)
    with run(plans, vae_tiles="1x1") as pipe:
        expected = np.concatenate(list(pipe.decode(latents)))
        pipe.stages.components.release("vae_decoder")
        gc.collect()
        library.cuda.peak = 0
        list(pipe.decode(latents))
        whole = library.cuda.peak
    with run(plans, vram_budget=ROOM) as pipe, caplog.at_level(logging.WARNING):  # more than there is
        library.cuda.capacity = whole - 1
        found = np.concatenate(list(pipe.decode(latents)))
        assert "out of memory" in caplog.text
        assert caplog.text.count("decoding again in 2x2 tiles") == caplog.text.count("decoding again") == 1
        assert np.abs(found - expected).max() < SAME_VIDEO
        library.cuda.capacity = whole // 100
        pipe.stages.components.release("vae_decoder")
        with pytest.raises(OutOfMemoryError, match=r"out of memory|OutOfMemory") as caught:
            list(pipe.decode(latents))
        del caught  # and with it what the failed call had allocated


def test_what_the_library_refuses_is_told(plans: Bundle, insert: Insert, monkeypatch: pytest.MonkeyPatch) -> None:
    insert(ROOM)
    with run(plans) as pipe:
        engine = pipe.stages.components.get("transformer").engines["model"]
        sizes = {"batch": 1, "frames": SHAPE[2], "height": SHAPE[3], "width": SHAPE[4]}
        feeds = {spec.name: np.zeros(spec.resolve(sizes), spec.numpy_dtype) for spec in engine.inputs}
        monkeypatch.setattr("t2v_rt.engines.tensorrt.engine.choose_profile", lambda *_: 5)
        monkeypatch.setattr("tests.support.host_card.HostEngine.get_device_memory_size_for_profile_v2", lambda *_: 1)
        with pytest.raises(EngineError, match="transformer: tensorrt-rtx failed: there is no profile 5"):
            engine.infer(feeds)


def test_the_self_test(plans: Bundle, insert: Insert, capsys: pytest.CaptureFixture[str]) -> None:
    insert(ROOM)
    assert main(["verify", str(plans.folder), "--trust"]) == 0
    assert capsys.readouterr().out.count("passed") == 3
