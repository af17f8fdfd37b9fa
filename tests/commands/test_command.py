"""The command line end to end, and what a process that generates is made of."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from t2v_rt.cli import main
from t2v_rt.runtime.video import read_metadata
from tests.conftest import Tiny

ROOT = Path(__file__).resolve().parents[2]
ABSENT = ("torch", "diffusers", "transformers", "onnx", "safetensors", "accelerate", "PIL")
FEW, MANY = 17, 161  # frames of a decode
MEMORY_SLACK = 0.5  # of what the further frames of the longer decode would take: for the allocators, and yet far below
GENERATE = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {ABSENT!r}:
            raise ImportError(name + " is not installed here")
sys.meta_path.insert(0, Absent())
from t2v_rt.cli import main
code = main(sys.argv[1:])
loaded = sorted(set(m.split(".")[0] for m in sys.modules) & set({ABSENT!r}))
print("loaded", loaded, file=sys.stderr)
sys.exit(code)
"""
PEAK = """
import sys
from t2v_rt import TextToVideoPipeline
from t2v_rt.system.resources import peak_rss_bytes
from t2v_rt.runtime.noise import Generator
pipe = TextToVideoPipeline.from_pretrained(sys.argv[1])
for count in map(int, sys.argv[2:]):
    latents = Generator(0).randn((1, 4, (count + 3) // 4, 16, 16))
    sizes = [(len(chunk), chunk[0].nbytes) for chunk in pipe.decode(latents)]
    print(sum(length for length, _ in sizes), sizes[0][1], peak_rss_bytes())
"""


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


