"""Networks in single files under Wan's own names: the same bundles, and a clear word on all other files."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler
from safetensors.numpy import load_file, save_file

from t2v_rt import CheckpointError, build_engines
from t2v_rt.cli import main
from t2v_rt.export.checkpoint import open_checkpoint, read_configs
from t2v_rt.export.single_files import WRAPPING
from t2v_rt.export.wan import published as wan_published
from t2v_rt.export.wan.family import FAMILY
from t2v_rt.export.wan.names import SINGLE_FILES, renamed
from tests.conftest import Tiny
from tests.support.checkpoints import TINY, TinyWan
from tests.support.wan_original import diffusers_names, write_single_files

DEEP = TINY[2]  # two residual blocks a level, as the published VAE has and diffusers' converter expects
NETWORKS = ("text_encoder", "transformer", "vae")


@pytest.fixture(scope="module")
def deep(make_tiny: Callable[[TinyWan], Tiny]) -> Tiny:
    return make_tiny(DEEP)


@pytest.fixture(scope="module")
def files(deep: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same checkpoint in single files; changed by no test."""
    written = write_single_files(DEEP, deep.checkpoint, tmp_path_factory.mktemp("single") / "files")
    shutil.copy(deep.checkpoint / "tokenizer" / "tokenizer.json", next(iter(written.values())).parent)
    return written


@pytest.fixture
def tiny_is_published(deep: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """The configs of files that come without are the tiny checkpoint's, not those of the true size."""
    monkeypatch.setattr(FAMILY, "single_files", replace(SINGLE_FILES, configs=read_configs(deep.checkpoint)))


def built_files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "bundle.json"
    }


@pytest.mark.parametrize("network", NETWORKS)
def test_names_are_those_of_diffusers(network: str) -> None:
    names = diffusers_names(DEEP, network)
    assert SINGLE_FILES.identify(names) == network
    found = renamed(network, names)
    for name, new in names.items():
        if network != "vae" or not name.startswith(("encoder.", "conv1.")):  # of which nothing is exported
            assert found[name] == new
    assert None not in found.values()
    assert renamed(network, names.values()) == {new: new for new in names.values()}


def test_what_was_published() -> None:
    defaults = inspect.signature(AutoencoderKLWan.__init__).parameters
    vae = wan_published.CONFIGS["vae"]
    for key, value in vae.items():
        if key != "_class_name":
            assert value == defaults[key].default
    known = UniPCMultistepScheduler.from_config(wan_published.SCHEDULER).config
    assert {key: known[key] for key in wan_published.SCHEDULER if key != "_class_name"}.items() <= dict(
        wan_published.SCHEDULER
    ).items()


def test_files_beside_a_checkpoint(deep: Tiny, files: dict[str, Path], tmp_path: Path) -> None:
    bundle = build_engines(deep.checkpoint, tmp_path / "b", files=files)
    assert built_files(bundle.folder) == built_files(deep.bundle)
    assert bundle.manifest.components == open_manifest(deep).components


def open_manifest(tiny: Tiny) -> Any:
    from t2v_rt.engines.bundle.store import open_bundle

    return open_bundle(tiny.bundle).manifest


@pytest.mark.usefixtures("tiny_is_published")
def test_a_folder_of_files(deep: Tiny, files: dict[str, Path], tmp_path: Path) -> None:
    size = ["--height", "32", "--width", "48", "--num-frames", "5"]
    folder = next(iter(files.values())).parent
    assert main(["build-engines", str(folder), "--output", str(tmp_path / "b"), *size]) == 0
    assert built_files(tmp_path / "b") == built_files(deep.bundle)
    options = [f"--{name.replace('_', '-')}={file}" for name, file in files.items()]
    options += ["--tokenizer", str(deep.checkpoint / "tokenizer"), "--output", str(tmp_path / "c"), *size]
    assert main(["build-engines", *options]) == 0
    assert built_files(tmp_path / "c") == built_files(deep.bundle)


def test_names_of_a_training_program(files: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(files["transformer"])
    save_file({WRAPPING + name: tensor for name, tensor in tensors.items()}, tmp_path / "t.safetensors")
    found = SINGLE_FILES.open(tmp_path / "t.safetensors", "transformer")
    assert set(found.tensors) == set(SINGLE_FILES.open(files["transformer"], "transformer").tensors)


def _add(name: str, array: Any = None) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        tensors = load_file(file)
        tensors[name] = np.zeros(1, np.float32) if array is None else array
        save_file(tensors, file)

    return change


def _as_pickle(file: Path) -> None:
    file.rename(file.with_suffix(".pth"))


def _of_8_bits(file: Path) -> None:
    import torch
    from safetensors.torch import load_file as load
    from safetensors.torch import save_file as save

    save({name: tensor.to(torch.float8_e4m3fn) for name, tensor in load(file).items()}, file)


FILES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "unknown tensors": ("transformer", _add("blocks.0.other.up"), "1 tensors are not known .*'blocks.0.other.up'"),
    "image to video": ("transformer", _add("img_emb.proj.0.weight"), "of an image-to-video model"),
    "vace": ("transformer", _add("vace_blocks.0.modulation"), "of a VACE model"),
    "wan 2.2 vae": ("vae", _add("decoder.upsamples.0.upsamples.0.x"), "VAE of Wan2.2"),
    "8 bits": ("text_encoder", _of_8_bits, r"8-bit floats \(F8_E4M3\); expected .*umt5_xxl_fp16"),
    "damaged": ("vae", lambda file: file.write_bytes(b"\xff" * 100), "damaged or truncated"),
    "absent": ("vae", Path.unlink, "no single file of the vae"),
    "a pickle": ("vae", _as_pickle, "vae.pth is a pickle, which .* use wan_2.1_vae.safetensors"),
    "twice": (
        "vae",
        lambda file: shutil.copy(file, file.with_name("x.safetensors")),
        "2 files hold a vae .*--vae FILE",
    ),
    "no tokenizer": ("vae", lambda file: (file.parent / "tokenizer.json").unlink(), "0 files tokenizer.json"),
}


@pytest.mark.usefixtures("tiny_is_published")
@pytest.mark.parametrize("name", list(FILES))
def test_other_files_are_refused(files: dict[str, Path], tmp_path: Path, name: str) -> None:
    network, change, message = FILES[name]
    folder = tmp_path / "files"
    shutil.copytree(files[network].parent, folder)
    change(folder / f"{network}.safetensors")
    with pytest.raises(CheckpointError, match=message):
        build_engines(folder, tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["files"]


def test_options_that_do_not_fit(deep: Tiny, files: dict[str, Path], tmp_path: Path) -> None:
    for given, message in (
        ({"vae": files["transformer"]}, "holds the transformer; expected the vae, such as wan_2.1_vae"),
        ({"vae": tmp_path / "none.safetensors"}, "is missing; expected the weights of the vae"),
        ({"vae": tmp_path / "Wan2.1_VAE.pth"}, "is a pickle"),
        ({"tokenizer": tmp_path}, "tokenizer.json is missing"),
        ({"unet": files["vae"]}, "'unet'; expected one of text_encoder, transformer, vae, tokenizer"),
    ):
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(deep.checkpoint, given)
    with pytest.raises(CheckpointError, match=r"the missing files too: --text-encoder, --vae, --tokenizer"):
        open_checkpoint(None, {"transformer": files["transformer"]})


def test_the_published_configs_are_checked_against_the_weights(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="weights and config do not belong together"):
        build_engines(next(iter(files.values())).parent, tmp_path / "b")
    assert not list(tmp_path.iterdir())
    assert SINGLE_FILES.configs.networks == wan_published.CONFIGS
