"""Checkpoints of the hub: huggingface_hub's own client against a hub on this machine, and its cache without one."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from t2v_rt import CheckpointError, InputError, RequestError, build_engines
from t2v_rt.cli import main
from t2v_rt.export import hub
from t2v_rt.export.hub import fetch, is_hub_name, needed_tokenizer, needed_weights
from t2v_rt.export.wan.family import FAMILY
from tests.conftest import Tiny
from tests.support.hub_server import COMMIT, Hub, serve

constants = pytest.importorskip("huggingface_hub.constants", reason="needs t2v-rt[hub]")
NAME = "some-owner/tiny-wan"
UNREACHABLE = "http://127.0.0.1:9"  # the discard port, on which nothing listens


@pytest.fixture
def repository(narrow: Tiny, tmp_path: Path) -> Path:
    """What a repository holds: the checkpoint, and much that nobody needs."""
    folder = tmp_path / "repository"
    shutil.copytree(narrow.checkpoint, folder)
    for name in ("README.md", "original/Wan2.1_VAE.pth", "assets/demo.mp4", "transformer/pytorch_model.bin"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("not needed")
    for network in ("transformer", "vae"):
        shutil.copy(
            folder / network / "diffusion_pytorch_model.safetensors",
            folder / network / "diffusion_pytorch_model.fp16.safetensors",
        )
    return folder


@pytest.fixture
def served(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that has it, asked with an empty cache of the client's own."""
    with serve(NAME, repository) as running:
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "ENDPOINT", running.endpoint)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", running.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        yield running


def cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", UNREACHABLE)


def test_only_what_is_needed_is_downloaded(narrow: Tiny, served: Hub, tmp_path: Path) -> None:
    bundle = build_engines(NAME, tmp_path / "b")
    assert bundle.manifest.bundle_id == build_engines(narrow.checkpoint, narrow.bundle).manifest.bundle_id
    assert sorted(served.fetched) == [
        "generation_config.json",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    served.fetched.clear()
    build_engines(NAME, tmp_path / "c", revision=COMMIT)
    assert served.fetched == []


def test_without_a_network_the_cache_serves(
    served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = build_engines(NAME, tmp_path / "b").manifest.bundle_id
    cut_off(monkeypatch)
    assert build_engines(NAME, tmp_path / "c").manifest.bundle_id == first
    assert "is taken from the cache" in caplog.text
    weights = next((tmp_path / "cache").rglob("snapshots/*/vae/*.safetensors"))
    weights.unlink()
    with pytest.raises(CheckpointError, match="no weights found"):
        build_engines(NAME, tmp_path / "d")


def test_a_cache_as_others_left_it(
    narrow: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The layout that all versions of the client share: refs name a commit, snapshots hold its files."""
    place = tmp_path / "cache" / "models--some-owner--tiny-wan"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(COMMIT)
    blobs = place / "blobs"
    blobs.mkdir()
    for file in narrow.checkpoint.rglob("*"):
        if file.is_file():
            blob = blobs / f"{len(list(blobs.iterdir())):040}"
            shutil.copy(file, blob)
            link = place / "snapshots" / COMMIT / file.relative_to(narrow.checkpoint)
            link.parent.mkdir(parents=True, exist_ok=True)
            if os.name == "posix":
                link.symlink_to(blob)
            else:  # as the client does where links need rights of their own
                shutil.copy(blob, link)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    cut_off(monkeypatch)
    bundle = build_engines(NAME, tmp_path / "b")
    assert bundle.manifest.bundle_id == build_engines(narrow.checkpoint, narrow.bundle).manifest.bundle_id
    with pytest.raises(CheckpointError, match="the hub does not answer, and it is not in the hub's cache"):
        build_engines(NAME, tmp_path / "c", revision="v2")
    with pytest.raises(CheckpointError, match="the hub does not answer"):
        build_engines("some-owner/other", tmp_path / "c")


def test_what_the_hub_refuses(
    served: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(name: str, *options: str) -> str:
        assert main(["build-engines", name, "--output", str(tmp_path / "b"), *options]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        return line

    assert "neither a folder here nor a repository of the hub" in refused("some-owner/none")
    assert "has no revision 'v9'" in refused(NAME, "--revision", "v9")
    assert "is not owner/name on the hub" in refused(str(served.folder), "--revision", "main")
    served.gated = True
    assert "is gated: accept its terms" in refused(NAME)
    assert served.fetched == []
    served.gated = False
    monkeypatch.setattr("t2v_rt.export.hub.free_disk_bytes", lambda path: 1000)
    line = refused(NAME)
    assert "are to be downloaded" in line
    assert "1e-06 GB are free" in line
    assert not [name for name in served.fetched if name.endswith(".safetensors")]


def test_other_architectures_are_refused_before_their_weights_come(
    served: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = served.folder / "model_index.json"
    content = json.loads(index.read_text())
    index.write_text(json.dumps({**content, "_class_name": "LTXPipeline"}))
    with pytest.raises(CheckpointError, match="names the pipeline 'LTXPipeline'; supported: WanPipeline"):
        fetch(NAME)
    assert not [name for name in served.fetched if name.endswith(".safetensors")]


def test_which_files_are_needed() -> None:
    others = ["model_index.json", "tokenizer/tokenizer.json", "vae/diffusion_pytorch_model.safetensors"]
    shards = [f"text_encoder/model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = "text_encoder/model.safetensors.index.json"
    whole = ["text_encoder/model.safetensors", "transformer/diffusion_pytorch_model.safetensors"]
    assert needed_weights(NAME, [*others, *shards, index, *whole], FAMILY) == [*shards, index, whole[1], others[2]]
    with pytest.raises(CheckpointError, match=r"text_encoder/ has only pickled weights, which can run code"):
        needed_weights(NAME, [*others, whole[1], "text_encoder/pytorch_model-00001-of-00002.bin"], FAMILY)
    with pytest.raises(CheckpointError, match="transformer/ has no weights"):
        needed_weights(NAME, [*others, whole[0]], FAMILY)
    with pytest.raises(
        CheckpointError, match=r"no tokenizer/tokenizer\.json; expected a checkpoint in diffusers layout"
    ):
        needed_tokenizer(NAME, ["model_index.json"], FAMILY)


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_hub_name("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    for other in ("name", "a/b/c", "/a/b", "./a", "a/", "../b"):
        assert not is_hub_name(other)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert not is_hub_name("a/b")


def test_a_missing_client_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(InputError, match=r"is not a folder here; .* install t2v-rt\[hub\]"):
        build_engines(NAME, tmp_path / "b")
    assert hub.NAME.fullmatch(NAME)
    with pytest.raises(RequestError, match="leave it out"):
        build_engines(tmp_path, tmp_path / "b", revision="main")
