"""The text encoder and its embedding against transformers'."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import UMT5EncoderModel

from t2v_rt import TextToVideoPipeline, build_engines
from t2v_rt.benchmarks.make_checkpoint import changed, make_checkpoint
from t2v_rt.benchmarks.true_size import lengths, parity, relative
from t2v_rt.benchmarks.wan_tensors import CONFIGS
from t2v_rt.engines.backends import get_backend
from t2v_rt.engines.bundle.manifest import EmbeddingSpec
from t2v_rt.engines.bundle.store import Bundle
from t2v_rt.export.checkpoint import open_checkpoint
from t2v_rt.export.components import export_embedding
from t2v_rt.runtime.prompts.embedding import EmbeddingTable
from tests.conftest import ONE_EACH, Tiny
from tests.export.test_make_checkpoint import SMALL

TOLERANCE = 1e-4  # float32 sums in another order, relative to the largest value
PROMPTS = ("a red ball", "一只猫 在 red 球 上", "the quick brown fox jumps over the lazy dog " * 3)


@pytest.mark.parametrize("budget", [None, 1])
def test_embeddings_are_those_of_transformers(tiny: Tiny, sharded: Bundle, budget: int | None) -> None:
    stages = TextToVideoPipeline(sharded, get_backend("onnxruntime"), budget)
    found = stages.encode_prompt(PROMPTS)
    for text, embeds in zip(PROMPTS, found, strict=True):
        with torch.no_grad():
            expected, _ = tiny.reference.encode_prompt(text, do_classifier_free_guidance=False, max_sequence_length=512)
        assert relative(embeds[None], expected.numpy()) < TOLERANCE


@pytest.mark.parametrize("kept", [("shared.weight",), ("encoder.embed_tokens.weight",), ("both", "differ")])
def test_the_embedding_is_the_one_that_transformers_takes(narrow: Tiny, tmp_path: Path, kept: tuple[str, ...]) -> None:
    checkpoint = open_checkpoint(narrow.checkpoint)
    tensors = load_file(checkpoint.weights["text_encoder"].files[0])
    table = tensors.pop("shared.weight")
    names = ("shared.weight", "encoder.embed_tokens.weight") if len(kept) == 2 else kept
    tensors |= {name: table + np.float32(i) for i, name in enumerate(names)}
    folder = tmp_path / "text_encoder"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(checkpoint.configs.networks["text_encoder"]), encoding="utf-8")
    reference = UMT5EncoderModel.from_pretrained(folder)
    expected = reference.encoder.embed_tokens.weight.detach().numpy()
    weights = {**checkpoint.weights, "text_encoder": type(checkpoint.weights["vae"]).open(folder)}
    changed_source = type(checkpoint)(**{**vars(checkpoint), "weights": weights})
    spec = export_embedding(changed_source, checkpoint.family.read_configs(checkpoint.configs), tmp_path)
    rows = EmbeddingTable(tmp_path, spec).rows(np.arange(spec.rows))
    assert np.array_equal(rows[0], expected)


def test_a_sharded_bfloat16_checkpoint(tmp_path: Path) -> None:
    """The measurements of the true size, on a small one of the same layout."""
    configs = changed(CONFIGS, (*SMALL, "text_encoder.num_layers=5", "text_encoder.vocab_size=300"))
    checkpoint, bundle = tmp_path / "checkpoint", tmp_path / "bundle"
    make_checkpoint(checkpoint, configs, shard_bytes=60_000)
    assert len(list((checkpoint / "text_encoder").glob("*.safetensors"))) > 2
    embedding = build_engines(checkpoint, bundle, vram_budget=ONE_EACH).manifest.components["text_encoder"].embedding
    assert embedding == EmbeddingSpec("text_encoder/embedding.data", "bfloat16", 300, 32)
    assert (bundle / embedding.path).stat().st_size == 300 * 32 * 2
    report = parity(checkpoint, bundle)
    assert report["tokens"] == 40
    assert report["block_error"] < TOLERANCE
    assert report["encoder_error"] < TOLERANCE
    assert set(lengths(bundle)) == {"10", "40", "200"}
