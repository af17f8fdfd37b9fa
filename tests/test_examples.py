"""The scripts of examples/, each run as a reader would."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from t2v_rt import TextToVideoPipeline
from t2v_rt.cli import main
from t2v_rt.runtime.video import read_metadata
from tests.conftest import Tiny

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
PROMPT = "a red ball"
MOST_LINES = 55  # an example is read at one glance


def run(name: str, *arguments: object) -> list[str]:
    """The lines that an example prints; it has to end well and say nothing on standard error."""
    command = [sys.executable, "-W", "error", str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_every_example_is_run_here_short_and_built_on_public_modules() -> None:
    scripts = sorted(EXAMPLES.glob("*.py"))
    tests = Path(__file__).read_text(encoding="utf-8")
    public = {"t2v_rt", "t2v_rt.runtime.noise", "t2v_rt.runtime.schedulers", "t2v_rt.runtime.video"}
    assert scripts
    for script in scripts:
        text = script.read_text(encoding="utf-8")
        assert f'run("{script.name}"' in tests
        assert len(text.splitlines()) <= MOST_LINES
        modules = {node.module or "" for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
        assert {module for module in modules if module.startswith("t2v_rt")} <= public


def test_make_video_writes_what_the_command_writes(narrow: Tiny, tmp_path: Path) -> None:
    (line,) = run("make_video.py", narrow.bundle, PROMPT, tmp_path / "example.mp4", "--seed", 7)
    assert "seed 7" in line
    command = ["generate", PROMPT, "--engines", str(narrow.bundle), "--seed", "7"]
    assert main([*command, "--output", str(tmp_path / "command.mp4")]) == 0
    assert (tmp_path / "example.mp4").read_bytes() == (tmp_path / "command.mp4").read_bytes()
    assert read_metadata(tmp_path / "example.mp4")["prompt"] == PROMPT


def test_stream_frames_writes_all_frames(narrow: Tiny, tmp_path: Path) -> None:
    lines = run("stream_frames.py", narrow.bundle, PROMPT, tmp_path / "frames")
    assert [line.split(",")[0] for line in lines[:-1]] == [f"step {i}" for i in range(1, 5)]
    assert lines[-1] == "4 steps, 5 of 5 frames"
    assert [path.name for path in sorted((tmp_path / "frames").iterdir())] == [f"frame_{i:04d}.png" for i in range(5)]


def test_stream_frames_stops_where_its_time_is_up(narrow: Tiny, tmp_path: Path) -> None:
    lines = run("stream_frames.py", narrow.bundle, PROMPT, tmp_path / "frames", "--seconds", 0)
    assert lines[-1] == "1 steps, 0 of 5 frames"
    assert "cancelled" in lines[-2]
    assert not list((tmp_path / "frames").iterdir())


def test_split_work_ends_in_the_frames_of_one_call(narrow: Tiny, pipe: TextToVideoPipeline, tmp_path: Path) -> None:
    prompt, latents, video = (tmp_path / name for name in ("prompt.npz", "latents.npz", "video.npy"))
    run("split_work.py", "encode", narrow.bundle, PROMPT, prompt)
    run("split_work.py", "sample", narrow.bundle, prompt, latents, "--seed", 7)
    run("split_work.py", "decode", narrow.bundle, latents, video)
    expected = pipe(PROMPT, seed=7, output_type="uint8").frames[0]
    assert np.array_equal(np.load(video), expected)
    assert read_metadata(video)["seed"] == 7


def test_compare_samplers_tells_how_near_each_comes(narrow: Tiny) -> None:
    lines = run("compare_samplers.py", narrow.bundle, PROMPT, "--steps", 4, "--reference-steps", 4)
    rows = [line.split() for line in lines]
    assert [row[0] for row in rows] == ["unipc", "unipc", "euler"]
    assert [row[1:5] for row in rows] == [["4", "steps", "8", "predictions"]] * 3
    nearness = [float(row[-2]) for row in rows]
    assert nearness[:2] == [float("inf")] * 2  # the same request, the same bytes
    assert 0 < nearness[2] < 100
