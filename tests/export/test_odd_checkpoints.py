"""Checkpoints as they lie about: what says something else than it seems is refused in one line, before any work."""

from __future__ import annotations

import json
import logging
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from t2v_rt import CheckpointError, build_engines
from t2v_rt.benchmarks.wan_tensors import CONFIGS, TENSORS
from t2v_rt.build.dry_run import dry_run
from t2v_rt.build.options import BuildOptions
from t2v_rt.export.altering import refuse_altering
from t2v_rt.export.tensor_file import StoredTensor, read_header
from t2v_rt.export.tensors import CheckpointWeights
from tests.conftest import Tiny
from tests.support.wan_original import diffusers_names

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
QUERY = "blocks.0.attn1.to_q"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 16837417\n"
PAGE = b"\n<!DOCTYPE html>\n<html><head><title>Log in</title></head><body></body></html>"


@pytest.fixture
def checkpoint(narrow: Tiny, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(narrow.checkpoint, tmp_path / "checkpoint"))


def refused(checkpoint: Path, files: Mapping[str, Path] | None = None) -> str:
    """What a dry run says, and a build likewise; neither writes anything."""
    before = sorted(checkpoint.parent.rglob("*"))
    with pytest.raises(CheckpointError) as estimate:
        dry_run(BuildOptions(checkpoint, files=files))
    with pytest.raises(CheckpointError) as build:
        build_engines(checkpoint, checkpoint.parent / "bundle", files=files)
    assert str(build.value) == str(estimate.value)
    assert sorted(checkpoint.parent.rglob("*")) == before
    return str(build.value)


def add(file: Path, *names: str) -> None:
    tensors = load_file(file)
    save_file({**tensors, **{name: np.ones(1, np.float32) for name in names}}, file)


# -- tensors that change others ------------------------------------------------------------------------------------

ALTERING = {
    "scaled_fp8": "8-bit weights are to be multiplied",
    f"{QUERY}.scale_weight": "a scale that quantized weights",
    f"{QUERY}.scale_input": "a scale",
    f"{QUERY}.weight_scale": "a scale",
    f"{QUERY}.weight_scale_inv": "a scale",
    f"{QUERY}.weight_scale_2": "a scale",
    f"{QUERY}.input_scale": "a scale",
    f"{QUERY}.pre_quant_scale": "a scale",
    f"{QUERY}.wscales": "a scale",
    f"{QUERY}.scales": "a scale",
    f"{QUERY}.qweight": "a part of quantized weights",
    f"{QUERY}.qzeros": "a part of quantized weights",
    f"{QUERY}.g_idx": "a part of quantized weights",
    f"{QUERY}.comfy_quant": "a part of quantized weights",
    f"{QUERY}.SCB": "a part of quantized weights",
    f"{QUERY}.weight.absmax": "a part of quantized weights",
    f"{QUERY}.weight.nested_absmax": "a part of quantized weights",
    f"{QUERY}.weight.quant_map": "a part of quantized weights",
    f"{QUERY}.weight.quant_state.bitsandbytes__nf4": "a part of quantized weights",
    f"{QUERY}.weight._data": "a part of quantized weights",
    f"{QUERY}.weight_packed": "a part of quantized weights",
    f"{QUERY}.weight_zero_point": "a part of quantized weights",
    f"{QUERY}.weight_mask": "pruned",
    f"{QUERY}.lora_A.weight": "an adapter",
    f"{QUERY}.lora_B.default.weight": "an adapter",
    f"{QUERY}.lora_down.weight": "an adapter",
    "lora_unet_blocks_0_self_attn_q.alpha": "an adapter",
    f"{QUERY}.lokr_w1": "an adapter",
    f"{QUERY}.dora_scale": "an adapter",
    f"{QUERY}.diff_b": "an adapter",
}


@pytest.mark.parametrize("name", list(ALTERING))
def test_no_tensor_that_changes_others_is_passed_over(name: str) -> None:
    stored = StoredTensor(Path("x.safetensors"), "F32", (1,), 100, 4)
    with pytest.raises(CheckpointError) as error:
        refuse_altering({f"{QUERY}.weight": stored, name: stored}, "such.safetensors")
    assert f"x.safetensors: tensor {name!r} " in str(error.value)
    assert ALTERING[name] in str(error.value)
    assert "; expected the " in str(error.value)
    assert str(error.value).endswith(", such as such.safetensors")


@pytest.mark.parametrize("file", [TRANSFORMER, VAE, TEXT])
def test_they_are_refused_in_every_network_and_layout(checkpoint: Path, file: str) -> None:
    network = file.partition("/")[0]
    shutil.copy(checkpoint / file, checkpoint.parent / "single.safetensors")
    add(checkpoint / file, "some.layer.weight_scale")
    assert f"{file}: tensor 'some.layer.weight_scale' is a scale" in refused(checkpoint)
    shutil.copy(checkpoint.parent / "single.safetensors", checkpoint / file)
    add(checkpoint.parent / "single.safetensors", "scaled_fp8")
    line = refused(checkpoint, {network: checkpoint.parent / "single.safetensors"})
    assert "single.safetensors: tensor 'scaled_fp8' tells that 8-bit weights" in line


