"""What a card would get of a denoiser's layer at true width (12 heads of 128), by the plan that is built of it here."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from t2v_rt import EngineError
from t2v_rt.benchmarks.make_checkpoint import changed, make_checkpoint
from t2v_rt.benchmarks.wan_tensors import CONFIGS
from t2v_rt.build import prepare
from t2v_rt.build.job import BuildJob
from t2v_rt.build.options import BuildOptions
from t2v_rt.build.units import Unit
from t2v_rt.engines.bundle.manifest import GraphSpec
from t2v_rt.engines.bundle.profiles import Accumulation, AttentionSpec, PlanSpec
from t2v_rt.engines.specs import TensorSpec
from t2v_rt.engines.tensorrt.builder import PlanBuilder
from t2v_rt.engines.tensorrt.plan_text import PlanText, read_plan
from t2v_rt.export.precision import Precision

pytestmark = pytest.mark.slow  # builds plans

RTX = "tensorrt-rtx"
ROUNDING = 256  # bytes, that the builder's log has more for some profiles of several
# one layer of the denoiser; what is not looked at here is as narrow as it can be
CHANGES = (
    *("transformer.num_layers=1", "transformer.ffn_dim=512", "transformer.text_dim=64"),
    *("text_encoder.d_model=64", "text_encoder.d_ff=64", "vae.base_dim=8"),
)
HALF: tuple[Precision, Accumulation | None] = ("fp16", None)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tensorrt_rtx", reason="needs t2v-rt[tensorrt-rtx]")
    folder = tmp_path_factory.mktemp("true width") / "checkpoint"
    make_checkpoint(folder, changed(CONFIGS, CHANGES))
    return folder


@dataclass(frozen=True)
class Built:
    """A plan of the layer: what the manifest says of it, and what is read from it."""

    spec: PlanSpec
    text: PlanText


def build(
    checkpoint: Path,
    folder: Path,
    *,
    gpus: str = "sm89",
    height: str = "256",
    sums: Accumulation | None = "fp32",
    written: tuple[Precision, Accumulation | None] = ("fp16", "fp32"),
) -> Built:
    """Builds the layer's plan.

    Args:
        checkpoint: of the layer.
        folder: to write to.
        gpus: it is built for.
        height: of the video.
        sums: that are asked of the plan.
        written: precision of the graph, and the sums that are asked of it.
    """
    options = BuildOptions(checkpoint, backend=RTX, gpus=gpus, height=height, width=256, num_frames=9)
    job, manifest = prepare(options)
    (unit,) = (unit for unit in job.units(manifest) if unit.component == "transformer")
    precision, accumulation = written
    assert unit.graph_options is not None
    forms = {role: replace(form, accumulation=accumulation) for role, form in unit.graph_options.items()}
    unit = replace(unit, precision=precision, graph_options=forms)
    return _build(job, unit, folder, sums)


def _build(job: BuildJob, unit: Unit, folder: Path, sums: Accumulation | None) -> Built:
    folder.mkdir(exist_ok=True)
    spec = job._export(unit, folder)
    builder = PlanBuilder(RTX, job.targets)
    nodes: dict[str, dict[str, int]] = {"model": {}}
    built = builder.build_component(folder, folder, spec, unit.ranges, nodes, {"model": sums}, lambda fraction: None)
    graph: GraphSpec = built.graphs["model"]
    assert graph.plan is not None
    with (folder / graph.path).open("rb") as stream:
        return Built(graph.plan, read_plan(stream))


@pytest.mark.parametrize(
    ("gpus", "height", "tokens"),
    [
        ("sm89", "256", [768]),
        ("sm80,sm86,sm89,sm120", "256,320", [768, 960]),
        ("sm75,sm89", "256:320", [None]),
    ],
)
def test_attention_is_one_kernel_that_adds_up_in_float32(
    checkpoint: Path, tmp_path: Path, gpus: str, height: str, tokens: list[int | None]
) -> None:
    built = build(checkpoint, tmp_path, gpus=gpus, height=height)
    assert built.spec.attention == AttentionSpec(2, 2, "fp32")
    assert [program.targets for program in built.text.programs] == [tuple(gpus.split(","))] * len(tokens)
    for program, profile, length in zip(built.text.programs, built.spec.profiles, tokens, strict=True):
        found = Counter((item.queries, item.keys, item.alike, item.accumulation) for item in program.fused or ())
        assert found == {(length, length, True, "fp32"): 1, (length, 512, False, "fp32"): 1}
        assert program.unfused == ()
        assert program.launches is not None
        assert program.sources is not None
        assert 2 <= program.sources <= program.launches
        assert program.context_bytes is not None
        most = ROUNDING if len(tokens) > 1 else 0
        assert 0 <= profile.context_bytes - program.context_bytes <= most


def test_a_graph_whose_sums_are_left_to_the_library_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"model\.onnx: attention adds up in half precision.*expected float32"):
        build(checkpoint, tmp_path, written=HALF)
    built = build(checkpoint, tmp_path / "asked", sums="fp16", written=("fp16", "fp16"))
    assert built.spec.attention == AttentionSpec(2, 2, "fp16")
    built = build(checkpoint, tmp_path / "bf16", written=("bf16", None))
    assert built.spec.attention == AttentionSpec(2, 2, "fp32")


def test_an_attention_that_the_library_does_not_fuse_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(
        EngineError, match=r"model\.onnx: it has no kernel for one of the attentions as a whole; install"
    ):
        build(checkpoint, tmp_path, written=("fp32", None))  # no kernel computes one of float32 operands


def test_an_attention_that_the_library_takes_apart_unasked_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    shape = (1, 64, 12 * 128)
    operands = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "qkva"]
    node = helper.make_node("Attention", list("qkv"), ["a"], "Attention_1", q_num_heads=12, kv_num_heads=12)
    graph = helper.make_graph([node], "attention", operands[:3], operands[3:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11), tmp_path / "a.onnx")
    q, k, v, a = (TensorSpec(name, "float32", shape) for name in "qkva")
    spec = GraphSpec("a.onnx", (q, k, v), (a,))
    builder = PlanBuilder(RTX, ("sm89",))
    with pytest.raises(EngineError, match=r"a\.onnx: 1 of 1 attentions were not fused \(Attention_1 is the first\)"):
        builder.build(spec, tmp_path / "a.onnx", tmp_path / "a.plan", [{}], "fp32", lambda fraction: None)
