"""The generator of random checkpoints: what it writes is built and runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from t2v_rt import RequestError, TextToVideoPipeline, build_engines
from t2v_rt.benchmarks.make_checkpoint import changed, make_checkpoint
from t2v_rt.benchmarks.wan_tensors import CONFIGS
from t2v_rt.export.tensors import CheckpointWeights

SMALL = (
    "transformer.num_layers=2",
    "transformer.num_attention_heads=2",
    "transformer.attention_head_dim=16",
    "transformer.ffn_dim=48",
    "transformer.text_dim=32",
    "vae.base_dim=8",
    "vae.num_res_blocks=1",
    "text_encoder.d_model=32",
    "text_encoder.vocab_size=40",
)
SCALE_TOLERANCE = 0.42  # of the root mean square: exponents are whole powers of two


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_a_small_one_is_sharded_and_runs(dtype: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    report = make_checkpoint(folder, changed(CONFIGS, SMALL), dtype=dtype, shard_bytes=30_000)
    assert report["bytes"] == sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 2
    weights = CheckpointWeights.open(folder / "transformer")
    first, second = (weights.read(f"blocks.{i}.ffn.net.0.proj.weight", (48, 32)) for i in (0, 1))
    assert not np.array_equal(first, second)
    assert abs(np.sqrt((first**2).mean()) * np.sqrt(32) - 1) < SCALE_TOLERANCE
    assert weights.read("blocks.0.attn1.norm_q.weight", (32,)).min() >= 1
    build_engines(folder, tmp_path / "bundle")
    video = TextToVideoPipeline.from_pretrained(tmp_path / "bundle")(
        "word1 word2", height=16, width=16, num_frames=5, num_inference_steps=1, seed=0
    )
    assert np.isfinite(video.frames).all()


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from t2v_rt.benchmarks import make_checkpoint as command

    arguments = ["make_checkpoint", str(tmp_path / "x"), *(part for change in SMALL for part in ("--set", change))]
    monkeypatch.setattr("sys.argv", arguments)
    command.main()
    report = json.loads(capsys.readouterr().out)
    assert report["seconds_per_gb"] > 0
    with pytest.raises(RequestError, match="exists already"):
        make_checkpoint(tmp_path / "x")
    with pytest.raises(RequestError, match="expected one of fp32"):
        make_checkpoint(tmp_path / "y", dtype="int8")
    with pytest.raises(RequestError, match="family is 'none'; expected one of wan"):
        make_checkpoint(tmp_path / "y", family="none")
    for change in ("nothing", "vae.unknown=1", "vae.base_dim=wide"):
        with pytest.raises(RequestError, match="such as"):
            changed(CONFIGS, [change])
