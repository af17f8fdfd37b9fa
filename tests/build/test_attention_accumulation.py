"""What attention of plans adds up in, as it is asked of a build."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from t2v_rt import BackendError, RequestError, build_engines
from t2v_rt.build import prepare
from t2v_rt.build.options import BuildOptions
from t2v_rt.engines.bundle.manifest import Manifest
from tests.conftest import Tiny

RTX = "tensorrt-rtx"


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"backend": RTX, "attention_accumulation": "half"}, RequestError, "expected one of fp32, fp16"),
        (
            {"backend": RTX, "attention_accumulation": "fp16", "precision": "bf16"},
            RequestError,
            "whose sums are float32; leave one of them out",
        ),
        ({"attention_accumulation": "fp16"}, BackendError, r"leave --attention-accumulation \(attention_accumulation="),
        ({"attention_accumulation": "fp32"}, BackendError, "which is for tensorrt-rtx and tensorrt"),
    ],
)
def test_bad_settings(
    narrow: Tiny, tmp_path: Path, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        build_engines(narrow.checkpoint, tmp_path / "x", **settings)
    assert not list(tmp_path.iterdir())


def test_float32_is_what_is_left_out_and_half_is_another_build(narrow: Tiny) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs t2v-rt[tensorrt-rtx]")

    def prepared(**settings: Any) -> Manifest:
        return prepare(BuildOptions(narrow.checkpoint, backend=RTX, gpus="sm89", **settings))[1]

    plain, named, half = (
        prepared(),
        prepared(attention_accumulation="fp32"),
        prepared(attention_accumulation="fp16"),
    )
    assert (plain.attention_accumulation, half.attention_accumulation) == ("fp32", "fp16")
    assert plain.fingerprint == named.fingerprint != half.fingerprint
    prepared(attention_accumulation="fp32", precision="bf16")


def test_graphs_for_onnx_runtime_name_none(narrow: Tiny) -> None:
    assert prepare(BuildOptions(narrow.checkpoint))[1].attention_accumulation == ""
