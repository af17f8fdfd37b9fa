"""A family that the product does not know takes a module and a line in the registry, no change elsewhere."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from safetensors.numpy import save_file

from t2v_rt import CheckpointError
from t2v_rt.build.job import BuildJob
from t2v_rt.build.needs import estimate_needs
from t2v_rt.build.options import BuildOptions
from t2v_rt.engines.backends import get_backend
from t2v_rt.engines.bundle.manifest import Defaults, TileSpec
from t2v_rt.engines.bundle.model import DecodeSchedule, LatentSpec, ModelSpec, TextSpec
from t2v_rt.engines.bundle.profiles import Accumulation, Range, VideoProfile
from t2v_rt.engines.specs import StateSpec, TensorSpec
from t2v_rt.export.checkpoint import open_checkpoint
from t2v_rt.export.components import check_tokenizer, export_component, export_embedding
from t2v_rt.export.config import CheckpointConfigs, require
from t2v_rt.export.family import FAMILIES, SHARD_BYTES, Ranges, family_of
from t2v_rt.export.graph import GraphOptions, GraphWriter
from t2v_rt.export.hub import needed_tokenizer, needed_weights
from t2v_rt.export.precision import Precision
from t2v_rt.export.single_files import SingleFiles
from t2v_rt.export.tensors import CheckpointWeights
from tests.conftest import Tiny

WORDS = ("<end>", "a", "red", "ball")
DIM = 6
SIZES = {"height": 16, "width": 16, "num_frames": 2, "num_inference_steps": 3}


@dataclass(frozen=True)
class ToyConfigs:
    """Each network is one matrix; the UNet has two engines, which share it."""

    dim: int

    def model(self) -> ModelSpec:
        latents = LatentSpec(self.dim, (1.0,) * self.dim, (0.0,) * self.dim, 8, (64, 64, 64))
        return ModelSpec("toy", latents, DecodeSchedule(((1, 1),), (1, 1)), TextSpec(4, self.dim), (1, 1, 1), 1, 1)

    def units(self, component: str) -> tuple[tuple[str, ...], ...]:
        return (("early", "late"),) if component == "unet" else (("model",),)

    def tiles(self, component: str, profiles: Sequence[VideoProfile] = ()) -> TileSpec | None:
        return None

    def ranges(self, profiles: Sequence[VideoProfile]) -> Mapping[str, Mapping[str, tuple[Ranges, ...]]]:
        rows: tuple[Ranges, ...] = ({"rows": Range.of(2)},)
        return {name: {role: rows for unit in self.units(name) for role in unit} for name in Toy.networks}

    def graph_options(
        self,
        ranges: Mapping[str, Mapping[str, Sequence[Ranges]]],
        float32_matmul: bool,
        accumulation: Accumulation = "fp32",
    ) -> Mapping[str, Mapping[str, GraphOptions]]:
        return {name: {role: GraphOptions({"rows": 2}) for role in roles} for name, roles in ranges.items()}

    def plan_precision(self, component: str, wanted: Precision, turing: bool) -> Precision:
        return wanted

    def write(self, component: str, role: str, g: GraphWriter) -> Sequence[StateSpec]:
        x = g.input(TensorSpec("x", "float32", ("rows", self.dim)))
        y = g.full(g.linear(g.half(x), "layer", self.dim, self.dim, bias=False))
        g.output(g.silu(y) if role == "late" else y, TensorSpec("y", "float32", ("rows", self.dim)))
        return ()

    def context(self, component: str, role: str, sizes: Mapping[str, int], form: GraphOptions | None) -> int:
        return sizes["rows"]

    def embedding(self, weights: CheckpointWeights) -> tuple[str, tuple[int, int]]:
        return "table", (len(WORDS), self.dim)

    @property
    def end_token(self) -> int:
        return 0


class Toy:
    """Networks in folders of other names than Wan's, and a tokenizer that is made of two files."""

    networks: Mapping[str, str] = {"text_encoder": "text_encoder", "unet": "unet", "vae_decoder": "vae"}
    tokenizers: tuple[tuple[str, ...], ...] = (("words.txt", "end.txt"), ("tokenizer.json",))
    defaults = Defaults(16, 16, 2, 8.0, 3, 1.0, "")
    unused: Mapping[str, tuple[str, ...]] = {"vae": ("encoder.",)}
    single_files: SingleFiles | None = None

    def read_configs(self, configs: CheckpointConfigs, shard_bytes: int = SHARD_BYTES) -> ToyConfigs:
        require(configs.networks["unet"], "unet", "kind", "toy")
        return ToyConfigs(DIM)

    def read_tokenizer(self, files: Sequence[Path]) -> str:
        if len(files) == 1:
            return files[0].read_text(encoding="utf-8")
        from tokenizers import Tokenizer, models, pre_tokenizers, processors

        words, end = (file.read_text(encoding="utf-8").split() for file in files)
        tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="a"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        special = [(end[0], words.index(end[0]))]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {end[0]}", special_tokens=special)
        return str(tokenizer.to_str())


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of the family, which is registered."""
    module = ModuleType("toy_family")
    module.FAMILY = Toy()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "toy_family", module)
    monkeypatch.setitem(FAMILIES, "ToyPipeline", "toy_family")
    folder = tmp_path / "toy"
    rng = np.random.default_rng(0)
    for name in Toy.networks.values():
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps({"kind": "toy"}))
        tensors = {"layer.weight": rng.standard_normal((DIM, DIM)).astype(np.float32)}
        if name == "text_encoder":
            tensors["table"] = rng.standard_normal((len(WORDS), DIM)).astype(np.float32)
        save_file(tensors, folder / name / "model.safetensors")
    for name, content in (
        ("model_index.json", {"_class_name": "ToyPipeline"}),
        ("scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}),
        ("generation_config.json", SIZES),
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "words.txt").write_text(" ".join(WORDS))
    (folder / "tokenizer" / "end.txt").write_text(WORDS[0])
    return folder


def test_its_checkpoint_is_opened(toy: Path) -> None:
    source = open_checkpoint(toy)
    assert isinstance(source.family, Toy)
    assert list(source.weights) == ["text_encoder", "unet", "vae"]
    assert [file.name for file in source.tokenizer] == ["words.txt", "end.txt"]
    configs = source.family.read_configs(source.configs)
    check_tokenizer(source, configs)
    before = source.digest(), source.encoder_digest()
    (toy / "tokenizer" / "end.txt").write_text(WORDS[1])
    changed = open_checkpoint(toy)
    assert all(new != old for new, old in zip((changed.digest(), changed.encoder_digest()), before, strict=True))
    with pytest.raises(CheckpointError, match=r"words\.txt closes an empty prompt with \[1\], .* config is 0"):
        check_tokenizer(changed, configs)


def test_another_form_of_its_tokenizer_will_do(toy: Path) -> None:
    text = Toy().read_tokenizer(open_checkpoint(toy).tokenizer)
    (toy / "tokenizer" / "words.txt").unlink()
    with pytest.raises(CheckpointError, match=r"words\.txt is missing"):
        open_checkpoint(toy)
    (toy / "tokenizer" / "tokenizer.json").write_text(text)
    assert [file.name for file in open_checkpoint(toy).tokenizer] == ["tokenizer.json"]
    other = toy.parent / "other"
    other.mkdir()
    (other / "words.txt").write_text(" ".join(WORDS))
    (other / "end.txt").write_text(WORDS[0])
    for given in (other, other / "end.txt"):
        assert [file.parent for file in open_checkpoint(toy, {"tokenizer": given}).tokenizer] == [other, other]


def test_what_is_missing_of_it_is_named(toy: Path, narrow: Tiny) -> None:
    with pytest.raises(CheckpointError, match="'transformer'; expected one of text_encoder, unet, vae, tokenizer"):
        open_checkpoint(toy, {"transformer": toy / "unet" / "model.safetensors"})
    with pytest.raises(CheckpointError, match="is not known in single files"):
        open_checkpoint(toy, {"unet": toy / "unet" / "model.safetensors"})
    (toy / "unet" / "config.json").write_text(json.dumps({"kind": "other"}))
    source = open_checkpoint(toy)
    with pytest.raises(CheckpointError, match=r"unet/config\.json: kind is 'other'; only 'toy' is supported"):
        source.family.read_configs(source.configs)
    (toy / "unet").rename(toy / "transformer")
    with pytest.raises(CheckpointError, match="the folder unet/ is missing; expected text_encoder, unet, vae, token"):
        open_checkpoint(toy)
    with pytest.raises(CheckpointError, match="pipeline 'No'; supported: WanPipeline, ToyPipeline"):
        family_of({"_class_name": "No"}, toy)
    with pytest.raises(CheckpointError, match=r"pipeline \['WanPipeline'\]; supported"):
        family_of({"_class_name": ["WanPipeline"]}, toy)
    assert not isinstance(open_checkpoint(narrow.checkpoint).family, Toy)


def test_the_hub_gives_what_its_networks_need(toy: Path) -> None:
    names = [path.relative_to(toy).as_posix() for path in toy.rglob("*") if path.is_file()]
    family = family_of({"_class_name": "ToyPipeline"}, toy)
    folders = ("text_encoder", "unet", "vae")
    assert needed_weights("a/b", names, family) == [f"{name}/model.safetensors" for name in folders]
    assert needed_tokenizer("a/b", names, family) == ["tokenizer/words.txt", "tokenizer/end.txt"]
    assert needed_tokenizer("a/b", ["tokenizer/tokenizer.json"], family) == ["tokenizer/tokenizer.json"]


def test_its_components_are_written_and_run(toy: Path, tmp_path: Path) -> None:
    source = open_checkpoint(toy)
    configs = source.family.read_configs(source.configs)
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    spec = export_component("unet", source, configs, bundle, "fp32")
    assert sorted(path.name for path in (bundle / "unet").iterdir()) == ["early.onnx", "late.onnx", "weights.data"]
    assert spec.weights_bytes == 4 * DIM * DIM  # once, though two graphs read it
    x = np.random.default_rng(1).standard_normal((3, DIM)).astype(np.float32)
    weight = source.weights["unet"].read("layer.weight", (DIM, DIM))
    expected = x @ weight.T
    with get_backend("onnxruntime").load(bundle, "unet", spec) as unet:
        np.testing.assert_allclose(unet["early"].infer({"x": x})["y"], expected, rtol=1e-5, atol=1e-5)
        late = unet["late"].infer({"x": x})["y"]
    np.testing.assert_allclose(late, expected / (1 + np.exp(-expected)), rtol=1e-5, atol=1e-5)
    table = export_embedding(source, configs, bundle)
    stored = np.fromfile(bundle / table.path, np.float32).reshape(table.rows, table.columns)
    assert np.array_equal(stored, source.weights["text_encoder"].read("table", (len(WORDS), DIM)))


@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt-rtx"])
def test_a_build_of_it_is_outlined(toy: Path, backend: str, caplog: pytest.LogCaptureFixture) -> None:
    if backend != "onnxruntime":
        pytest.importorskip("tensorrt_rtx", reason="needs t2v-rt[tensorrt-rtx]")
    tensors = {"layer.weight": np.ones((DIM, DIM), np.float32), "encoder.x": np.ones(1, np.float32)}
    save_file({**tensors, "ema": np.ones(1, np.float32)}, toy / "vae" / "model.safetensors")
    plans = backend != "onnxruntime"
    options = BuildOptions(toy, backend=backend, gpus="sm86" if plans else None)
    job = BuildJob(source=open_checkpoint(toy), options=options, precision="fp16", shard_bytes=SHARD_BYTES)
    manifest = job.manifest()
    assert (manifest.model.family, manifest.defaults.num_inference_steps) == ("toy", 3)
    check_tokenizer(job.source, job.configs)  # as a build does first, which asks for the table
    units = job.units(manifest)
    assert [unit.name for unit in units] == ["text_encoder.model", "unet.early", "vae_decoder.model"]
    assert [dict(unit.ranges) != {} for unit in units] == [plans] * 3
    outline = job.outline(units)
    assert caplog.messages == [f"{toy / 'vae'}: 1 tensors are not used: 'ema'"]
    assert [spec.weights_bytes for spec in outline] == [2 * DIM * DIM] * 3
    assert estimate_needs(job, outline).disk_bytes > 0
    fewer = replace(job, options=replace(options, with_text_encoder=False))
    assert fewer.names == ("unet", "vae_decoder")
    assert fewer.manifest().fingerprint != manifest.fingerprint


def test_single_files_are_of_the_family_that_knows_most_of_them(
    toy: Path, narrow: Tiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    files = SingleFiles(
        model="Toy",
        configs=CheckpointConfigs("toy", {"_class_name": "ToyPipeline"}, {}, {}, {}),
        repository="some/toy",
        examples={name: f"toy_{name}.safetensors" for name in ("text_encoder", "unet", "vae")},
        marks={name: (f"{name}.mark", f"{name}.new") for name in ("text_encoder", "unet", "vae")},
        others={},
        no_weights=(),
        renamed=lambda network, names: {name: name.removeprefix(f"{network}.") for name in names},
    )
    monkeypatch.setattr(Toy, "single_files", files)
    models = tmp_path / "models"
    models.mkdir()
    for name in ("text_encoder", "unet", "vae"):
        save_file({f"{name}.mark": np.ones(1, np.float32)}, models / f"{name}.safetensors")
    for name in ("words.txt", "end.txt"):
        (models / name).write_bytes((toy / "tokenizer" / name).read_bytes())
    transformer = narrow.checkpoint / "transformer" / "diffusion_pytorch_model.safetensors"
    (models / "beside.safetensors").write_bytes(transformer.read_bytes())  # one of Wan's
    found = open_checkpoint(models)
    assert isinstance(found.family, Toy)
    assert [(name, *weights.tensors) for name, weights in found.weights.items()] == [
        ("text_encoder", "mark"),
        ("unet", "mark"),
        ("vae", "mark"),
    ]
    given = {name: models / f"{name}.safetensors" for name in ("text_encoder", "unet", "vae")}
    assert isinstance(open_checkpoint(None, {**given, "tokenizer": models}).family, Toy)
    assert [file.name for file in found.tokenizer] == ["words.txt", "end.txt"]
    (models / "unet.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no single file of the unet; .* files such as toy_unet\.safetensors"):
        open_checkpoint(models)
