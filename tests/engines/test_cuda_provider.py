"""ONNX Runtime's CUDA provider, as far as it shows without a GPU: packages, settings, and what is in use."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from t2v_rt import BackendError, TextToVideoPipeline
from t2v_rt.cli import main
from t2v_rt.engines.onnxruntime import cuda_provider
from t2v_rt.engines.onnxruntime.backend import PROVIDERS, OnnxRuntimeBackend
from t2v_rt.engines.onnxruntime.cuda_provider import check_in_use, check_provider, cuda_settings
from t2v_rt.engines.onnxruntime.imported import ort
from t2v_rt.system import forked
from tests.conftest import Tiny
from tests.support.host_cuda import HostCuda

INSTALL = (
    r'pip uninstall onnxruntime onnxruntime-gpu, then pip install "onnxruntime-gpu\[cuda,cudnn\]>=1\.26" on a machine'
)


@pytest.fixture
def with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """An ONNX Runtime that says it has CUDA, and two GPUs."""
    monkeypatch.setattr(ort, "get_available_providers", lambda: list(PROVIDERS.values()))
    monkeypatch.setattr(forked, "claim_gpu", lambda: None)  # it would be this process's for good
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", HostCuda(8 * 10**9, devices=2))


def test_settings_are_those_of_one_gpu_and_float32_is_computed_as_such() -> None:
    assert cuda_settings(1) == {
        "device_id": "1",
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC",
        "use_tf32": "0",
    }


def test_both_packages_at_once_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], narrow: Tiny
) -> None:
    for name in ("onnxruntime", "onnxruntime_gpu"):
        folder = tmp_path / f"{name}-1.31.1.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.31.1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    line = "onnxruntime 1.31.1 and onnxruntime-gpu 1.31.1 are installed into one folder, where one hides the other's"
    with pytest.raises(BackendError, match=f"^{line} provider; {INSTALL}"):
        check_provider()
    command = ["generate", "a", "--engines", str(narrow.bundle), "--output", str(tmp_path / "x.mp4")]
    assert main([*command, "--provider", "cuda"]) == 2
    said = capsys.readouterr().err
    assert line in said
    assert said.count("\n") == 1


def test_without_the_provider_it_is_said_what_to_install() -> None:
    if cuda_provider.PROVIDER in ort.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    with pytest.raises(BackendError, match=f"^this ONNX Runtime has no provider 'cuda'; {INSTALL}"):
        OnnxRuntimeBackend("cuda")


@pytest.mark.usefixtures("with_cuda")
def test_an_older_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "__version__", "1.24.4")
    with pytest.raises(BackendError, match=r"^onnxruntime-gpu 1\.24\.4 is installed, 1\.26 or newer is needed; pip"):
        OnnxRuntimeBackend("cuda")


def test_a_session_that_is_on_the_cpu_after_all_is_refused() -> None:
    check_in_use([cuda_provider.PROVIDER, "CPUExecutionProvider"], "transformer")
    with pytest.raises(
        BackendError,
        match=r"^transformer: ONNX Runtime could not start CUDA and would run on CPUExecutionProvider.*cuDNN$",
    ):
        check_in_use(["CPUExecutionProvider"], "transformer")


@pytest.mark.usefixtures("with_cuda")
@pytest.mark.filterwarnings("ignore:Specified provider 'CUDAExecutionProvider' is not in available")
def test_a_provider_that_cannot_be_started_ends_the_load(narrow: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    """The ONNX Runtime of this machine, which has no CUDA whatever it says, and goes on without."""
    if ort.cuda_version:
        pytest.skip("this ONNX Runtime has CUDA")
    pipe = TextToVideoPipeline.from_pretrained(narrow.bundle, provider="cuda")
    with pytest.raises(BackendError, match="transformer: ONNX Runtime could not start CUDA and would run on CPU"):
        pipe.stages.components.get("transformer")
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("with_cuda")
def test_a_gpu_is_chosen_by_its_index() -> None:
    assert OnnxRuntimeBackend("cuda").device_key == "cuda:0"
    second = OnnxRuntimeBackend("cuda", index=1)
    assert (second.device_key, second.memory_bytes, second.free_bytes()) == ("cuda:1", 8 * 10**9, 8 * 10**9)
    assert "host 1, CUDA driver 13000" in second.device
    with pytest.raises(BackendError, match=r"^there is no GPU 2; expected 0 \(host 0\), 1 \(host 1\)$"):
        OnnxRuntimeBackend("cuda", index=2)


def test_the_cpu_has_no_gpus_to_choose_from(narrow: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BackendError, match=r"^provider cpu has no GPUs to choose from; leave --device \(device=\) out"):
        TextToVideoPipeline.from_pretrained(narrow.bundle, device=0)
    for command in (
        ["verify", str(narrow.bundle)],
        ["generate", "a", "--engines", str(narrow.bundle), "--output", str(tmp_path / "x.mp4")],
        ["encode", "a", "--engines", str(narrow.bundle), "--output", str(tmp_path / "x.npz")],
    ):
        assert main([*command, "--device", "0"]) == 2
        assert "has no GPUs to choose from" in capsys.readouterr().err
