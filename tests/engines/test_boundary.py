"""What crosses an engine's boundary, compared with the manifest when a plan is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from t2v_rt import EngineError
from t2v_rt.build import prepare
from t2v_rt.build.options import BuildOptions
from t2v_rt.engines.bundle.manifest import GraphSpec
from t2v_rt.engines.bundle.profiles import PlanProfile, PlanSpec, Range
from t2v_rt.engines.specs import StateSpec, TensorSpec
from t2v_rt.engines.tensorrt.boundary import check_boundary
from t2v_rt.engines.tensorrt.libraries import load_library
from tests.conftest import Tiny

RTX = "tensorrt-rtx"


@dataclass(frozen=True)
class Declared:
    """The part of `ICudaEngine` that says what it takes and gives: name -> dtype and shape."""

    tensors: Mapping[str, tuple[str, tuple[int, ...]]]

    @property
    def num_io_tensors(self) -> int:
        return len(self.tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=self.tensors[name][0])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name][1]


def plan(*profiles: Mapping[str, Range]) -> PlanSpec:
    return PlanSpec(tuple(PlanProfile(sizes, 1) for sizes in profiles), 1)


SPEC = GraphSpec(
    "x.plan",
    (TensorSpec("latents", "float32", (1, 4, "height", "width")), TensorSpec("buckets", "int64", ("width",))),
    (TensorSpec("features", "float16", (1, 8, "2*height", 9)),),
    (StateSpec("old", "new", TensorSpec("kept", "float16", (3,))),),
    plan({"height": Range(2, 3, 4), "width": Range.of(6)}),
)
GOOD: Mapping[str, tuple[str, tuple[int, ...]]] = {
    "latents": ("FLOAT", (1, 4, -1, 6)),
    "buckets": ("INT64", (6,)),
    "features": ("HALF", (1, 8, -1, 9)),
    "old": ("HALF", (3,)),
    "new": ("HALF", (3,)),
}


def test_an_engine_as_the_manifest_says() -> None:
    check_boundary("a.b", SPEC, Declared(GOOD))
    check_boundary("a.b", SPEC, Declared({**GOOD, "latents": ("FLOAT", (1, 4, -1, -1))}))  # profiles hold it to six


@pytest.mark.parametrize(
    ("name", "found", "message"),
    [
        ("latents", ("HALF", (1, 4, -1, 6)), r"a\.b: 'latents' is HALF \[1, 4, -1, 6\] in the plan; expected float32 "),
        ("latents", ("FLOAT", (1, 4, 6)), "'latents' is FLOAT"),
        ("latents", ("FLOAT", (1, -1, -1, 6)), r"expected float32 \[1, 4, height, width\]; build the bundle again"),
        ("latents", ("FLOAT", (1, 4, -1, 7)), "'latents' is"),
        ("latents", ("FLOAT", (1, 4, 4, 6)), "'latents' is"),  # one size only, of a range
        ("features", ("HALF", (1, 8, -1, 8)), "'features' is"),
        ("new", ("FLOAT", (3,)), "'new' is FLOAT"),
        ("more", ("FLOAT", (3,)), "plan and manifest do not both have more; build the bundle again"),
    ],
)
def test_an_engine_that_differs_is_refused(name: str, found: tuple[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        check_boundary("a.b", SPEC, Declared({**GOOD, name: found}))


def test_a_missing_tensor_is_named() -> None:
    rest = {name: tensor for name, tensor in GOOD.items() if name != "old"}
    with pytest.raises(EngineError, match="do not both have old"):
        check_boundary("a.b", SPEC, Declared(rest))


@pytest.mark.parametrize("height", ["32", "32,48", "32:48"])
def test_the_library_reads_graphs_as_the_manifest_says(narrow: Tiny, tmp_path: Path, height: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs t2v-rt[tensorrt-rtx]")
    trt = load_library(RTX).trt
    sizes = {"height": height, "width": 48, "num_frames": 5}
    job, manifest = prepare(BuildOptions(narrow.checkpoint, backend=RTX, gpus="sm89", **sizes))  # type: ignore[arg-type]
    checked = []
    for unit in job.units(manifest):
        for role, graph in job._export(unit, tmp_path).graphs.items():
            log = trt.Logger(trt.Logger.ERROR)
            builder = trt.Builder(log)
            network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
            assert trt.OnnxParser(network, log).parse_from_file(str(tmp_path / graph.path))
            tensors = [network.get_input(i) for i in range(network.num_inputs)]
            tensors += [network.get_output(i) for i in range(network.num_outputs)]
            declared = Declared({tensor.name: (tensor.dtype.name, tuple(tensor.shape)) for tensor in tensors})
            check_boundary(role, replace(graph, plan=plan(*unit.ranges[role])), declared)
            checked.append(role)
    assert checked == ["blocks_0", "model", "head_first", "head_next", "tail"]
