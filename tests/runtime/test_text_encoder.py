"""The text encoder in engines that run one after another, and its embedding on the host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from t2v_rt import BundleError, EngineError, TextToVideoPipeline, build_engines
from t2v_rt.benchmarks.true_size import BUDGETS, build, relative
from t2v_rt.commands.plan import plan
from t2v_rt.commands.verify import verify
from t2v_rt.engines.backends import Backend, get_backend
from t2v_rt.engines.bundle.manifest import ComponentSpec, EmbeddingSpec
from t2v_rt.engines.bundle.store import Bundle, open_bundle
from t2v_rt.engines.contract import Component
from t2v_rt.export.checkpoint import open_checkpoint
from t2v_rt.export.components import export_component
from t2v_rt.export.floats import to_bfloat16
from t2v_rt.export.text_encoders.t5 import TextEncoderConfig
from t2v_rt.export.wan.family import FAMILY
from t2v_rt.runtime.families.wan import relative_buckets
from t2v_rt.runtime.memory.plan import parse_bytes
from t2v_rt.runtime.prompts.embedding import EmbeddingTable
from tests.conftest import ONE_EACH, Tiny

TOLERANCE = 1e-4  # float32 sums in another order, relative to the largest value
BFLOAT_TOLERANCE = 3e-2  # operands round at 2^-9; a few layers deep
PROMPTS = ("a red ball", "一只猫 在 red 球 上", "the quick brown fox jumps over the lazy dog " * 3)
XXL = TextEncoderConfig(256384, 4096, 64, 64, 10240, 24, 32, 128, 1e-6)


@dataclass
class Watched:
    """A backend that keeps account of what it loads; its engines are real."""

    backend: Backend
    loaded: list[Component] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    most: int = 0
    device: str = ""
    own_memory: bool = False
    memory_bytes: int | None = None
    device_key: str | None = None

    @property
    def identity(self) -> str:
        return self.backend.identity

    def free_bytes(self) -> int | None:
        return None

    def buffer_bytes(self) -> int | None:
        return None

    def load(self, folder: Path, name: str, spec: ComponentSpec) -> Component:
        component = self.backend.load(folder, name, spec)
        close: Callable[[], None] = component.close

        def closed() -> None:
            self.loaded.remove(component)
            close()

        component.close = closed  # type: ignore[method-assign]
        self.loaded.append(component)
        self.names.append("+".join(component))
        self.most = max(self.most, len(self.loaded))
        return component


def test_groups_are_even_and_keep_to_the_limit() -> None:
    assert [len(blocks) for blocks in XXL.groups(3_000_000_000, 512)] == [4, 5, 5, 5, 5]
    for limit in (1, 10**9, 2 * 10**9, 3 * 10**9, 10**11):
        groups = XXL.groups(limit, 512)
        assert [i for blocks in groups for i in blocks] == list(range(24))
        sizes = {len(blocks) for blocks in groups}
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) == 1 or max(sizes) * XXL.block_bytes + XXL.context_bytes(512) <= limit


def test_each_group_is_an_engine_with_its_own_weights(tiny: Tiny, sharded: Bundle) -> None:
    spec = sharded.manifest.components["text_encoder"]
    layers = tiny.config.text_layers
    assert list(spec.graphs) == [f"blocks_{i}" for i in range(layers)]
    assert spec.weights_bytes == sum(graph.weights_bytes for graph in spec.graphs.values())
    whole = open_bundle(tiny.bundle).manifest.components["text_encoder"]
    assert list(whole.graphs) == ["blocks_0"]
    assert whole.weights_bytes == spec.weights_bytes
    for role, graph in spec.graphs.items():
        model = onnx.load(str(sharded.folder / graph.path), load_external_data=False)
        files = {item.value for t in model.graph.initializer for item in t.external_data if item.key == "location"}
        assert files == {f"{role}.data"}
        assert [value.name for value in model.graph.input] == ["hidden_states", "relative_buckets"]
    assert [spec.graphs[f"blocks_{i}"].outputs[0].name for i in range(layers)] == [
        *["hidden_states_out"] * (layers - 1),
        "prompt_embeds",
    ]


def test_all_texts_pass_while_an_engine_is_loaded(sharded: Bundle) -> None:
    roles = list(sharded.manifest.components["text_encoder"].graphs)
    watched = Watched(get_backend("onnxruntime"))
    stages = TextToVideoPipeline(sharded, watched, 1)
    stages.encode_prompt(PROMPTS)
    assert (watched.names, watched.most, watched.loaded) == (roles, 1, [])
    stages.encode_prompt(PROMPTS[:2])  # remembered
    assert watched.names == roles
    stages.encode_prompt(["another", *PROMPTS])
    assert (watched.names, watched.most, watched.loaded) == (roles * 2, 1, [])
    resident = Watched(get_backend("onnxruntime"))
    stages = TextToVideoPipeline(sharded, resident)
    stages.encode_prompt(PROMPTS)
    stages.encode_prompt(["another"])
    assert resident.names == ["+".join(roles)]
    stages.close()
    assert not resident.loaded


def test_a_call_encodes_both_prompts_together(sharded: Bundle) -> None:
    watched = Watched(get_backend("onnxruntime"))
    pipe = TextToVideoPipeline(sharded, watched)
    needed = pipe.plan(pipe.stream("a ball", seed=1).request).least_bytes
    tight = TextToVideoPipeline(sharded, watched, vram_budget=needed)
    tight("a ball", "a cat", seed=1, output_type="latent")
    roles = list(sharded.manifest.components["text_encoder"].graphs)
    assert watched.names == [*roles, "model"]
    assert (watched.most, watched.loaded) == (1, [])


def test_an_engine_that_fails_is_released(sharded: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(get_backend("onnxruntime"))
    stages = TextToVideoPipeline(sharded, watched, 1)
    monkeypatch.setattr("t2v_rt.engines.contract.Engine.infer", _fail)
    with pytest.raises(EngineError, match="broken"):
        stages.encode_prompt(PROMPTS)
    assert not watched.loaded
    monkeypatch.undo()
    assert np.isfinite(stages.encode_prompt(PROMPTS)).all()


def _fail(*_: object) -> None:
    raise EngineError("broken")


def test_the_plan_counts_all_engines_or_the_largest(sharded: Bundle) -> None:
    spec = sharded.manifest.components["text_encoder"]
    whole = plan(sharded.folder)
    assert (whole["resident"], whole["streamed"]) == (True, False)
    assert whole["stages"][0]["weights_bytes"] == spec.weights_bytes
    tight = plan(sharded.folder, vram_budget=whole["peak_bytes"] - 1)
    assert (tight["resident"], tight["streamed"]) == (False, True)
    assert tight["stages"][0]["weights_bytes"] == max(graph.weights_bytes for graph in spec.graphs.values())


def test_the_self_test_covers_each_engine(tiny: Tiny, tmp_path: Path) -> None:
    bundle = build_engines(tiny.checkpoint, tmp_path / "b", precision="fp16", vram_budget=ONE_EACH)
    with np.load(bundle.folder / "self_test/text_encoder.npz") as answers:
        assert len(answers.files) == tiny.config.text_layers
    assert verify(bundle.folder)["passed"]
    assert not (bundle.folder / "reference").exists()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rows_are_gathered_as_they_are_stored(tmp_path: Path, dtype: str) -> None:
    values = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    stored = to_bfloat16(values) if dtype == "bfloat16" else values.astype(dtype)
    (tmp_path / "table").write_bytes(stored.tobytes())
    table = EmbeddingTable(tmp_path, EmbeddingSpec("table", dtype, 6, 4))
    expected = values.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype).astype(np.float32)
    ids = np.array([5, 0, 5])
    assert np.array_equal(table.rows(ids), expected[ids][None])
    for wrong in (6, -1):
        with pytest.raises(BundleError, match="do not belong together"):
            table.rows(np.array([0, wrong]))
    (tmp_path / "table").write_bytes(b"short")
    with pytest.raises(BundleError, match="cannot be read"):
        table.rows(ids)
    with pytest.raises(BundleError, match="expected one of float32"):
        EmbeddingSpec("table", "int8", 6, 4)


def test_bfloat16_blocks_compute_what_float32_ones_do(tiny: Tiny, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(tiny.checkpoint)
    configs = FAMILY.read_configs(checkpoint.configs)
    hidden = np.random.default_rng(0).standard_normal((1, 5, configs.text_encoder.dim)).astype(np.float32)
    feeds = {"hidden_states": hidden, "relative_buckets": relative_buckets(5, 32, 128)}
    results = []
    for precision in ("fp32", "bf16"):
        folder = tmp_path / precision
        folder.mkdir()
        spec = export_component("text_encoder", checkpoint, configs, folder, precision)
        path = folder / spec.graphs["blocks_0"].path
        onnx.checker.check_model(str(path))
        results.append(ReferenceEvaluator(str(path)).run(None, feeds)[0])
        assert {tensor.dtype for tensor in (*spec.graphs["blocks_0"].inputs, *spec.graphs["blocks_0"].outputs)} == {
            "float32",
            "int64",
        }
    assert 0 < relative(results[1], results[0]) < BFLOAT_TOLERANCE


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads memory from /proc")
def test_building_is_measured(narrow: Tiny, tmp_path: Path) -> None:
    report = build(narrow.checkpoint, tmp_path / "own" / "bundle", "onnxruntime")
    assert report["peak_rss_bytes"] > 0
    assert report["bundle_bytes"] == sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    assert [item["budget_bytes"] for item in report["plans"]] == [parse_bytes(budget) for budget in BUDGETS]
