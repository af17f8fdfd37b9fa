"""`generate --repeat`: a video's own metadata makes it once more; and `generate` called from a program."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from t2v_rt import RequestError
from t2v_rt.cli import main
from t2v_rt.commands.generate import GenerateOptions, generate, repeated
from t2v_rt.runtime.video import open_writer, read_metadata
from tests.conftest import Tiny
from tests.support.checkpoints import TINY

DIALS = (
    *(
        "--negative-prompt",
        "dark",
        "--seed",
        "5",
        "--height",
        "64",
        "--width",
        "32",
        "--num-frames",
        "9",
        "--fps",
        "11",
    ),
    *("--num-inference-steps", "6", "--guidance-scale", "3.5", "--guidance-rescale", "0.5"),
    "--cfg-zero-star",
    *("--guidance-interval", "0.1,0.9", "--zero-init-steps", "2", "--guidance-batch", "off", "--step-cache", "0.1"),
    *("--scheduler", "dpm++", "--flow-shift", "5"),
)


def run(bundle: Path, *arguments: object) -> None:
    assert main(["generate", "--engines", str(bundle), *map(str, arguments)]) == 0


def refused(capsys: pytest.CaptureFixture[str], bundle: Path, *arguments: object) -> str:
    capsys.readouterr()
    assert main(["generate", "--engines", str(bundle), *map(str, arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def content(video: Path) -> dict[str, bytes]:
    """The bytes of a video and of its metadata beside it, by what follows the video's name."""
    files = [file for file in video.parent.rglob("*") if str(file).startswith(str(video)) and file.is_file()]
    return {str(file).removeprefix(str(video)): file.read_bytes() for file in files}


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif", ".npy", ""])
@pytest.mark.parametrize("dials", [(), DIALS, ("--scheduler", "euler", "--sigmas", "1,0.7,0.2")], ids=len)
def test_the_bytes_are_the_same(narrow: Tiny, tmp_path: Path, suffix: str, dials: tuple[str, ...]) -> None:
    first, second = (tmp_path / f"{name}{suffix}" for name in ("first", "second"))
    run(narrow.bundle, "a red ball", "--output", first, *dials)
    run(narrow.bundle, "--repeat", first, "--output", second)
    assert content(first)
    assert content(second) == content(first)


def test_one_format_repeats_another(narrow: Tiny, tmp_path: Path) -> None:
    first, second, third = (tmp_path / name for name in ("a.mp4", "b.gif", "c.mp4"))
    run(narrow.bundle, "a red ball", "--output", first, *DIALS)
    run(narrow.bundle, "--repeat", first, "--output", second)
    run(narrow.bundle, "--repeat", second, "--output", third)
    assert content(third) == content(first)


@pytest.mark.parametrize(
    ("change", "key", "value"),
    [
        (("--seed", "6"), "seed", 6),
        (("a blue ball",), "prompt", "a blue ball"),
        (("--guidance-rescale", "0"), "guidance_rescale", 0.0),
        (("--guidance-batch", "on"), "guidance_batch", True),
        (("--num-frames", "1"), "num_frames", 1),
        (("--fps", "12"), "fps", 12.0),
        (("--sigmas", "1,0.5"), "sigmas", [1.0, 0.5]),
        (("--num-inference-steps", "7"), "num_inference_steps", 7),
    ],
    ids=str,
)
def test_an_option_that_is_given_replaces_the_videos_own(
    narrow: Tiny, tmp_path: Path, change: tuple[str, ...], key: str, value: Any
) -> None:
    first, second = tmp_path / "a.mp4", tmp_path / "b.mp4"
    euler = ("--scheduler", "euler") if key == "sigmas" else ()
    run(narrow.bundle, "a red ball", "--output", first, *DIALS, *euler)
    run(narrow.bundle, "--repeat", first, "--output", second, *change)
    before, after = read_metadata(first), read_metadata(second)
    assert before[key] != value
    follows = {"sigmas": {"num_inference_steps"}}.get(key, set())
    assert {name for name in before if before[name] != after[name]} == {key} | follows
    assert after[key] == value
    assert second.read_bytes() != first.read_bytes()


def test_timesteps_give_way_to_a_number_of_steps(narrow: Tiny, tmp_path: Path) -> None:
    first, second = tmp_path / "a.gif", tmp_path / "b.gif"
    run(narrow.bundle, "a red ball", "--output", first, "--scheduler", "euler", "--timesteps", "900,500,100")
    run(narrow.bundle, "--repeat", first, "--output", second, "--num-inference-steps", "2")
    settings = read_metadata(second)
    assert (settings["num_inference_steps"], settings["timesteps"], settings["sigmas"]) == (2, None, None)


