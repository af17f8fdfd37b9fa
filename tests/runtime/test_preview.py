"""Previews of latents: their form, their likeness to what the VAE decodes, and the file that the command keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from t2v_rt import RequestError, TextToVideoPipeline, build_engines
from t2v_rt.cli import main
from t2v_rt.runtime.noise import Generator
from t2v_rt.runtime.preview import enlarged, shrunk
from tests.conftest import Tiny

CHECKPOINT = Path(__file__).resolve().parents[2] / "demo" / "bouncing-shapes"
LIKENESS = 0.8  # correlation with the decoded frames, averaged over the pixels and frames of a latent; measured 0.90
PROMPTS = (
    "a red ball bouncing on a blue background",
    "a green square moving left",
    "一个红色的球在蓝色背景上弹跳",
    "a yellow triangle moving up on a black background",
)


def test_shape_range_and_that_it_is_the_same_again(pipe: TextToVideoPipeline) -> None:
    latents = Generator(0).randn((2, 4, 3, 6, 10))
    kept = latents.copy()
    images = pipe.preview(latents)
    assert images.shape == (2, 3, 6, 10, 3)
    assert images.dtype == np.uint8
    assert images.max() > images.min()
    assert np.array_equal(latents, kept)
    assert np.array_equal(pipe.preview(latents), images)
    assert np.array_equal(pipe.preview(latents[1:])[0], images[1])  # each video is its own
    assert np.array_equal(pipe.preview(latents.astype(np.float64)), images)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 5), (3, 70)])
def test_any_size(pipe: TextToVideoPipeline, height: int, width: int) -> None:
    assert pipe.preview(Generator(0).randn((1, 4, 1, height, width))).shape == (1, 1, height, width, 3)


def test_latents_without_contrast(pipe: TextToVideoPipeline) -> None:
    flat = pipe.preview(np.zeros((1, 4, 2, 4, 6), np.float32))
    assert flat.shape == (1, 2, 4, 6, 3)


def test_shrinking_and_enlarging() -> None:
    array = np.arange(15, dtype=np.float32).reshape(3, 5)
    assert shrunk(array, 2).tolist() == [[3.0, 5.0, 6.5], [10.5, 12.5, 14.0]]  # edges are repeated to fill
    assert enlarged(np.array([[1, 2]], np.float32), 2, 2, 3).tolist() == [[1, 1, 2], [1, 1, 2]]


@pytest.mark.slow
def test_it_shows_what_the_demo_decodes(tmp_path: Path) -> None:
    build_engines(CHECKPOINT, tmp_path / "bundle")
    pipe = TextToVideoPipeline.from_pretrained(tmp_path / "bundle")
    found, expected = [], []
    for seed, prompt in enumerate(PROMPTS):
        latents = pipe(prompt, seed=seed, output_type="latent").frames
        found.append(pipe.preview(latents)[0] / 255.0)
        expected.append(np.stack([_averaged(chunk, found[0].shape[1]) for chunk in pipe.decode(latents)]))
    assert _correlation(np.stack(found), np.stack(expected)) > LIKENESS
    assert _correlation(found[0], expected[1]) < LIKENESS  # another prompt's video is not like it


def _averaged(chunk: NDArray[np.float32], rows: int) -> NDArray[np.float32]:
    size = chunk.shape[1] // rows
    result: NDArray[np.float32] = chunk.reshape(len(chunk), rows, size, -1, size, 3).mean((0, 2, 4))
    return result


def _correlation(a: NDArray[Any], b: NDArray[Any]) -> float:
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        (np.zeros((1, 5, 2, 4, 6), np.float32), r"latents has shape \[1, 5, 2, 4, 6\]; expected \(videos, 4, frames"),
        (np.zeros((4, 2, 4, 6), np.float32), "of 5 dimensions"),
        (np.full((1, 4, 2, 4, 6), np.nan, np.float32), "not finite"),
        (np.zeros((1, 4, 0, 4, 6), np.float32), "latents has shape"),
        (None, "latents is of type NoneType"),
    ],
)
def test_what_is_refused(pipe: TextToVideoPipeline, latents: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        pipe.preview(latents)


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_writes_it_after_each_step(
    narrow: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from t2v_rt.runtime.video import write_png

    shapes = []

    def watched(path: Path, image: NDArray[np.uint8]) -> None:
        write_png(path, image)
        with av.open(str(path)) as container:
            shapes.append(next(container.decode(video=0)).to_ndarray(format="rgb24").shape)

    monkeypatch.setattr("t2v_rt.commands.previews.write_png", watched)
    command = ["generate", "a ball", "--engines", str(narrow.bundle), "--output", str(tmp_path / "o.mp4"), "--json"]
    assert main([*command, "--seed", "1", "--preview", str(tmp_path / "p.png")]) == 0
    assert shapes == [(32, 2 * 48 + 2, 3)] * 4  # two latent frames side by side, in the video's size
    with_preview = (tmp_path / "o.mp4").read_bytes()
    assert main([*command, "--seed", "1"]) == 0
    assert (tmp_path / "o.mp4").read_bytes() == with_preview
    assert {path.name for path in tmp_path.iterdir()} == {"o.mp4", "p.png"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["a ball", "--preview", "p.jpg"], "not the name of a png file"),
        (["a ball", "--preview", "missing/p.png"], "does not exist"),
        (["--from-latents", "l.npz", "--preview", "p.png"], "leave one of them out"),
    ],
)
def test_options_that_are_refused(
    narrow: Tiny,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["generate", *options, "--engines", str(narrow.bundle), "--output", "o.mp4"]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
