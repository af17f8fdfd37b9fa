"""What crosses the bus and what is taken of a card's memory in a run, counted on the card in host memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from t2v_rt import TextToVideoPipeline
from t2v_rt.engines.bundle.store import Bundle
from t2v_rt.engines.tensorrt.engine import TensorRTEngine
from t2v_rt.runtime.decode.tiles import make_tiles
from t2v_rt.runtime.noise import Generator
from tests.conftest import Tiny
from tests.support.card_slot import Readable, build_plans, card_slot, readable_plans
from tests.support.host_card import HostContext, HostLibrary

pytestmark = pytest.mark.slow  # builds plans

HEIGHT, WIDTH, FRAMES = 192, 256, 9
SIZE: dict[str, Any] = {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES}
RANGE: dict[str, Any] = {"height": 64, "width": 64, "num_frames": "5:9"}
REQUEST: dict[str, Any] = {"seed": 1, "num_inference_steps": 4, **SIZE}
SHAPE = (1, 4, 3, HEIGHT // 8, WIDTH // 8)  # of the latents
Insert = Callable[[Bundle], HostLibrary]


@pytest.fixture(scope="module")
def fixed(narrow: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return build_plans(narrow.checkpoint, tmp_path_factory, SIZE)


@pytest.fixture(scope="module")
def ranged(narrow: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return build_plans(narrow.checkpoint, tmp_path_factory, RANGE)


@pytest.fixture(scope="module")
def readable(narrow: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Bundle], Readable]:
    """What is known of a bundle's plans, made where it is needed first."""
    known: dict[Path, Readable] = {}

    def read(bundle: Bundle) -> Readable:
        if bundle.folder not in known:
            (profile,) = bundle.manifest.profiles
            sizes = {name: f"{size.min}:{size.max}" for name, size in vars(profile).items()}
            known[bundle.folder] = readable_plans(bundle, narrow.checkpoint, tmp_path_factory, sizes)
        return known[bundle.folder]

    return read


@pytest.fixture
def insert(readable: Callable[[Bundle], Readable], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Insert]:
    """Puts a card into the machine that can run a bundle's plans; it gets all of its memory back in the end."""
    with card_slot(monkeypatch, tmp_path) as slot:
        yield lambda bundle: slot.insert(bundle, readable(bundle), 10**9)


def open_pipe(bundle: Bundle, **settings: Any) -> TextToVideoPipeline:
    return TextToVideoPipeline.from_pretrained(bundle.folder, trust=True, prompt_cache=False, **settings)


@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (3, 4)])
def test_features_never_cross_the_bus(fixed: Bundle, insert: Insert, grid: tuple[int, int]) -> None:
    library = insert(fixed)
    with open_pipe(fixed) as pipe:
        vae = pipe.stages.components.get("vae_decoder")
        assert vae.spec.tiles is not None
        height, width = (size * vae.spec.tiles.scale for size in SHAPE[-2:])
        tiles = make_tiles(height, width, grid, vae.spec.tiles)
        rows, columns = (part.fed.stop - part.fed.start for part in (tiles[0].rows, tiles[0].columns))
        (latents,), (features,), (frames,) = (vae["head_first"].inputs, vae["tail"].inputs, vae["tail"].outputs)
        library.cuda.moved.clear()
        decoded = sum(len(part) for part in pipe.stages.frames(vae, Generator(0).randn(SHAPE), (grid, False)))
    assert decoded == FRAMES
    tile_sizes, calls = {"height": rows, "width": columns}, FRAMES * len(tiles)
    whole_sizes = {"height": SHAPE[-2], "width": SHAPE[-1]}
    moved = {"hd": latents.nbytes(whole_sizes) * SHAPE[2], "dh": frames.nbytes(tile_sizes) * calls}
    if grid != (1, 1):
        moved["dd"] = features.nbytes(tile_sizes) * calls
    assert library.cuda.moved == moved


@pytest.mark.parametrize("tiles", ["1x1", "2x2"])
@pytest.mark.parametrize("prompts", [["a red ball"], ["a red ball", "two red balls"]])
def test_a_second_call_takes_no_device_memory(fixed: Bundle, insert: Insert, prompts: list[str], tiles: str) -> None:
    cuda = insert(fixed).cuda
    with open_pipe(fixed, vae_tiles=tiles) as pipe:
        first = pipe(prompts, **REQUEST)
        taken, used = cuda.taken, cuda.used()
        second = pipe(prompts, **REQUEST)
        assert (cuda.taken, cuda.used()) == (taken, used)
        other = pipe([" ".join(reversed(prompt.split())) for prompt in prompts], **REQUEST)
        assert (cuda.taken, cuda.used()) == (taken, used)
    assert np.array_equal(first.frames, second.frames)
    assert not np.array_equal(first.frames, other.frames)