def test_no_tensor_of_the_networks_is_taken_for_one(narrow: Tiny) -> None:
    for network in ("transformer", "vae", "text_encoder"):
        names = {name for name, _ in TENSORS[network][1](CONFIGS[network])}
        names |= diffusers_names(narrow.config, network).keys()
        names |= CheckpointWeights.open(narrow.checkpoint / network).tensors.keys()
        refuse_altering({name: StoredTensor(Path("x"), "F32", (1,), 0, 4) for name in names})


def test_floats_of_8_bits_and_integers_are_refused(checkpoint: Path) -> None:
    for dtype, kind in (("F8_E4M3", "8-bit floats"), ("I8", "integers"), ("U8", "integers")):
        write_tensors(checkpoint / TRANSFORMER, {f"{QUERY}.weight": (dtype, (2, 2), bytes(4))})
        assert f"tensor '{QUERY}.weight' is of {kind} ({dtype}); expected" in refused(checkpoint)


def test_a_config_that_tells_of_quantized_weights_is_refused(checkpoint: Path) -> None:
    config = checkpoint / "text_encoder" / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "quantization_config": {"quant_method": "bitsandbytes"}}))
    assert "text_encoder/config.json: quantization_config is there, its method 'bitsandbytes'" in refused(checkpoint)


def test_other_unused_tensors_are_named_once(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    add(checkpoint / TRANSFORMER, "step", "ema.a", "ema.b", "ema.c")
    add(checkpoint / VAE, "encoder.conv_in.weight", "quant_conv.bias", "conv1.weight")
    add(checkpoint / TEXT, "decoder.final_layer_norm.weight", "lm_head.weight")
    for run in (
        lambda: dry_run(BuildOptions(checkpoint)),
        lambda: build_engines(checkpoint, checkpoint.parent / "bundle"),
    ):
        caplog.clear()
        run()
        warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert warned == [f"{checkpoint / 'transformer'}: 4 tensors are not used: 'ema.a', 'ema.b', 'ema.c' …"]


# -- files that are something else ---------------------------------------------------------------------------------

OTHERS: dict[str, tuple[bytes, str]] = {
    "gguf": (b"GGUF\3\0\0\0" + bytes(60), "is a GGUF file, whose weights are quantized; expected the network as"),
    "git-lfs": (POINTER, "is a git-lfs pointer, not the file that it stands for; fetch that: git lfs pull"),
    "git-annex": (b"/annex/objects/SHA256E-s1--4d7a21.safetensors\n", "is a git-annex pointer"),
    "page": (PAGE, "is a web page, saved in place of the file"),
    "server's xml": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "is a web page"),
    "server's text": (b"Entry not found", "is a text that begins 'Entry not found'"),
    "server's json": (b'{"error":"Repository not found"}', "is a text that begins '{"),
    "pickle in a zip": (b"PK\3\4" + bytes(60), "is a zip archive, as pickles of PyTorch are"),
    "pickle": (b"\x80\x02}q\x00(X" + bytes(60), "is a pickle, which can run code"),
    "apple double": (b"\0\5\x16\7" + bytes(60), "is an AppleDouble file"),
    "nothing": (b"", "is empty"),
    "noise": (b"\xff" * 60, "damaged or truncated: 60 bytes"),
}


@pytest.mark.parametrize("kind", list(OTHERS))
def test_weights_that_are_something_else_are_called_what_they_are(checkpoint: Path, kind: str) -> None:
    content, message = OTHERS[kind]
    (checkpoint / TRANSFORMER).write_bytes(content)
    line = refused(checkpoint)
    assert line.startswith(str(checkpoint / TRANSFORMER))
    assert message in line


def test_a_folder_with_a_gguf_file_only_says_so(checkpoint: Path) -> None:
    (checkpoint / TRANSFORMER).unlink()
    (checkpoint / "transformer" / "wan-q4.gguf").write_bytes(OTHERS["gguf"][0])
    assert "transformer: wan-q4.gguf is a GGUF file" in refused(checkpoint)


@pytest.mark.parametrize(
    "name", ["model_index.json", "vae/config.json", "scheduler/scheduler_config.json", "generation_config.json"]
)
def test_configs_that_are_something_else_are_called_what_they_are(checkpoint: Path, name: str) -> None:
    for content, message in ((POINTER, "is a git-lfs pointer"), (PAGE, "is a web page"), (b"", "is empty")):
        (checkpoint / name).write_bytes(content)
        assert refused(checkpoint).startswith(f"{checkpoint / name} {message}")
    (checkpoint / name).write_bytes(b'{"a": ')
    assert "cannot be read as JSON" in refused(checkpoint)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_changes_nothing(narrow: Tiny, checkpoint: Path, encoding: str) -> None:
    for file in [*checkpoint.rglob("*.json")]:
        file.write_bytes(file.read_text(encoding="utf-8").encode(encoding))
    built = build_engines(checkpoint, checkpoint.parent / "bundle").manifest
    known = json.loads((narrow.bundle / "bundle.json").read_text())["files"]
    assert {path: entry.sha256 for path, entry in built.files.items()} == {
        path: entry["sha256"] for path, entry in known.items()
    }


