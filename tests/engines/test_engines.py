"""Backends by name, bundles on disk, and specs; the engine contract is in test_engine_contract.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from t2v_rt import BackendError, BundleError, TextToVideoPipeline, build_engines
from t2v_rt.engines.backends import get_backend
from t2v_rt.engines.bundle.manifest import from_plain, to_plain
from t2v_rt.engines.bundle.store import Stamps, open_bundle
from t2v_rt.engines.specs import TensorSpec
from t2v_rt.system.files import replace_directory
from tests.conftest import Tiny

FORBIDDEN = {"ScatterND", "ScatterElements", "NonZero", "Loop", "If", "Scan"}


def test_unknown_backends_and_providers() -> None:
    with pytest.raises(BackendError, match="expected one of onnxruntime, tensorrt-rtx, tensorrt"):
        get_backend("openvino")
    with pytest.raises(BackendError, match="tensorrt runs the plans of a bundle; open one that was built for it"):
        get_backend("tensorrt")
    with pytest.raises(BackendError, match="cuda"):
        get_backend("onnxruntime", provider="cuda")


def test_graphs_hold_no_op_that_engines_choke_on(narrow: Tiny) -> None:
    attention = {"text_encoder": 2, "transformer": 4, "head": 1, "tail": 0}
    for path in sorted(narrow.bundle.rglob("*.onnx")):
        model = onnx.load(str(path), load_external_data=False)
        onnx.checker.check_model(str(path))
        kinds = [node.op_type for node in model.graph.node]
        assert not FORBIDDEN & set(kinds)
        part = path.stem.split("_")[0] if path.parent.name == "vae_decoder" else path.parent.name
        assert kinds.count("Attention") == attention[part]
        types = {tensor.data_type for tensor in model.graph.initializer}
        assert onnx.TensorProto.DOUBLE not in types


def test_a_bundle_is_reused_only_when_nothing_changed(narrow: Tiny, tmp_path: Path) -> None:
    checkpoint, bundle = tmp_path / "checkpoint", tmp_path / "bundle"
    shutil.copytree(narrow.checkpoint, checkpoint)

    def built() -> int:
        build_engines(checkpoint, bundle)
        return (bundle / "bundle.json").stat().st_mtime_ns

    first = built()
    assert built() == first
    defaults = checkpoint / "generation_config.json"
    defaults.write_text(defaults.read_text().replace('"fps": 8', '"fps": 9'))
    second = built()
    assert second != first
    assert TextToVideoPipeline.from_pretrained(bundle).manifest.defaults.fps == 9
    (bundle / "transformer" / "model.onnx").write_bytes(b"")
    assert built() != second
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")] == []


def test_the_same_inputs_give_the_same_bundle(narrow: Tiny, tmp_path: Path) -> None:
    again = build_engines(narrow.checkpoint, tmp_path / "again")
    for path in narrow.bundle.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (again.folder / path.relative_to(narrow.bundle)).read_bytes()


def test_build_engines_is_the_command(narrow: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from t2v_rt.cli import main

    assert main(["build-engines", str(narrow.checkpoint), "--output", str(tmp_path / "b"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["bundle_id"] == open_bundle(narrow.bundle).manifest.bundle_id


def test_stamps_see_a_change(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(b"one")
    stamps = Stamps(tmp_path)
    before = stamps.sha256("x")
    stamps.save()
    assert Stamps(tmp_path).sha256("x") == before
    file.write_bytes(b"two")
    assert Stamps(tmp_path).sha256("x") != before


def test_a_half_precision_bundle_is_near_the_full_one(narrow: Tiny, tmp_path: Path) -> None:
    """A check of the casts' places, not of a GPU's accumulation."""
    build_engines(narrow.checkpoint, tmp_path / "half", precision="fp16")
    half, full = (TextToVideoPipeline.from_pretrained(path) for path in (tmp_path / "half", narrow.bundle))
    embeds = [pipe.encode_prompt(["a red ball"]) for pipe in (half, full)]
    assert 0 < np.abs(embeds[0] - embeds[1]).max() < 1e-2 * np.abs(embeds[1]).max()
    frames = [pipe("a red ball", seed=1).frames for pipe in (half, full)]
    assert np.abs(frames[0] - frames[1]).mean() < 0.02


def test_specs() -> None:
    spec = TensorSpec("x", "float32", (1, "2*height", "width"))
    assert spec.resolve({"height": 3, "width": 5}) == (1, 6, 5)
    assert spec.nbytes({"height": 3, "width": 5}) == 120
    assert from_plain(to_plain(spec), TensorSpec) == spec
    for shape in (("x*height",), ("0*height",)):
        with pytest.raises(BundleError, match="not understood"):
            TensorSpec("x", "float32", shape)
    with pytest.raises(BundleError, match="bfloat16"):
        TensorSpec("x", "bfloat16", (1,))


def test_replacing_a_folder(tmp_path: Path) -> None:
    target, new = tmp_path / "target", tmp_path / "new"
    for folder, text in ((target, "old"), (new, "new")):
        folder.mkdir()
        (folder / "file").write_text(text)
    replace_directory(new, target)
    assert (target / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    with pytest.raises(FileNotFoundError):
        replace_directory(tmp_path / "none", target)
    assert (target / "file").read_text() == "new"