def generate(tiny: Tiny, output: Path, *options: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    command = ["generate", "a red ball", "--engines", str(tiny.bundle), "--output", str(output), "--json", *options]
    assert main(command) == 0
    return dict(json.loads(capsys.readouterr().out))


def test_bundle_and_prompt_are_enough(narrow: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a red ball", "--engines", str(narrow.bundle), "--output", str(tmp_path / "o.mp4")]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert [line.split()[0] for line in captured.out.splitlines()] == ["output", "seed", "seconds", "memory"]
    assert (tmp_path / "o.mp4").is_file()


def test_the_report_and_the_files_metadata(narrow: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = generate(narrow, tmp_path / "o.mp4", "--seed", "3", "--flow-shift", "5", capsys=capsys)
    assert report["output"] == str(tmp_path / "o.mp4")
    assert report["seed"] == 3
    assert set(report["stage_seconds"]) == {"encode", "denoise", "decode", "write"}
    assert len(report["frames_sha256"]) == 64
    assert report["peak_rss_bytes"] > 0
    metadata = read_metadata(tmp_path / "o.mp4")
    assert metadata == {key: report[key] for key in metadata}
    assert metadata["scheduler"]["flow_shift"] == 5.0
    assert set(metadata) >= {"prompt", "negative_prompt", "seed", "fps", "bundle_id", "num_inference_steps"}
    assert not {"stage_seconds", "peak_rss_bytes", "output"} & set(metadata)


@pytest.mark.slow
def test_two_processes_and_one_or_two_threads_write_the_same_bytes(narrow: Tiny, tmp_path: Path) -> None:
    files = []
    for i, threads in enumerate(("1", "2", "2")):
        output = tmp_path / f"{i}.mp4"
        command = ["generate", "a red ball", "--engines", str(narrow.bundle), "--output", str(output), "--seed", "3"]
        size = ["--height", "64", "--width", "96", "--num-frames", "9"]
        assert run(GENERATE, *command, *size, "--threads", threads).returncode == 0
        files.append(output.read_bytes())
    assert files[0] == files[1] == files[2]


def test_generating_needs_no_torch_and_loads_none(narrow: Tiny, tmp_path: Path) -> None:
    command = ["generate", "a red ball", "--engines", str(narrow.bundle), "--output", str(tmp_path / "o.webm")]
    done = run(GENERATE, *command)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "loaded []"


def test_importing_loads_little() -> None:
    done = run("import sys, t2v_rt; print(sorted({m.split('.')[0] for m in sys.modules}))")
    loaded = done.stdout
    for name in (*ABSENT, "av", "rich", "ftfy"):
        assert f"'{name}'" not in loaded


@pytest.mark.slow
def test_decoding_takes_no_more_memory_for_more_frames(narrow: Tiny) -> None:
    told = run(PEAK, str(narrow.bundle), str(FEW), str(MANY)).stdout.splitlines()
    (few, _, before), (many, frame, after) = (map(int, line.split()) for line in told)
    assert (few, many) == (FEW, MANY)
    assert after - before < MEMORY_SLACK * (MANY - FEW) * frame


def test_sampling_and_decoding_apart(narrow: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = generate(narrow, tmp_path / "whole.mp4", "--seed", "3", capsys=capsys)
    latents = str(tmp_path / "latents.npz")
    engines = ["--engines", str(narrow.bundle), "--json"]
    assert main(["generate", "a red ball", "--seed", "3", "--save-latents", latents, *engines]) == 0
    assert json.loads(capsys.readouterr().out)["output"] == latents
    assert main(["generate", "--from-latents", latents, "--output", str(tmp_path / "later.mp4"), *engines]) == 0
    later = json.loads(capsys.readouterr().out)
    assert later["frames_sha256"] == whole["frames_sha256"]
    assert (tmp_path / "later.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()
    np.savez(tmp_path / "other.npz", latents=np.zeros((1, 2, 3)), settings=np.array("{}"))
    for path, message in (("other.npz", "not this model's"), ("none.npz", "no latents can be read")):
        command = ["generate", "--from-latents", str(tmp_path / path), "--output", str(tmp_path / "x.mp4")]
        assert main([*command, *engines]) == 2
        assert message in capsys.readouterr().err


def test_the_dials_of_sampling(narrow: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = generate(narrow, tmp_path / "o.mp4", "--seed", "3", capsys=capsys)
    assert plain["guidance_batch"] is True
    assert plain["step_calls"] == [2] * 4
    dials = ["--guidance-rescale", "0.5", "--guidance-interval", "0.2,0.9", "--cfg-zero-star", "--zero-init-steps", "1"]
    schedule = ["--scheduler", "euler", "--sigmas", "1.0,0.8,0.6,0.5,0.4,0.3,0.2,0.1"]
    others = ["--guidance-batch", "off", "--step-cache", "100"]
    report = generate(narrow, tmp_path / "d.mp4", "--seed", "3", *dials, *schedule, *others, capsys=capsys)
    assert report["step_calls"] == [0, 2, 2, 0, 0, 0, 0, 1]
    assert report["skipped_calls"] == 8
    expected = {
        "guidance_rescale": 0.5,
        "guidance_interval": [0.2, 0.9],
        "cfg_zero_star": True,
        "zero_init_steps": 1,
        "guidance_batch": False,
        "step_cache": 100.0,
        "num_inference_steps": 8,
        "timesteps": None,
        "sigmas": [1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1],
    }
    assert {key: report[key] for key in expected} == expected
    metadata = read_metadata(tmp_path / "d.mp4")
    assert {key: metadata[key] for key in expected} == expected
    assert "skipped_calls" not in metadata
    report = generate(narrow, tmp_path / "t.mp4", "--scheduler", "euler", "--timesteps", "900,500", capsys=capsys)
    assert report["timesteps"] == [900.0, 500.0]


@pytest.mark.parametrize(
    "options",
    [
        ["a ball", "--output", "o.mp4", "--from-latents", "l.npz"],
        ["--output", "o.mp4"],
        ["a ball"],
        ["a ball", "--output", "o.mp4", "--save-latents", "l.pt"],
    ],
)
def test_options_that_contradict_each_other(
    narrow: Tiny,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["generate", *options, "--engines", str(narrow.bundle)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_inspect(narrow: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(narrow.bundle), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["schema_version"] == 5
    assert report["nodes"]["transformer/model.onnx"]["Attention"] == 4
    assert main(["inspect", str(narrow.bundle)]) == 0
    assert "transformer/model.onnx" in capsys.readouterr().out


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ([], ["generate"], ["build-engines"], ["inspect"]):
        with pytest.raises(SystemExit) as stop:
            main([*command, "--help"])
        assert stop.value.code == 0
        assert "example: t2v-rt" in capsys.readouterr().out


def test_packages_on_disk_in_the_list_and_in_the_wheel_agree(tmp_path: Path) -> None:
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert sorted(setup["packages"]) == sorted(setup["package-dir"])
    on_disk = {
        f"{name.replace('.', '/')}/{file.name}"
        for name, folder in setup["package-dir"].items()
        for file in (ROOT / folder).glob("*.py")
    }
    listed = {(ROOT / folder) for folder in setup["package-dir"].values()}
    tops = [ROOT / name for name in ("t2v_rt", "export", "engines", "runtime", "benchmarks")]
    assert not [path for top in tops for path in top.rglob("*.py") if path.parent not in listed]
    build = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    copy = tmp_path / "source"
    _copy_sources(copy, setup["package-dir"].values())
    done = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=copy, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    wheel = next(tmp_path.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        assert {name for name in archive.namelist() if name.endswith(".py")} == on_disk
        assert "t2v_rt/py.typed" in archive.namelist()


def _copy_sources(target: Path, folders: Any) -> None:
    target.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (target / name).write_bytes((ROOT / name).read_bytes())
    for folder in folders:
        (target / folder).mkdir(parents=True, exist_ok=True)
        for file in (ROOT / folder).iterdir():
            if file.is_file():
                (target / folder / file.name).write_bytes(file.read_bytes())
