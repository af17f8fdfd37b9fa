"""Bad input: one line, a non-zero exit, and nothing left behind."""

from __future__ import annotations

import json
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from t2v_rt import CheckpointError, EngineError, TextToVideoPipeline, build_engines
from t2v_rt.cli import main
from t2v_rt.commands.bars import Bars
from tests.conftest import Tiny
from tests.support.processes import start_and_meet

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
INDEX = "transformer/diffusion_pytorch_model.safetensors.index.json"


FLOAT32_MAX = float(np.finfo(np.float32).max)  # finite itself, a sum of its multiples is not


def snapshot(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    """Runs the command line, which must fail in one line; returns the line."""
    capsys.readouterr()
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("t2v-rt: error: ")
    return lines[0]


def change_tensors(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def drop(name: str) -> Callable[[Path], None]:
    return lambda folder: change_tensors(folder / TRANSFORMER, lambda tensors: tensors.__delitem__(name))


def _only_pickles(folder: Path) -> None:
    (folder / TRANSFORMER).rename(folder / "transformer" / "diffusion_pytorch_model.bin")


def _truncate(folder: Path) -> None:
    data = (folder / TRANSFORMER).read_bytes()
    (folder / TRANSFORMER).write_bytes(data[: len(data) - 100])


def _damage_header(folder: Path) -> None:
    data = bytearray((folder / TRANSFORMER).read_bytes())
    data[20:60] = b"\xff" * 40
    (folder / TRANSFORMER).write_bytes(data)


def _huge_header(folder: Path) -> None:
    data = bytearray((folder / TRANSFORMER).read_bytes())
    data[:8] = (2**62).to_bytes(8, "little")
    (folder / TRANSFORMER).write_bytes(data)


def _reshape(folder: Path) -> None:
    def change(tensors: dict[str, Any]) -> None:
        tensors["proj_out.weight"] = tensors["proj_out.weight"][:-1].copy()

    change_tensors(folder / TRANSFORMER, change)


def _shards(folder: Path) -> list[Path]:
    """Puts the denoiser into two shards with an index."""
    tensors = load_file(folder / TRANSFORMER)
    (folder / TRANSFORMER).unlink()
    names = sorted(tensors)
    halves = (names[: len(names) // 2], names[len(names) // 2 :])
    files = [folder / "transformer" / f"diffusion_pytorch_model-{i:05}-of-00002.safetensors" for i in (1, 2)]
    for file, half in zip(files, halves, strict=True):
        save_file({name: tensors[name] for name in half}, file)
    index = {name: file.name for file, half in zip(files, halves, strict=True) for name in half}
    (folder / INDEX).write_text(json.dumps({"weight_map": index}))
    return files


def _truncated_shard(folder: Path) -> None:
    shard = _shards(folder)[1]
    shard.write_bytes(shard.read_bytes()[:-1])


def _absent_shard(folder: Path) -> None:
    _shards(folder)[0].unlink()


def _tensor_in_no_shard(folder: Path) -> None:
    change_tensors(_shards(folder)[0], lambda tensors: tensors.pop(min(tensors)))


def _index(key: str, value: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "model_index.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))

    return change


def _config(component: str, key: str, value: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / component / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))

    return change


CHECKPOINTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no vae folder": (lambda folder: shutil.rmtree(folder / "vae"), "vae/ is missing"),
    "no tokenizer": (lambda folder: (folder / "tokenizer/tokenizer.json").unlink(), "tokenizer.json is missing"),
    "no model_index": (lambda folder: (folder / "model_index.json").unlink(), "model_index.json is missing"),
    "pickles only": (_only_pickles, "only pickled weights"),
    "no weights": (lambda folder: (folder / TRANSFORMER).unlink(), "no weights found"),
    "truncated": (_truncate, "truncated"),
    "damaged header": (_damage_header, "damaged header"),
    "impossible header": (_huge_header, "damaged or truncated"),
    "tensor missing": (drop("blocks.0.attn1.to_q.weight"), "'blocks.0.attn1.to_q.weight' is missing"),
    "tensor of another shape": (_reshape, "proj_out.weight"),
    "shard missing": (_absent_shard, "diffusion_pytorch_model-00001-of-00002.safetensors: shard named in"),
    "shard truncated": (_truncated_shard, "-00002-of-00002.safetensors: truncated"),
    "tensor in no shard": (_tensor_in_no_shard, "1 tensors that no shard holds, the first 'blocks.0.attn1"),
    "another pipeline": (_index("_class_name", "LTXPipeline"), "the pipeline 'LTXPipeline'; supported: WanPipeline"),
    "wan 2.2": (_index("transformer_2", ["diffusers", "WanTransformer3DModel"]), "that of a Wan2.2 model"),
    "wan 2.2, small": (_index("expand_timesteps", True), "that of a Wan2.2 model"),
    "another denoiser": (
        _config("transformer", "_class_name", "LTXVideoTransformer3DModel"),
        "'LTXVideoTransformer3DModel'; only 'WanTransformer3DModel'",
    ),
    "image model": (_config("transformer", "image_dim", 1280), "image_dim"),
    "image model by channels": (_config("transformer", "in_channels", 36), "in_channels is 36"),
    "wan 2.2 vae": (_config("vae", "is_residual", True), "is_residual"),
    "other encoder": (_config("text_encoder", "model_type", "t5"), "model_type"),
    "nonsense size": (_config("transformer", "num_layers", "two"), "num_layers"),
}


@pytest.mark.parametrize("name", list(CHECKPOINTS))
def test_checkpoints_that_cannot_be_exported(
    narrow: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    spoil, message = CHECKPOINTS[name]
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(narrow.checkpoint, checkpoint)
    spoil(checkpoint)
    before = snapshot(tmp_path)
    line = refused(capsys, "build-engines", str(checkpoint), "--output", str(tmp_path / "bundle"))
    assert message in line
    assert snapshot(tmp_path) == before


REQUESTS: dict[str, tuple[list[str], str]] = {
    "80 frames": (["--num-frames", "80"], "77 or 81"),
    "height 500": (["--height", "500"], "496 or 512"),
    "guidance nan": (["--guidance-scale", "nan"], "guidance_scale is nan"),
    "guidance rescale": (["--guidance-rescale", "1.5"], "guidance_rescale is 1.5"),
    "guidance interval": (["--guidance-interval", "0.8,0.2"], "0 <= start < stop <= 1"),
    "guidance interval of one": (["--guidance-interval", "0.8"], "expected (start, stop)"),
    "guidance interval of words": (["--guidance-interval", "early,late"], "not a list of numbers"),
    "guidance batch": (["--guidance-batch", "maybe"], "invalid choice"),
    "zero init alone": (["--zero-init-steps", "2"], "cfg_zero_star is off"),
    "negative step cache": (["--step-cache=-0.1"], "step_cache is -0.1"),
    "step cache nan": (["--step-cache", "nan"], "step_cache is nan"),
    "timesteps for unipc": (["--timesteps", "900,500"], "takes no timesteps"),
    "timesteps that rise": (["--timesteps", "500,900", "--scheduler", "euler"], "timesteps"),
    "timesteps and steps": (["--timesteps", "900,500", "--num-inference-steps", "2"], "leave num_inference_steps out"),
    "timesteps and sigmas": (["--timesteps", "900,500", "--sigmas", "0.9,0.5"], "both given"),
    "timesteps nan": (["--timesteps", "nan"], "timesteps is"),
    "no timesteps": (["--timesteps", ""], "not a list of numbers"),
    "0 steps": (["--num-inference-steps", "0"], "num_inference_steps is 0"),
    "scheduler": (["--scheduler", "foo"], "expected one of cogvideox-ddim"),
    "backend": (["--backend", "foo"], "expected one of onnxruntime"),
    "provider": (["--provider", "foo"], "expected one of cpu"),
    "seed": (["--seed", str(2**70)], "64 bits"),
    "flow shift": (["--flow-shift", "-1"], "flow_shift -1"),
    "fps": (["--fps", "0"], "--fps is 0"),
    "threads": (["--threads", "0"], "threads is 0"),
    "budget": (["--vram-budget", "lots"], "not a size of memory"),
    "small budget": (["--vram-budget", "1kB"], "needs about"),
    "too long": (["--num-frames", "100000001"], "at most 4093"),
    "too large to fit": (["--height", "16384", "--width", "16384", "--num-frames", "81"], "would fit (an estimate)"),
    "not a number": (["--height", "tall"], "invalid int value"),
}


@pytest.mark.parametrize("name", list(REQUESTS))
def test_requests_that_cannot_be_made(
    narrow: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    options, message = REQUESTS[name]
    output = str(tmp_path / "out.mp4")
    line = refused(capsys, "generate", "a ball", "--engines", str(narrow.bundle), "--output", output, *options)
    assert message in line
    assert snapshot(tmp_path) == set()


def test_outputs_that_cannot_be_written(narrow: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("kept")
    before = snapshot(tmp_path)
    for output, message in (
        ("out.xyz", "expected one of .mp4"),
        ("missing/out.mp4", "does not exist"),
        ("file/out.mp4", "does not exist"),
        ("file", "not a folder of frames"),
    ):
        command = ("generate", "a ball", "--engines", str(narrow.bundle), "--output", str(tmp_path / output))
        assert message in refused(capsys, *command)
    assert "not writable" in refused(
        capsys, "generate", "a ball", "--engines", str(narrow.bundle), "--output", "/proc/out.mp4"
    )
    build = ("build-engines", str(narrow.checkpoint), "--output")
    assert "does not exist" in refused(capsys, *build, str(tmp_path / "missing/bundle"))
    assert "not a bundle" in refused(capsys, *build, str(tmp_path))
    assert "unknown backend" in refused(capsys, *build, str(tmp_path / "b"), "--backend", "foo")
    assert "precision is" in refused(capsys, *build, str(tmp_path / "b"), "--precision", "int3")
    assert snapshot(tmp_path) == before


def _edit(name: str, change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return apply


def _flip(folder: Path) -> None:
    file = folder / "transformer" / "weights.data"
    data = bytearray(file.read_bytes())
    data[1000] ^= 1
    file.write_bytes(data)


def _climb(content: dict[str, Any]) -> None:
    content["components"]["transformer"]["graphs"]["model"]["path"] = "../other/model.onnx"


BUNDLES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "edited file": (_flip, "weights.data is not the file that was built"),
    "missing file": (lambda folder: (folder / "vae_decoder/tail.onnx").unlink(), "tail.onnx is missing"),
    "leaves the bundle": (_edit("bundle.json", _climb), "leaves the bundle"),
    "absolute path": (
        _edit("bundle.json", lambda c: c["files"].update({"C:\\x": {"sha256": "", "bytes": 0}})),
        "leaves the bundle",
    ),
    "older schema": (_edit("bundle.json", lambda c: c.update(schema_version=1)), "schema 1, this version reads 5"),
    "newer schema": (_edit("bundle.json", lambda c: c.update(schema_version=99)), "schema 99"),
    "edited manifest": (_edit("bundle.json", lambda c: c["defaults"].update(fps=99.0)), "was edited"),
    "damaged manifest": (lambda folder: (folder / "bundle.json").write_text("{"), "cannot be read"),
    "incomplete manifest": (_edit("bundle.json", lambda c: c.pop("model")), "is damaged"),
    "no manifest": (lambda folder: (folder / "bundle.json").unlink(), "no bundle.json"),
}


@pytest.mark.parametrize("name", list(BUNDLES))
def test_bundles_that_cannot_be_used(
    narrow: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    spoil, message = BUNDLES[name]
    bundle = tmp_path / "bundle"
    shutil.copytree(narrow.bundle, bundle)
    TextToVideoPipeline.from_pretrained(bundle)  # its hashes are remembered: the change must be seen all the same
    spoil(bundle)
    before = snapshot(tmp_path)
    output = str(tmp_path / "out.mp4")
    assert message in refused(capsys, "generate", "a ball", "--engines", str(bundle), "--output", output)
    assert message in refused(capsys, "inspect", str(bundle))
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("file", "tensor", "stage"),
    [
        (TEXT, "encoder.final_layer_norm.weight", "encode"),
        (TRANSFORMER, "blocks.0.attn1.norm_q.weight", "denoise"),
        (VAE, "decoder.conv_out.weight", "decode"),
    ],
)
def test_values_that_are_not_finite_name_their_stage(
    narrow: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, tensor: str, stage: str
) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(narrow.checkpoint, checkpoint)
    change_tensors(checkpoint / file, lambda tensors: tensors[tensor].fill(FLOAT32_MAX))
    build_engines(checkpoint, tmp_path / "bundle")
    before = snapshot(tmp_path)
    with pytest.raises(EngineError, match=f"stage {stage}"):
        TextToVideoPipeline.from_pretrained(tmp_path / "bundle")("a ball", seed=1)
    command = ("generate", "a ball", "--engines", str(tmp_path / "bundle"), "--output", str(tmp_path / "out.mp4"))
    assert f"stage {stage}" in refused(capsys, *command, code=1)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("stage", ["build", "encode", "denoise", "decode"])
def test_an_interrupt_leaves_nothing(
    narrow: Tiny,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
) -> None:
    """Of a build, before its first part is finished; what is kept after that is tested in test_resume.py."""

    def interrupt(self: Bars, name: str, done: int, total: int, *, detail: str = "") -> None:
        if name == stage and (done >= 2 or total == 1 or stage == "build"):
            raise KeyboardInterrupt

    monkeypatch.setattr(Bars, "update", interrupt)
    if stage == "build":
        command = ["build-engines", str(narrow.checkpoint), "--output", str(tmp_path / "bundle")]
    else:
        command = ["generate", "a ball", "--engines", str(narrow.bundle), "--output", str(tmp_path / "out.mp4")]
    assert main(command) == 130
    assert capsys.readouterr().err.strip() == "t2v-rt: interrupted"
    assert snapshot(tmp_path) == set()


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to a child process there")
def test_a_real_signal_during_the_steps(narrow: Tiny, tmp_path: Path) -> None:
    command = ["generate", "a ball", "--engines", str(narrow.bundle), "--output", str(tmp_path / "out.npy")]
    endless = ["--num-inference-steps", "20000"]
    with start_and_meet(*command, *endless, at="denoise", call=3, goes_on=True) as process:
        assert snapshot(tmp_path)  # the video is begun
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    assert process.returncode == 130
    assert errors.strip() == "t2v-rt: interrupted"
    assert snapshot(tmp_path) == set()


@pytest.mark.parametrize(
    ("reading", "named"), [("free_disk_bytes", "of disk"), ("available_memory_bytes", "of memory")]
)
def test_too_little_disk_or_memory_is_said_before_the_work_begins(
    narrow: Tiny,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    reading: str,
    named: str,
) -> None:
    began: list[str] = []
    monkeypatch.setattr(Bars, "update", lambda self, stage, *counts, detail: began.append(detail))
    monkeypatch.setattr(f"t2v_rt.build.needs.{reading}", lambda *place: 5_000_000)
    line = refused(capsys, "build-engines", str(narrow.checkpoint), "--output", str(tmp_path / "bundle"))
    assert re.search(rf"the build needs about 0\.\d+ GB {named}, 0\.005 GB are", line)
    assert not began
    assert snapshot(tmp_path) == set()


def test_a_failed_build_keeps_the_older_bundle(narrow: Tiny, tmp_path: Path) -> None:
    checkpoint, bundle = tmp_path / "checkpoint", tmp_path / "bundle"
    shutil.copytree(narrow.checkpoint, checkpoint)
    built = build_engines(checkpoint, bundle).manifest.bundle_id
    drop("proj_out.bias")(checkpoint)
    with pytest.raises(CheckpointError):
        build_engines(checkpoint, bundle)
    assert TextToVideoPipeline.from_pretrained(bundle).manifest.bundle_id == built
    assert snapshot(tmp_path) >= {"bundle/bundle.json"}
    assert not [name for name in snapshot(tmp_path) if name.endswith(".tmp")]
