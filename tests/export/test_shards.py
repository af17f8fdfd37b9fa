"""Which files of a network's folder are read: whole ones and shards, of every variant, as diffusers names them."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from diffusers import AutoencoderKLWan
from safetensors.numpy import load_file, save_file

from t2v_rt import CheckpointError
from t2v_rt.export.hub import needed_weights
from t2v_rt.export.tensors import CheckpointWeights
from t2v_rt.export.wan.family import FAMILY
from tests.conftest import Tiny

STEM = "diffusion_pytorch_model"


@pytest.fixture
def vae(narrow: Tiny, tmp_path: Path) -> Path:
    """A copy of the VAE's folder, with its one whole file."""
    return Path(shutil.copytree(narrow.checkpoint / "vae", tmp_path / "vae"))


def shard(folder: Path, variant: str = "", *, stem: str = STEM, older: bool = False, times: float = 1.0) -> list[Path]:
    """Writes the whole file's tensors, multiplied, in two shards with an index."""
    tensors = load_file(folder / f"{STEM}.safetensors")
    names = sorted(tensors)
    mark = f".{variant}" if variant else ""
    index: dict[str, str] = {}
    files = []
    for i, part in enumerate((names[::2], names[1::2]), 1):
        number = f"-{i:05}-of-00002"
        file = folder / (f"{stem}{number}{mark}.safetensors" if older else f"{stem}{mark}{number}.safetensors")
        save_file({name: tensors[name] * np.float32(times) for name in part}, file)
        index |= dict.fromkeys(part, file.name)
        files.append(file)
    middle = f"{mark}.index" if older else f".index{mark}"
    (folder / f"{stem}.safetensors{middle}.json").write_text(json.dumps({"weight_map": index}))
    return files


def factor(folder: Path, whole: Path) -> float:
    """What the tensors of a folder are, by those of a whole file."""
    read, known = CheckpointWeights.open(folder), load_file(whole)
    assert read.tensors.keys() == known.keys()
    name = "decoder.conv_in.weight"
    return float((read.read(name, known[name].shape) / known[name]).mean())


@pytest.mark.parametrize("older", [False, True])
@pytest.mark.parametrize("variant", ["", "fp16", "non_ema"])
@pytest.mark.parametrize("stem", ["model", STEM])
def test_shards_of_any_variant_are_read(narrow: Tiny, vae: Path, stem: str, variant: str, older: bool) -> None:
    shard(vae, variant, stem=stem, older=older, times=2)
    (vae / f"{STEM}.safetensors").unlink()
    assert factor(vae, narrow.checkpoint / "vae" / f"{STEM}.safetensors") == 2


def test_the_names_are_those_that_diffusers_writes(narrow: Tiny, tmp_path: Path) -> None:
    model = AutoencoderKLWan.from_pretrained(narrow.checkpoint / "vae")
    model.save_pretrained(tmp_path / "vae", variant="fp16", max_shard_size="50KB")
    names = sorted(path.name for path in (tmp_path / "vae").iterdir())
    assert f"{STEM}.safetensors.index.fp16.json" in names
    assert names[1].startswith(f"{STEM}.fp16-00001-of-")
    assert factor(tmp_path / "vae", narrow.checkpoint / "vae" / f"{STEM}.safetensors") == 1


def test_the_plain_variant_goes_before_others(narrow: Tiny, vae: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    whole = narrow.checkpoint / "vae" / f"{STEM}.safetensors"
    shard(vae, "fp16", times=2)
    shutil.copy(whole, vae / f"{STEM}.bf16.safetensors")
    assert factor(vae, whole) == 1
    assert "the variants without a name, bf16, fp16 are there; that without a name is read" in caplog.text
    shard(vae, times=3)  # and an index before a whole file, as diffusers has it
    assert factor(vae, whole) == 3
    for file in vae.glob(f"{STEM}-*"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"shard named in .* is missing"):
        factor(vae, whole)


def test_the_one_variant_that_is_there_is_read(narrow: Tiny, vae: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    (vae / f"{STEM}.safetensors").rename(vae / f"{STEM}.fp16.safetensors")
    (vae / f"._{STEM}.fp16.safetensors").write_bytes(b"\0\5\x16\7" + bytes(60))
    (vae / "other.safetensors").mkdir()
    whole = narrow.checkpoint / "vae" / f"{STEM}.safetensors"
    assert factor(vae, whole) == 1
    assert "the variants fp16 are there; fp16 is read" in caplog.text
    shutil.copy(whole, vae / f"{STEM}.bf16.safetensors")
    with pytest.raises(CheckpointError, match=r"weights of 2 variants \(bf16, fp16\); expected one, .* remove the oth"):
        factor(vae, whole)


def test_a_tensor_in_two_shards_is_that_of_the_shard_which_the_index_names(narrow: Tiny, vae: Path) -> None:
    whole = narrow.checkpoint / "vae" / f"{STEM}.safetensors"
    files = shard(vae, times=2)
    (vae / f"{STEM}.safetensors").unlink()
    tensors = [load_file(file) for file in files]
    for file, own, other in zip(files, tensors, reversed(tensors), strict=True):  # each has all, and those in halves
        save_file({**{name: array / 2 for name, array in other.items()}, **own}, file)
    assert factor(vae, whole) == 2
    name = "decoder.conv_in.weight"
    index = vae / f"{STEM}.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    places[name] = next(file.name for file in files if file.name != places[name])
    index.write_text(json.dumps({"weight_map": places}))
    assert factor(vae, whole) == 1
    del places[name]
    index.write_text(json.dumps({"weight_map": places}))
    with pytest.raises(CheckpointError, match=rf"tensor '{name}' is in .*-00001-.* and in .*-00002-.* names neither"):
        factor(vae, whole)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_an_index_without_a_map_is_refused(vae: Path, content: str) -> None:
    (vae / f"{STEM}.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match="not a readable index; expected a 'weight_map'"):
        CheckpointWeights.open(vae)


def test_an_index_leads_nowhere_else(vae: Path) -> None:
    for place in ("../vae/x.safetensors", "/etc/passwd"):
        (vae / f"{STEM}.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": place}}))
        with pytest.raises(CheckpointError, match=r"shard named in .*index\.json is missing"):
            CheckpointWeights.open(vae)


def test_a_repository_of_one_variant_is_downloaded() -> None:
    shards = [f"transformer/{STEM}.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = f"transformer/{STEM}.safetensors.index.fp16.json"
    others = [f"vae/{STEM}.fp16.safetensors", "text_encoder/model.safetensors"]
    unneeded = ["model_index.json", "tokenizer/tokenizer.json", "text_encoder/model.fp16.safetensors"]
    assert sorted(needed_weights("a/b", [*unneeded, *shards, index, *others], FAMILY)) == sorted(
        [*shards, index, *others]
    )
