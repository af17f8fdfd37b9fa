"""GPUs to build for where none is named: those of the machine, on GPUs in host memory."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from t2v_rt.build.options import BuildOptions
from t2v_rt.engines.tensorrt.libraries import DEFAULT_TARGETS, check_targets
from tests.support.host_cuda import HostCuda

RTX = "tensorrt-rtx"


class Cards(HostCuda):
    """GPUs of these compute capabilities, on which nothing may be allocated.

    Args:
        capabilities: major and minor, one a GPU.
        code: of the calls that tell of them.
    """

    def __init__(self, *capabilities: tuple[int, int], code: int = 0) -> None:
        super().__init__(0, devices=len(capabilities))
        self.capabilities, self.code = capabilities, code

    def cudaGetDeviceCount(self) -> tuple[int, int | None]:  # type: ignore[override]  # noqa: N802
        return self.code, None if self.code else self.devices

    def cudaGetDeviceProperties(self, index: int) -> tuple[int, Any]:  # noqa: N802
        major, minor = self.capabilities[index]
        return 0, SimpleNamespace(name=b"host\0", major=major, minor=minor, totalGlobalMem=self.capacity)


@pytest.mark.parametrize(
    ("cards", "targets"),
    [
        (Cards((8, 9)), ("sm89",)),
        (Cards((12, 0), (8, 6), (8, 6)), ("sm86", "sm120")),
        (Cards((9, 0), (8, 9)), ("sm89",)),  # of Hopper the library has no kernels
        (Cards((9, 0)), DEFAULT_TARGETS),
        (Cards(), DEFAULT_TARGETS),
        (Cards(code=35), DEFAULT_TARGETS),  # an old driver
        (Cards((8, 9), code=700), DEFAULT_TARGETS),  # a GPU that faulted
        (None, DEFAULT_TARGETS),  # no package
    ],
)
def test_plans_are_for_the_machines_own_gpus_where_none_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, cards: Cards | None, targets: tuple[str, ...]
) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cards)
    options = BuildOptions("x", backend=RTX)
    assert options.targets == targets
    assert not caplog.records
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", Cards((7, 5)))
    assert options.targets == targets  # a build keeps to what it began with
    assert check_targets(RTX, None) == ("sm75",)
    assert BuildOptions("x", backend=RTX, gpus="sm120").targets == ("sm120",)


@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt"])
def test_a_backend_that_builds_for_none_by_name_does_not_look(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", SimpleNamespace())  # whose every call is an error
    assert BuildOptions("x", backend=backend).targets == ()
