"""Which GPUs and drivers a backend runs on, and what doctor and errors say of the others; no GPU is asked."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from t2v_rt.cli import main
from t2v_rt.commands import doctor
from t2v_rt.commands.doctor import best_verdict
from t2v_rt.engines.backend_info import BACKENDS
from t2v_rt.engines.bundle.profiles import PlanProfile, PlanSpec, Range
from t2v_rt.engines.devices import FAULTS
from t2v_rt.engines.gpu_support import CUDA_OF_DRIVERS, FIRST_DRIVERS, driver_cuda, why_unusable
from t2v_rt.engines.onnxruntime import cuda_provider
from t2v_rt.engines.tensorrt.libraries import load_library, specializes
from t2v_rt.errors import BackendError
from t2v_rt.numbers import is_older

ROOT = Path(__file__).resolve().parent.parent.parent
RTX = "tensorrt-rtx"
GPUS = {
    "RTX 2060": 7.5, "RTX 3060": 8.6, "RTX 4060": 8.9, "RTX 5060": 12.0, "A100": 8.0, "H100": 9.0, "GTX 1080": 6.1,
    "GB10": 12.1, "B200": 10.0,
}  # fmt: skip
NO_KERNELS = {"H100", "B200"}  # of TensorRT-RTX
CUDA_12 = {"535.54.03": "CUDA 12.2", "560.94": "CUDA 12.6", "580.65.06": "CUDA 13.0"}


@pytest.mark.parametrize("driver", CUDA_12)
@pytest.mark.parametrize("name", GPUS)
@pytest.mark.parametrize("backend", [RTX, "tensorrt", "onnxruntime"])
@pytest.mark.parametrize("major", [12, 13])
def test_what_a_backend_runs_on(backend: str, name: str, driver: str, major: int) -> None:
    why, todo = why_unusable(backend, BACKENDS[backend], (name, GPUS[name], driver), major)
    too_old = major == 13 and not driver.startswith("580")
    if name == "GTX 1080" and (backend != "onnxruntime" or major == 13):
        assert why == "GTX 1080 has compute capability 6.1"
        assert "RTX 20 or newer" in todo
    elif backend == RTX and name in NO_KERNELS:
        assert why == f"{name} is sm{GPUS[name] * 10:.0f}, for which tensorrt-rtx has no kernels"
        assert todo.startswith("use --backend onnxruntime with --provider cuda (experimental), or --backend tensorrt")
    elif too_old:
        assert why == f"the NVIDIA driver supports {CUDA_12[driver]}, {backend} is installed for CUDA 13"
        assert todo.startswith("install driver R580 or newer")
        assert ('tensorrt-rtx-cu12 "cuda-bindings<13"' in todo) == (backend == RTX)
    else:
        assert (why, todo) == ("", "")


def test_drivers_are_known_by_their_branch() -> None:
    assert {driver: driver_cuda(driver) for driver in CUDA_12} == CUDA_12
    assert (driver_cuda("470.1"), driver_cuda("what"), driver_cuda("999.1")) == (
        "no CUDA 12",
        "no CUDA 12",
        "CUDA 13.1",
    )
    assert list(CUDA_OF_DRIVERS) == sorted(CUDA_OF_DRIVERS)
    for major, branch in FIRST_DRIVERS.items():
        assert branch == min(first for first, cuda in CUDA_OF_DRIVERS.items() if cuda[0] == major)


def test_one_gpu_of_several_is_enough() -> None:
    both = [{"name": n, "compute_capability": GPUS[n], "driver": "580.1"} for n in ("H100", "RTX 4060")]
    assert best_verdict(RTX, BACKENDS[RTX], both, 13) == ("", "")
    assert best_verdict(RTX, BACKENDS[RTX], both[:1], 13)[0].startswith("H100 is sm90")


@pytest.mark.parametrize(
    ("card", "word"),
    [
        ("NVIDIA GeForce RTX 4060, 580.95, 8.9, 8188, 7900", ""),
        ("NVIDIA H100 80GB HBM3, 580.95, 9.0, 81559, 81000", "H100 80GB HBM3 is sm90, for which tensorrt-rtx has no"),
        (
            "NVIDIA GeForce RTX 4060, 560.94, 8.9, 8188, 7900",
            "supports CUDA 12.6, tensorrt-rtx is installed for CUDA 13",
        ),
    ],
)
def test_doctor_says_what_of_a_machine_can_be_used(
    card: str, word: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs t2v-rt[tensorrt-rtx]")
    pytest.importorskip("cuda.bindings", reason="needs t2v-rt[tensorrt-rtx]")
    monkeypatch.setattr(doctor, "find_gpus", lambda: (doctor.read_gpus(card), ""))
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)["backends"]
    assert report[RTX]["usable"] == (not word)
    assert word in report[RTX]["why"]
    assert report["onnxruntime, cuda"]["note"] == "experimental: it has not run on a GPU yet"
    assert report["onnxruntime"] == {"usable": True, "why": "", "todo": "", "note": ""}
    assert main(["doctor"]) == 0
    assert "(experimental: it has not run on a GPU yet)" in capsys.readouterr().out


# -- versions --


def test_versions_are_compared_by_their_numbers() -> None:
    assert is_older("1.6.1.120", "1.7")
    assert is_older("9.3", "10.15")
    assert is_older("10.8.0.43", "10.15")
    assert not is_older("1.7.1.116", "1.7")
    assert not is_older("1.10", "1.7")
    assert not is_older("11.4.0.106", "10.15")


def test_what_is_asked_of_packages_is_what_is_checked_when_they_are_loaded() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines: list[tuple[list[str], str, str]] = [
        (project["optional-dependencies"][info.extra] if info.extra else project["dependencies"], name, version)
        for name, info in BACKENDS.items()
        for version in [info.least_version]
    ]
    lines.append((project["optional-dependencies"]["cuda"], "onnxruntime-gpu", cuda_provider.LEAST_VERSION))
    for asked, name, version in lines:
        (line,) = [line for line in map(Requirement, asked) if line.name == name]
        assert str(line.specifier) == f">={version}"


def test_an_older_library_is_refused_when_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs t2v-rt[tensorrt-rtx]")
    monkeypatch.setattr("tensorrt_rtx.__version__", "1.6.1.120")
    with pytest.raises(
        BackendError,
        match=r"^tensorrt-rtx 1\.6\.1\.120 is installed, 1\.7 or newer is needed; pip install --upgrade t2v-rt\[",
    ):
        load_library(RTX)


# -- what the packages' own documents say --


def test_faults_are_those_that_cuda_calls_past_recovery() -> None:
    runtime: Any = pytest.importorskip("cuda.bindings.runtime", reason="needs t2v-rt[tensorrt-rtx]")
    described = {int(code): " ".join((code.__doc__ or "").split()) for code in runtime.cudaError_t}
    if not any(described.values()):
        pytest.skip("these bindings describe no error")
    assert {code for code, text in described.items() if "must be terminated and relaunched" in text} == FAULTS


def test_kernels_are_compiled_ahead_for_sizes_that_are_asked_for_again_only() -> None:
    def plan(**sizes: Range) -> PlanSpec:
        return PlanSpec((PlanProfile(sizes, 1),), weights_bytes=1)

    assert specializes(plan(height=Range.of(8))) is None
    assert specializes(plan(height=Range(8, 8, 16))) is True
    assert specializes(plan(batch=Range.of(1), length=Range(1, 64, 512))) is False
    assert specializes(plan(length=Range.of(226))) is None
