"""Previews and self-tests of plans, on a card in host memory (see `host_card`): thumbnails, memory, what goes wrong."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from t2v_rt import TextToVideoPipeline
from t2v_rt.cli import main
from t2v_rt.commands.plan import plan as plan_command
from t2v_rt.commands.verify import verify
from t2v_rt.engines.bundle.model import thumbnail_size
from t2v_rt.engines.bundle.store import Bundle
from t2v_rt.errors import PreviewError
from t2v_rt.runtime.memory.plan import make_plan, to_json
from t2v_rt.runtime.options import CallOptions
from t2v_rt.runtime.request import make_request
from tests.conftest import Tiny
from tests.support.card_slot import Readable, build_plans, card_slot, readable_plans
from tests.support.host_card import HostLibrary

pytestmark = pytest.mark.slow  # builds plans

SIZE: dict[str, Any] = {"height": 192, "width": 256, "num_frames": 9}
STEPS = 3
REQUEST: dict[str, Any] = {"seed": 1, "num_inference_steps": STEPS, **SIZE}
SHAPE = (1, 4, 3, 24, 32)  # of the latents
ROOM = 10**9
SAME_IMAGE = 3.0  # mean difference of pixels in 0 … 255: half operands against float32
Insert = Callable[..., HostLibrary]
Images = list[NDArray[np.uint8]]


@pytest.fixture(scope="module")
def plans(narrow: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return build_plans(narrow.checkpoint, tmp_path_factory, SIZE)


@pytest.fixture(scope="module")
def readable(plans: Bundle, narrow: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Readable:
    """The plans that the library can read."""
    return readable_plans(plans, narrow.checkpoint, tmp_path_factory, SIZE)


@pytest.fixture
def insert(plans: Bundle, readable: Readable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Insert]:
    """Puts a card of so many bytes into the machine, with nothing tested on it yet; all of them are given back."""
    with card_slot(monkeypatch, tmp_path) as slot:
        yield lambda capacity=ROOM: slot.insert(plans, readable, capacity)


def run(plans: Bundle, **settings: Any) -> TextToVideoPipeline:
    return TextToVideoPipeline.from_pretrained(plans.folder, trust=True, prompt_cache=False, **settings)


def watcher(images: Images, latents: list[NDArray[np.float32]]) -> Callable[..., None]:
    """A step callback that looks at the video on its way."""

    def look(pipe: TextToVideoPipeline, step: int, t: float, tensors: dict[str, Any]) -> None:
        latents.append(tensors["latents"].copy())
        images.append(pipe.preview(tensors["latents"]))

    return look


def test_the_vae_decoder_has_a_profile_of_thumbnails(plans: Bundle) -> None:
    rows, columns = thumbnail_size(*SHAPE[-2:])
    for role, scale in (("head_first", 1), ("head_next", 1), ("tail", 2)):
        plan = plans.manifest.components["vae_decoder"].graphs[role].plan
        assert plan is not None
        last = plan.profiles[-1].sizes
        assert {name: (sizes.min, sizes.max) for name, sizes in last.items()} == {
            "height": (scale * rows,) * 2,
            "width": (scale * columns,) * 2,
        }


def test_a_preview_after_each_step_on_plans(plans: Bundle, narrow: Tiny, insert: Insert) -> None:
    library = insert()
    reference = TextToVideoPipeline.from_pretrained(narrow.bundle)
    with run(plans) as pipe:
        plain = pipe("a red ball", **REQUEST).frames
    plan = make_plan(plans.manifest, SHAPE, previews=True)
    for budget, most in ((None, plan.peak_bytes), (plan.least_bytes, plan.least_bytes)):
        images: Images = []
        latents: list[NDArray[np.float32]] = []
        with run(plans, vram_budget=budget) as pipe:
            gc.collect()
            library.cuda.peak = 0
            frames = pipe("a red ball", **REQUEST, callback_on_step_end=watcher(images, latents), previews=True).frames
            assert library.cuda.peak <= most - plan.reserve_bytes
        assert np.array_equal(frames, plain)
        assert len(images) == STEPS
        for found, of in zip(images, latents, strict=True):
            expected = reference.preview(of)
            assert found.shape == expected.shape == (1, *SHAPE[2:], 3)
            assert np.abs(found.astype(np.float32) - expected).mean() < SAME_IMAGE
            assert expected.std() > 2 * SAME_IMAGE


def test_the_vae_decoder_is_loaded_once_for_all_previews_of_a_video(plans: Bundle, insert: Insert) -> None:
    insert()
    plan = make_plan(plans.manifest, SHAPE, previews=True)
    loads: list[str] = []
    images: Images = []
    with run(plans) as pipe:
        pipe("a red ball", **REQUEST)  # tests the engines
    with run(plans, vram_budget=plan.least_bytes) as pipe:
        load = pipe.backend.load
        pipe.backend.load = lambda folder, name, spec: (loads.append(name), load(folder, name, spec))[1]  # type: ignore[method-assign,func-returns-value]
        pipe("a red ball", **REQUEST, callback_on_step_end=watcher(images, []), previews=True)
        assert loads.count("transformer") == 1
        assert loads.count("vae_decoder") <= 2  # for the previews, and for the video
        del pipe.backend.load
    assert len(images) == STEPS


def test_previews_are_in_the_plan_of_the_denoise_stage(plans: Bundle, insert: Insert) -> None:
    insert()
    without, planned = (plan_command(plans.folder, previews=previews) for previews in (False, True))
    for before, after in zip(without["stages"], planned["stages"], strict=True):
        assert (after["total_bytes"] > before["total_bytes"]) == (before["name"] == "denoise")
    vae = plans.manifest.components["vae_decoder"]
    assert planned["stages"][1]["weights_bytes"] == without["stages"][1]["weights_bytes"] + vae.weights_bytes
    assert planned["peak_bytes"] >= without["peak_bytes"]
    with run(plans) as pipe:
        request = make_request(pipe.manifest, CallOptions(prompt="", seed=0))
        assert to_json(pipe.plan(request, previews=True))["stages"] == planned["stages"]


def test_a_preview_that_fails_warns_once_and_the_video_is_made(
    plans: Bundle, insert: Insert, caplog: pytest.LogCaptureFixture
) -> None:
    library = insert()
    with run(plans) as pipe:
        plain = pipe("a red ball", **REQUEST).frames
    failed = []

    def look(pipe: TextToVideoPipeline, step: int, t: float, tensors: dict[str, Any]) -> None:
        library.cuda.capacity = library.cuda.used()
        try:
            pipe.preview(tensors["latents"])
        except PreviewError as exc:
            failed.append(str(exc))
            raise
        finally:
            library.cuda.capacity = ROOM

    with run(plans) as pipe, caplog.at_level(logging.WARNING):
        frames = pipe("a red ball", **REQUEST, callback_on_step_end=look).frames
        assert len(failed) == STEPS
        assert all("memory" in text.lower() for text in failed)
        assert caplog.text.count("there are no previews of this video") == 1
        assert np.array_equal(frames, plain)
        assert pipe.preview(np.zeros(SHAPE, np.float32)).shape == (1, *SHAPE[2:], 3)


def test_the_command_previews_plans(
    plans: Bundle, insert: Insert, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    insert()
    output = tmp_path / "out"
    output.mkdir()
    command = ["generate", "a ball", "--engines", str(plans.folder), "--output", str(output / "o.mp4"), "--trust"]
    assert main([*command, "--seed", "1", "--num-inference-steps", "2", "--preview", str(output / "p.png")]) == 0
    assert {path.name for path in output.iterdir()} == {"o.mp4", "p.png"}
    gc.collect()


# -- self-tests --------------------------------------------------------------------------------------------------------


def test_every_shape_profile_is_tested_once(plans: Bundle, insert: Insert) -> None:
    library = insert()
    report = verify(plans.folder, trust=True)
    assert report["passed"]
    assert not any(item["untested"] for item in report["components"].values())
    for component in plans.manifest.components.values():
        for role, graph in component.graphs.items():
            assert graph.plan is not None
            (first, *_) = graph.inputs
            compiled = [kernel for kernel in library.compiled if kernel.startswith(f"{role}.onnx")]
            for profile in graph.plan.profiles:
                sizes = {name: item.opt for name, item in profile.sizes.items()}
                if "length" not in sizes:  # the text encoder's one profile is a range
                    assert any(str(first.resolve(sizes)) in kernel for kernel in compiled), (role, sizes)


def test_a_size_that_there_is_no_memory_for_is_left_out_and_tested_again(
    plans: Bundle, insert: Insert, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    library = insert()
    verify(plans.folder, trust=True)
    least = library.cuda.peak
    library.cuda.capacity = least - 1
    report = verify(plans.folder, trust=True)
    assert report["passed"]
    untested = report["components"]["vae_decoder"]["untested"]
    assert {label.rpartition(".")[0] for label in untested} == {"tail.48x64"}
    with run(plans) as pipe, caplog.at_level(logging.INFO):
        for capacity, kept in ((least - 1, 0), (least, 1)):
            library.cuda.capacity = capacity
            pipe.stages.components.get("vae_decoder")
            assert len(list(tmp_path.rglob("verdicts/*.json"))) == kept
            pipe.close()
    assert caplog.text.count("the self-test leaves tail.48x64") == 1