def test_another_sampler_keeps_the_flow_shift(narrow: Tiny, tmp_path: Path) -> None:
    first, second, third = (tmp_path / name for name in ("a.gif", "b.gif", "c.gif"))
    run(narrow.bundle, "a red ball", "--output", first, "--scheduler", "unipc-karras", "--flow-shift", "5")
    run(narrow.bundle, "--repeat", first, "--output", second, "--scheduler", "euler")
    scheduler = read_metadata(second)["scheduler"]
    assert (scheduler["_class_name"], scheduler["shift"]) == ("FlowMatchEulerDiscreteScheduler", 5.0)
    assert not scheduler["use_karras_sigmas"]  # which the other sampler's short name stood for
    run(narrow.bundle, "--repeat", first, "--output", third, "--flow-shift", "2")
    before, after = (read_metadata(video)["scheduler"] for video in (first, third))
    assert after == {**before, "flow_shift": 2.0}


def test_another_bundle_is_refused_with_both_ids(
    narrow: Tiny, make_tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_tiny(TINY[1])
    video, repeat = tmp_path / "a.gif", tmp_path / "b.gif"
    run(narrow.bundle, "a red ball", "--output", video)
    line = refused(capsys, other.bundle, "--repeat", video, "--output", repeat)
    ids = [json.loads((folder / "bundle.json").read_text())["bundle_id"] for folder in (narrow.bundle, other.bundle)]
    assert all(name in line for name in ids)
    assert not repeat.exists()


def test_what_cannot_be_repeated(narrow: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    video, plain, foreign = (tmp_path / name for name in ("a.mp4", "plain.mp4", "foreign.npy"))
    run(narrow.bundle, "a red ball", "--output", video)
    recorded = read_metadata(video)
    changed: dict[str, dict[str, object]] = {
        "its metadata has no fps": {"title": "another program's"},
        "'eta', which this version does not know": {**recorded, "eta": 1},
        "seed is '7'": {**recorded, "seed": "7"},
        "the settings have no guidance_scale": {k: v for k, v in recorded.items() if k != "guidance_scale"},
        "from given noise": {**recorded, "latents_sha256": "0"},
        "the scheduler None": {**recorded, "scheduler": None},
    }
    output = tmp_path / "out.mp4"
    for message, metadata in changed.items():
        with open_writer(foreign, fps=8, width=2, height=2, num_frames=1, metadata=metadata) as writer:
            writer.write(np.zeros((2, 2, 3), np.uint8))
        line = refused(capsys, narrow.bundle, "--repeat", foreign, "--output", output)
        assert message in line
        assert str(foreign) in line
    plain.write_bytes(b"no video")
    for missing in (plain, tmp_path / "none.gif", tmp_path / "none.mp4", tmp_path):
        assert "no metadata of t2v-rt" in refused(capsys, narrow.bundle, "--repeat", missing, "--output", output)
    assert "--repeat reads" in refused(capsys, narrow.bundle, "--repeat", video, "--output", video)
    latents = ("--from-latents", tmp_path / "x.npz")
    assert "--repeat" in refused(capsys, narrow.bundle, "--repeat", video, "--output", output, *latents)
    assert not output.exists()


def test_prompt_embeddings_are_needed_again(narrow: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    embeds, first, second = tmp_path / "e.npz", tmp_path / "a.mp4", tmp_path / "b.mp4"
    assert main(["encode", "a red ball", "--engines", str(narrow.bundle), "--output", str(embeds)]) == 0
    run(narrow.bundle, "--prompt-embeds", embeds, "--output", first)
    line = refused(capsys, narrow.bundle, "--repeat", first, "--output", second)
    assert "made from prompt embeddings; give the same --prompt-embeds FILE" in line
    run(narrow.bundle, "--repeat", first, "--output", second, "--prompt-embeds", embeds)
    assert content(second) == content(first)


def test_a_program_makes_and_repeats_a_video(narrow: Tiny, tmp_path: Path) -> None:
    seen: list[str] = []
    first, second, third = (tmp_path / name for name in ("a.mp4", "b.mp4", "c.mp4"))
    options = GenerateOptions(prompt="a red ball", seed=5, engines=narrow.bundle, output=first, scheduler="euler")
    report = generate(options, lambda stage, done, total: seen.append(stage))
    assert report["seed"] == 5
    assert set(seen) == {"encode", "denoise", "decode"}
    run(narrow.bundle, "a red ball", "--seed", "5", "--scheduler", "euler", "--output", second)
    assert content(second) == content(first)
    again = generate(repeated(first, {"engines": narrow.bundle, "output": third}))
    assert content(third) == content(first)
    assert again["frames_sha256"] == report["frames_sha256"]
    right: dict[str, Any] = {"prompt": "a", "engines": narrow.bundle, "output": first}
    for wrong in ({"output_type": "np"}, {"seed": "5"}, {"prompt": None}, {"fps": "8"}, {"sigmas": "1"}):
        with pytest.raises(RequestError):
            GenerateOptions(**{**right, **wrong})
