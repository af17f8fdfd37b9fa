"""A folder of single files as people have it: what is not needed is passed over, links are followed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from t2v_rt import CheckpointError
from t2v_rt.export.checkpoint import open_checkpoint
from t2v_rt.export.single_files import files_below
from tests.conftest import Tiny

PLACES = {
    "transformer/diffusion_pytorch_model.safetensors": "diffusion_models/wan.safetensors",
    "vae/diffusion_pytorch_model.safetensors": "vae/wan.safetensors",
    "text_encoder/model.safetensors": "text_encoders/umt5.safetensors",
    "tokenizer/tokenizer.json": "text_encoders/tokenizer.json",
}
NETWORKS = ("text_encoder", "transformer", "vae")


@pytest.fixture
def folder(narrow: Tiny, tmp_path: Path) -> Path:
    """The networks in single files, in folders named as ComfyUI names them."""
    models = tmp_path / "models"
    for source, place in PLACES.items():
        (models / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(narrow.checkpoint / source, models / place)
    return models


def link(path: Path, target: Path | str) -> None:
    try:
        path.symlink_to(target, target_is_directory=Path(path.parent, target).is_dir())
    except OSError:
        pytest.skip("links need rights of their own here")


def _move_and_link(folder: Path) -> None:
    far = folder.parent / "other disk"
    shutil.move(folder / "vae", far)
    link(folder / "vae", far)


def _loops(folder: Path) -> None:
    link(folder / "vae" / "up", folder)
    link(folder / "text_encoders" / "self", ".")
    link(folder / "a", "b")
    link(folder / "b", "a")


def _pipe(folder: Path) -> None:
    if os.name != "posix":
        pytest.skip("named pipes are elsewhere here")
    os.mkfifo(folder / "pipe.safetensors")


BESIDE: dict[str, Callable[[Path], Any]] = {
    "AppleDouble": lambda folder: (folder / "vae" / "._wan.safetensors").write_bytes(b"\0\5\x16\7" + bytes(60)),
    "broken file": lambda folder: (folder / "a lora.safetensors").write_bytes(b"broken"),
    "empty file": lambda folder: (folder / "vae" / "put_vae_here.safetensors").write_bytes(b""),
    "dangling link": lambda folder: link(folder / "old.safetensors", "nowhere.safetensors"),
    "folder named as a file": lambda folder: (folder / "x.safetensors").mkdir(),
    "linked folder": _move_and_link,
    "links in a loop": _loops,
    "folder there twice": lambda folder: link(folder / "unet", "diffusion_models"),
    "file there twice": lambda folder: link(folder / "vae" / "again.safetensors", "wan.safetensors"),
    "named pipe": _pipe,
    "pickle": lambda folder: (folder / "other.ckpt").write_bytes(b"\x80\x02}q\x00."),
}


@pytest.mark.parametrize("name", list(BESIDE))
def test_what_is_not_needed_is_passed_over(folder: Path, name: str) -> None:
    BESIDE[name](folder)
    found = open_checkpoint(folder)
    assert {network: len(found.weights[network].tensors) > 0 for network in NETWORKS} == dict.fromkeys(NETWORKS, True)


def _dangling(folder: Path) -> None:
    (folder / "vae" / "wan.safetensors").unlink()
    link(folder / "vae" / "wan.safetensors", "gone.safetensors")


def _gguf(folder: Path) -> None:
    (folder / "vae" / "wan.safetensors").rename(folder / "vae" / "wan.gguf")
    (folder / "vae" / "wan.gguf").write_bytes(b"GGUF\3\0\0\0")


def _broken_with_others(folder: Path) -> None:
    (folder / "vae" / "wan.safetensors").write_bytes(b"<html></html>")
    (folder / "zzz.safetensors").write_bytes(b"broken")


NEEDED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "broken": (
        lambda folder: (folder / "vae" / "wan.safetensors").write_bytes(b"\xff" * 100),
        "no single file of the vae can be read: .*wan.safetensors: damaged or truncated: 100 bytes",
    ),
    "dangling": (_dangling, "no single file of the vae can be read: .*wan.safetensors is a link to gone.safetensors, "),
    "page": (_broken_with_others, r"wan.safetensors is a web page, .* \(1 other files cannot be read either\)"),
    "gguf": (_gguf, "wan.gguf is a GGUF file, .*, such as wan_2.1_vae.safetensors"),
    "absent": (lambda folder: shutil.rmtree(folder / "vae"), "no model_index.json, and no single file of the vae"),
}


@pytest.mark.parametrize("name", list(NEEDED))
def test_what_is_needed_and_broken_is_one_line(folder: Path, name: str) -> None:
    spoil, message = NEEDED[name]
    spoil(folder)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_links_that_lead_round_in_circles_end(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "file").touch()
    link(tmp_path / "models" / "a" / "to b", Path("..", "b"))
    link(tmp_path / "models" / "b" / "to a", Path("..", "a"))
    link(tmp_path / "models" / "up", "..")
    assert len(files_below(tmp_path / "models")) == 2