# -- headers -------------------------------------------------------------------------------------------------------


def write_tensors(file: Path, tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]]) -> None:
    """A safetensors file of any dtype, from bytes."""
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]}
        end += len(data)
    write_header(file, header, b"".join(data for _, _, data in tensors.values()))


def write_header(file: Path, header: Mapping[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_tensors_that_overlap_or_leave_holes_are_refused(tmp_path: Path) -> None:
    def entry(start: int, end: int) -> dict[str, Any]:
        return {"dtype": "F32", "shape": [(end - start) // 4], "data_offsets": [start, end]}

    file = tmp_path / "x.safetensors"
    write_header(file, {"b": entry(8, 16), "a": entry(0, 8), "none": entry(8, 8)}, bytes(16))
    assert list(read_header(file)) == ["b", "a", "none"]
    for header, message in (
        ({"a": entry(0, 8), "b": entry(4, 16)}, "'b' does not begin where 'a' ends: 4 bytes overlap"),
        ({"a": entry(0, 16), "b": entry(0, 16)}, "'b' does not begin where 'a' ends: 16 bytes overlap"),
        ({"a": entry(0, 4), "b": entry(8, 16)}, "'b' does not begin where 'a' ends: 4 bytes are between"),
        ({"a": entry(8, 16)}, "'a' does not begin where the header ends: 8 bytes are between"),
    ):
        write_header(file, header, bytes(16))
        with pytest.raises(CheckpointError, match=message):
            read_header(file)


# -- values --------------------------------------------------------------------------------------------------------

VALUES: dict[str, Callable[[NDArray[np.float32]], bytes]] = {
    "F64": lambda array: array.astype(np.float64).tobytes(),
    "F32": lambda array: array.tobytes(),
    "F16": lambda array: array.astype(np.float16).tobytes(),
    "BF16": lambda array: (array.view(np.uint32) >> 16).astype(np.uint16).tobytes(),
}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", list(VALUES))
def test_values_that_are_not_finite_are_found_and_named(tmp_path: Path, dtype: str, value: float) -> None:
    array = np.linspace(-3, 3, 1000, dtype=np.float32)
    file = tmp_path / "model.safetensors"
    write_tensors(file, {"good": (dtype, (1000,), VALUES[dtype](array))})
    weights = CheckpointWeights.open(tmp_path)
    np.testing.assert_allclose(weights.read("good", (1000,)), array, rtol=1e-2)
    weights.copy("good", (1000,), tmp_path / "copy")
    array[-1] = value
    write_tensors(file, {"bad": (dtype, (1000,), VALUES[dtype](array))})
    weights = CheckpointWeights.open(tmp_path)
    message = f"{file}: tensor 'bad' holds values that are not finite"
    with pytest.raises(CheckpointError) as read:
        weights.read("bad", (1000,))
    with pytest.raises(CheckpointError) as copied:
        weights.copy("bad", (1000,), tmp_path / "copy")
    assert str(read.value).startswith(message)
    assert str(copied.value) == str(read.value)


def test_a_value_that_float32_cannot_hold_is_named(tmp_path: Path) -> None:
    write_tensors(tmp_path / "model.safetensors", {"large": ("F64", (2,), np.array([1.0, -1e300]).tobytes())})
    with pytest.raises(CheckpointError, match=r"tensor 'large' holds 1e\+300, which float32 cannot"):
        CheckpointWeights.open(tmp_path).read("large", (2,))


@pytest.mark.parametrize(
    ("file", "name"), [(TRANSFORMER, f"{QUERY}.weight"), (VAE, "decoder.conv_in.weight"), (TEXT, "shared.weight")]
)
def test_a_build_finds_them(checkpoint: Path, file: str, name: str) -> None:
    tensors = load_file(checkpoint / file)
    tensors[name].flat[-1] = np.nan
    save_file(tensors, checkpoint / file)
    with pytest.raises(CheckpointError, match=rf"{file}: tensor '{name}' holds values that are not finite"):
        build_engines(checkpoint, checkpoint.parent / "bundle")
    assert [path.name for path in checkpoint.parent.iterdir()] == ["checkpoint"]


def test_a_value_beyond_half_precision_is_named_there(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / TRANSFORMER)
    tensors[f"{QUERY}.weight"].flat[3] = -70000.0
    save_file(tensors, checkpoint / TRANSFORMER)
    with pytest.raises(CheckpointError, match=f"tensor '{QUERY}.weight' holds 70000, which float16 cannot; build at"):
        build_engines(checkpoint, checkpoint.parent / "half", precision="fp16")
    assert not (checkpoint.parent / "half").exists()
    build_engines(checkpoint, checkpoint.parent / "full")
