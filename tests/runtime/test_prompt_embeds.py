"""Prompt embeddings: kept from process to process, written to files, and used without the text encoder."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from t2v_rt import RequestError, TextToVideoPipeline, build_engines
from t2v_rt.cli import main
from t2v_rt.engines.bundle.manifest import ComponentSpec
from t2v_rt.engines.onnxruntime.backend import OnnxRuntimeBackend, OrtComponent
from t2v_rt.runtime.prompts.cache import PromptCache
from t2v_rt.runtime.prompts.file import PromptEmbeds, load_prompt, save_prompt
from tests.conftest import Tiny

SETTINGS: dict[str, Any] = {"seed": 1, "num_inference_steps": 2}


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Names of the components that are loaded, with a cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    names: list[str] = []
    load = OnnxRuntimeBackend.load

    def watched(backend: OnnxRuntimeBackend, folder: Path, name: str, spec: ComponentSpec) -> OrtComponent:
        names.append(name)
        return load(backend, folder, name, spec)

    monkeypatch.setattr(OnnxRuntimeBackend, "load", watched)
    return names


def test_a_text_is_encoded_once_on_a_machine(narrow: Tiny, loads: list[str]) -> None:
    first = TextToVideoPipeline.from_pretrained(narrow.bundle)("a red ball", **SETTINGS)
    second = TextToVideoPipeline.from_pretrained(narrow.bundle)("a red ball", **SETTINGS)
    assert np.array_equal(first.frames, second.frames)
    assert loads.count("text_encoder") == 1
    TextToVideoPipeline.from_pretrained(narrow.bundle)("a blue box", **SETTINGS)
    assert loads.count("text_encoder") == 2
    TextToVideoPipeline.from_pretrained(narrow.bundle, prompt_cache=False)("a red ball", **SETTINGS)
    assert loads.count("text_encoder") == 3


def test_entries_are_private_and_belong_to_their_encoder(
    narrow: Tiny, loads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    TextToVideoPipeline.from_pretrained(narrow.bundle).encode_prompt(["a red ball"])
    (entry,) = (tmp_path / "cache").rglob("*.npy")
    if os.name == "posix":
        assert stat.S_IMODE(entry.stat().st_mode) == 0o600
    assert b"red" not in entry.read_bytes()
    monkeypatch.setattr(OnnxRuntimeBackend, "identity", "another library")
    TextToVideoPipeline.from_pretrained(narrow.bundle).encode_prompt(["a red ball"])
    assert loads == ["text_encoder"] * 2


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY broken", "other shape", "not finite"])
def test_damaged_entries_are_made_again(narrow: Tiny, loads: list[str], tmp_path: Path, damage: bytes | str) -> None:
    expected = TextToVideoPipeline.from_pretrained(narrow.bundle).encode_prompt(["a red ball"])
    (entry,) = (tmp_path / "cache").rglob("*.npy")
    rows = np.load(entry)
    if isinstance(damage, bytes):
        entry.write_bytes(damage)
    else:
        np.save(entry, rows[:1] if damage == "other shape" else np.full_like(rows, np.nan))
    for _ in range(2):
        again = TextToVideoPipeline.from_pretrained(narrow.bundle).encode_prompt(["a red ball"])
        assert np.array_equal(again, expected)
    assert loads == ["text_encoder"] * 2


def test_a_cache_that_cannot_be_written_is_done_without(
    narrow: Tiny, loads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    TextToVideoPipeline.from_pretrained(narrow.bundle).encode_prompt(["a red ball"])
    assert loads == ["text_encoder"]


def test_what_was_used_longest_ago_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    rows, ids = np.ones((10, 100), np.float32), [np.arange(i, i + 10) for i in range(4)]
    cache = PromptCache("encoder", most_bytes=3 * (rows.nbytes + 200))
    for i in range(3):
        cache.put(ids[i], rows)
        os.utime(tmp_path / "t2v-rt/prompts" / cache._name(ids[i]), (i, i))
    assert cache.get(ids[0], 100) is not None  # now the one used last
    cache.put(ids[3], rows)
    assert [cache.get(tokens, 100) is not None for tokens in ids] == [True, False, True, True]


def test_a_file_stands_for_the_prompt(narrow: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle, embeds = str(narrow.bundle), str(tmp_path / "ball.npz")
    assert main(["encode", "a red ball", "--engines", bundle, "--output", embeds, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["encoder_id"] == TextToVideoPipeline.from_pretrained(bundle).manifest.encoder_id
    assert report["tokens"][0] > 1
    hashes: list[str] = []
    for source in (["a red ball"], ["--prompt-embeds", embeds]):
        output = str(tmp_path / f"{len(hashes)}.mp4")
        arguments = ["--engines", bundle, "--output", output, "--seed", "1", "--num-inference-steps", "2", "--json"]
        assert main(["generate", *source, *arguments]) == 0
        told = json.loads(capsys.readouterr().out)
        hashes.append(told["frames_sha256"])
        assert told["prompt"] == "a red ball"
    assert hashes[0] == hashes[1]
    assert len(told["prompt_embeds_sha256"]) == 64
    before = Path(embeds).read_bytes()
    assert main(["encode", "a red ball", "--engines", bundle, "--output", embeds]) == 0
    assert Path(embeds).read_bytes() == before


@pytest.fixture(scope="module")
def without(narrow: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("without") / "bundle"
    return build_engines(narrow.checkpoint, folder, with_text_encoder=False).folder


def test_a_bundle_without_its_text_encoder(narrow: Tiny, without: Path, tmp_path: Path) -> None:
    whole, lean = (TextToVideoPipeline.from_pretrained(folder) for folder in (narrow.bundle, without))
    assert whole.manifest.encoder_id == lean.manifest.encoder_id
    assert not any(path.startswith("text_encoder") for path in lean.manifest.files)
    with pytest.raises(RequestError, match=r"was built without its text encoder .*t2v-rt encode makes them"):
        lean("a red ball", **SETTINGS)
    assert main(["encode", "a", "--engines", str(without), "--output", str(tmp_path / "x.npz")]) == 2
    assert not (tmp_path / "x.npz").exists()
    both = whole.encode_prompt(["a red ball", ""])
    save_prompt(tmp_path / "ball.npz", PromptEmbeds("a red ball", "", both[:1], both[1:]), whole.manifest)
    embeds = load_prompt(tmp_path / "ball.npz", lean.manifest)
    found = lean(prompt_embeds=embeds.prompt_embeds, negative_prompt_embeds=embeds.negative_prompt_embeds, **SETTINGS)
    assert np.array_equal(found.frames, whole("a red ball", negative_prompt="", **SETTINGS).frames)
    assert main(["verify", str(without)]) == 0
    assert main(["plan", str(without)]) == 0
    assert main(["inspect", str(without)]) == 0


def test_files_that_cannot_be_used(narrow: Tiny, tmp_path: Path) -> None:
    pipe = TextToVideoPipeline.from_pretrained(narrow.bundle)
    manifest, path = pipe.manifest, tmp_path / "p.npz"
    embeds = PromptEmbeds("a", "", *np.split(pipe.encode_prompt(["a", ""]), 2))
    save_prompt(path, embeds, replace(manifest, encoder_id="0123456789abcdef"))
    with pytest.raises(
        RequestError, match=rf"text encoder 0123456789abcdef, the bundle's is {manifest.encoder_id}; make"
    ):
        load_prompt(path, manifest)
    save_prompt(path, replace(embeds, prompt_embeds=np.ones((1, 3, 5), np.float32)), manifest)
    with pytest.raises(RequestError, match=r"holds float32 \[3, 5\]; expected float32 \[positions, "):
        load_prompt(path, manifest)
    wrong = np.full((1, 3, manifest.model.text.dim), np.inf, np.float32)
    save_prompt(path, replace(embeds, prompt_embeds=wrong), manifest)
    with pytest.raises(RequestError, match="is damaged"):
        load_prompt(path, manifest)
    path.write_bytes(path.read_bytes()[:100])
    for bad in (path, tmp_path / "missing.npz", narrow.bundle / "bundle.json"):
        with pytest.raises(RequestError, match="no prompt embeddings can be read"):
            load_prompt(bad, manifest)
    with pytest.raises(RequestError, match=r"ends in \.npz"):
        save_prompt(tmp_path / "p.txt", embeds, manifest)


@pytest.mark.parametrize(
    "arguments", [[], ["a", "--prompt-embeds", "x.npz"], ["--prompt-embeds", "x.npz", "--negative-prompt", "b"]]
)
def test_one_source_of_the_prompt(narrow: Tiny, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", *arguments, "--engines", str(narrow.bundle), "--output", "x.mp4"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