def test_plans_of_one_prediction_make_no_batch(fixed: Bundle, insert: Insert) -> None:
    """Where one is asked for, its predictions are made one after another, of the same prompts' copies."""
    cuda = insert(fixed).cuda
    with open_pipe(fixed) as pipe:
        one, other = (pipe("a red ball", guidance_batch=batch, **REQUEST).frames for batch in (False, True))
        taken = cuda.taken
        third = pipe("a red ball", guidance_batch=True, guidance_interval=(0.3, 1.0), **REQUEST).frames
    assert cuda.taken == taken
    assert np.array_equal(one, other)
    assert not np.array_equal(one, third)


def test_later_steps_take_no_device_memory(fixed: Bundle, insert: Insert) -> None:
    """Also where the prompt is another at each step, and each prompt's own is uploaded once."""
    cuda, taken, sent = insert(fixed).cuda, [], []

    def look(pipe: Any, step: int, t: float, tensors: dict[str, Any]) -> dict[str, Any]:
        taken.append(cuda.taken)
        sent.append(cuda.moved["hd"])
        return {"prompt_embeds": tensors["prompt_embeds"] * np.float32(0.9)} if step >= 2 else {}

    with open_pipe(fixed) as pipe:
        names = ["prompt_embeds"]
        pipe(
            ["a ball"] * 2,
            callback_on_step_end=look,
            callback_on_step_end_tensor_inputs=names,
            **{**REQUEST, "num_inference_steps": 6},
        )
        (text,) = (spec for spec in pipe.stages.components.get("transformer")["model"].inputs if len(spec.shape) == 3)
    steps = np.diff(sent)
    embeds = 2 * text.nbytes({"batch": 1})
    assert len(set(taken[1:])) == 1
    assert list(steps - steps[0]) == [0, 0, *[2 * embeds] * 3]  # both prompts of both predictions are new from then on


def test_only_small_engines_are_recorded(fixed: Bundle, insert: Insert, monkeypatch: pytest.MonkeyPatch) -> None:
    """A context whose graphs hold no addresses is made once, wherever the workspace moves."""
    made: list[str] = []
    init = HostContext.__init__

    def count(self: HostContext, engine: Any, config: Any) -> None:
        made.append(engine.graph.name)
        init(self, engine, config)

    monkeypatch.setattr(HostContext, "__init__", count)
    videos, counts = [], []
    for most in (0, 256_000):
        monkeypatch.setattr("t2v_rt.engines.tensorrt.engine.GRAPHS_UP_TO", most)
        library = insert(fixed)
        with open_pipe(fixed) as pipe:
            for _ in range(2):
                videos.append(pipe("a red ball", **REQUEST).frames)
            engine = pipe.stages.components.get("transformer")["model"]
            assert isinstance(engine, TensorRTEngine)
        assert (library.recorded > 0) == (library.replayed > 0) == (most > 0)
        counts.append(made.count(engine._engine.graph.name if engine._engine else "model.onnx"))
        made.clear()
    assert counts == [1, 2]
    assert all(np.array_equal(video, videos[0]) for video in videos)


def test_a_range_works_in_what_a_call_takes(ranged: Bundle, insert: Insert) -> None:
    library = insert(ranged)
    component = ranged.manifest.components["transformer"]
    plan = component.graphs["model"].plan
    assert plan is not None
    (told,) = plan.profiles
    with open_pipe(ranged) as pipe:
        engine = pipe.stages.components.get("transformer")["model"]
        for frames in (2, 3):  # of latents
            sizes = {"batch": 1, "frames": frames, "height": 8, "width": 8}
            feeds = {spec.name: np.zeros(spec.resolve(sizes), spec.numpy_dtype) for spec in engine.inputs}
            pipe.stages.components.get("transformer").trim()
            before = library.cuda.used()
            engine.infer(feeds)
            crossing = sum(spec.nbytes(sizes) for spec in (*engine.inputs, *engine.outputs))
            worked_in = library.cuda.used() - before - crossing
            assert 0 <= worked_in - told.context_bytes * frames // 3 < 256
