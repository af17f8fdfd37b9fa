"""Running plans: all that is decided before the first call of CUDA."""

from __future__ import annotations

import ctypes
import inspect
import os
import re
import shutil
import stat
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from t2v_rt import BackendError, BundleError, EngineError, RequestError, TextToVideoPipeline
from t2v_rt.cli import main
from t2v_rt.engines import devices
from t2v_rt.engines.bundle.profiles import check_profiles, parse_profiles
from t2v_rt.engines.bundle.store import Bundle, check_file, open_bundle
from t2v_rt.engines.bundle.trust import check_trust
from t2v_rt.engines.devices import explain_no_device
from t2v_rt.engines.tensorrt import backend as backend_tensorrt
from t2v_rt.engines.tensorrt import cuda, engine, libraries
from t2v_rt.engines.tensorrt import gpu as card
from t2v_rt.engines.tensorrt.backend import check_target, check_version
from t2v_rt.engines.tensorrt.cuda import Cuda
from t2v_rt.engines.tensorrt.engine import choose_profile
from t2v_rt.engines.tensorrt.gpu import KernelCache, make_log
from t2v_rt.engines.tensorrt.libraries import Library, load_library
from t2v_rt.errors import OutOfMemoryError
from tests.support.host_card import Reason

RTX = "tensorrt-rtx"


@pytest.fixture(scope="module")
def library() -> Library:
    pytest.importorskip("tensorrt_rtx", reason="needs t2v-rt[tensorrt-rtx]")
    pytest.importorskip("cuda.bindings", reason="needs t2v-rt[tensorrt-rtx]")
    return load_library(RTX)


@pytest.fixture(scope="module")
def plans(library: Library, plans: Bundle) -> Bundle:
    """Those of the session, where all that runs plans is installed."""
    return plans


def no_gpu() -> str:
    """Why there is no GPU here, or nothing where there is one."""
    try:
        Cuda(RTX)
    except BackendError as exc:
        return str(exc)
    return ""


# -- what is said without a GPU --------------------------------------------------------------------------------------


def test_no_gpu_is_one_line(plans: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    reason = no_gpu()
    if not reason:
        pytest.skip("there is a GPU")
    with pytest.raises(BackendError, match="NVIDIA driver"):
        TextToVideoPipeline.from_pretrained(plans.folder)
    assert main(["generate", "a red ball", "--engines", str(plans.folder), "--output", "x.mp4"]) == 2
    said = capsys.readouterr().err
    assert said.strip() == f"t2v-rt: error: {reason}"
    assert main(["verify", str(plans.folder)]) == 2
    assert not Path("x.mp4").exists()


@pytest.mark.parametrize(
    ("code", "driver", "message"),
    [
        (devices.OLD_DRIVER, 0, "no NVIDIA driver is installed"),
        (
            devices.OLD_DRIVER,
            12080,
            "CUDA 12.8, cuda-bindings is of CUDA 13.5; install driver R580 or newer, or pip install",
        ),
        (devices.NO_DEVICE, 13050, "knows of no GPU"),
        (devices.SUCCESS, 13050, "knows of no GPU"),
        (999, 13050, "gave CUDA error 999"),
    ],
)
def test_why_there_is_no_device(code: int, driver: int, message: str) -> None:
    assert message in explain_no_device(code, driver, 13050, RTX)


def test_missing_packages_name_the_extra(plans: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(BackendError, match=r"needs the package 'cuda-bindings' .*install t2v-rt\[tensorrt-rtx\]"):
        TextToVideoPipeline.from_pretrained(plans.folder)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(BackendError, match=r"needs the package 'tensorrt_rtx' .*install t2v-rt\[tensorrt-rtx\]"):
        TextToVideoPipeline.from_pretrained(plans.folder)


def test_plans_of_another_version(plans: Bundle, library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    check_version(plans.manifest, library)
    monkeypatch.setattr("tensorrt_rtx.__version__", "1.7.0.1")
    with pytest.raises(
        BackendError, match=r"built by tensorrt-rtx .*1\.7\.0\.1 is installed; build them again with t2v-rt"
    ):
        TextToVideoPipeline.from_pretrained(plans.folder)


def test_plans_from_elsewhere(plans: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "of another user"))
    with pytest.raises(BackendError, match="not built on this machine by you, and plans are native code"):
        TextToVideoPipeline.from_pretrained(plans.folder)
    check_trust(plans.folder, trust=True)
    assert main(["generate", "a", "--engines", str(plans.folder), "--output", str(tmp_path / "x.mp4")]) == 2


def test_trust_is_asked_for_before_the_gpu(
    plans: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not no_gpu():
        pytest.skip("there is a GPU")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "of another user"))
    for flags, message in (([], "--trust"), (["--trust"], "NVIDIA driver")):
        assert main(["verify", str(plans.folder), *flags]) == 2
        assert message in capsys.readouterr().err


def test_a_tampered_plan_is_refused(plans: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(plans.folder, folder)
    bundle = open_bundle(folder)
    path = folder / "transformer/model.plan"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"transformer/model\.plan is not the file that was built"):
        open_bundle(folder)
    with pytest.raises(BundleError, match="is not the file that was built"):  # after opening, before it is loaded
        check_file(bundle, "transformer/model.plan")


def test_other_gpus_are_refused(plans: Bundle) -> None:
    check_target(plans.manifest, "sm89", "NVIDIA GeForce RTX 4060")
    with pytest.raises(
        BackendError, match=r"RTX 2060 is sm75; build them for it with t2v-rt build-engines … --gpu sm75"
    ):
        check_target(plans.manifest, "sm75", "NVIDIA GeForce RTX 2060")
    check_target(replace(plans.manifest, targets=()), "sm75", "any")


def test_profiles_are_chosen_by_size(plans: Bundle) -> None:
    graph = plans.manifest.components["vae_decoder"].graphs["tail"]
    assert graph.plan is not None
    for i, profile in enumerate(graph.plan.profiles):
        assert choose_profile(graph, {name: size.opt for name, size in profile.sizes.items()}, "tail") == i
    best = graph.plan.profiles[0].sizes
    with pytest.raises(EngineError, match=r"tail: called with height 1, width 1; .* is height \d+, width \d+"):
        choose_profile(graph, dict.fromkeys(best, 1), "tail")
    with pytest.raises(
        RequestError, match="not built for 64x48 with 9 frames; the nearest video they make is 48x32 with 5"
    ):
        check_profiles(plans.manifest.profiles, 48, 64, 9)
    check_profiles(parse_profiles("32:64", 48, "5:81", (0, 0, 0)), 48, 48, 81)


def test_kernels_are_kept_privately(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache = KernelCache("plan, card")
    assert cache.read() is None
    cache.write(b"kernels")
    cache.write(b"more kernels")
    assert cache.read() == b"more kernels"
    assert KernelCache("plan, another card").read() is None
    (kept,) = (tmp_path / "t2v-rt" / "kernels").iterdir()
    if os.name == "posix":
        assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    monkeypatch.setattr("t2v_rt.system.files.create_private", _full)
    cache.write(b"lost")
    assert cache.read() == b"more kernels"


def _full(path: Path) -> None:
    raise OSError("no space left")


def test_errors_of_cuda() -> None:
    runtime = SimpleNamespace(cudaGetErrorString=lambda code: (0, b"invalid argument"))
    device = Cuda.__new__(Cuda)
    device._rt = runtime
    assert device._call(lambda: (0, 5)) == 5
    assert device._call(lambda: (0,)) == ()
    with pytest.raises(OutOfMemoryError, match="the GPU is out of memory: 64 MB on the GPU were asked for"):
        device._call(lambda: (devices.OUT_OF_MEMORY, None), what="64 MB on the GPU")
    with pytest.raises(EngineError, match="failed: CUDA error 1, invalid argument"):
        device._call(lambda: (1, None))


def test_pinned_memory_lives_as_long_as_its_arrays() -> None:
    raw = (ctypes.c_float * 6)(*range(6))
    freed: list[int] = []
    address = ctypes.addressof(raw)
    array = np.asarray(cuda._PinnedMemory(address, (2, 3), np.dtype(np.float32), freed.append))
    part = array[1]
    array[1, 2] = 7
    assert raw[5] == 7
    del array
    assert not freed
    del part
    assert freed == [address]


def test_the_library_has_what_is_called(library: Library) -> None:
    """A name that is misspelt shows here, not on the first user's card."""
    from cuda.bindings import runtime

    trt = library.trt
    users = "".join(inspect.getsource(user) for user in (backend_tensorrt, engine, card, libraries))
    for owner, names in {
        trt.Runtime: (
                "deserialize_cuda_engine", "engine_host_code_allowed", "engine_header_size", "get_engine_validity",
            ),
        trt.ICudaEngine: (
            "create_runtime_config", "create_execution_context", "get_device_memory_size_for_profile_v2",
        ),
        trt.IRuntimeConfig: (
            "set_execution_context_allocation_strategy", "cuda_graph_strategy", "create_runtime_cache",
            "set_runtime_cache",
        ),
        trt.IRuntimeCache: ("serialize", "deserialize"),
        trt.IExecutionContext: (
            "set_device_memory", "set_optimization_profile_async", "set_input_shape", "set_tensor_address",
            "execute_async_v3", "update_device_memory_size_for_shapes",
        ),
        trt.ExecutionContextAllocationStrategy: ("USER_MANAGED",),
        trt.CudaGraphStrategy: ("DISABLED", "WHOLE_GRAPH_CAPTURE"),
        trt.IHostMemory: ("nbytes",),
    }.items():  # fmt: skip
        for name in names:
            assert hasattr(owner, name), f"{owner.__name__}.{name}"
            assert f".{name}" in users or name == "nbytes"
    reasons = trt.EngineInvalidityDiagnostics.__members__
    assert {reason.name: reason.value for reason in Reason} == {name: item.value for name, item in reasons.items()}
    source = inspect.getsource(cuda) + inspect.getsource(devices)
    called = set(re.findall(r"\b(?:self\._rt|runtime)\.(cuda\w+)", source))
    assert called >= {"cudaMalloc", "cudaMemcpyAsync", "cudaHostAlloc", "cudaSetDeviceFlags", "cudaMemGetInfo"}
    for name in called:
        assert hasattr(runtime, name), name
    for name in ("cudaMemcpyHostToDevice", "cudaMemcpyDeviceToHost", "cudaMemcpyDeviceToDevice"):
        assert hasattr(runtime.cudaMemcpyKind, name)
    for name in ("name", "major", "minor", "totalGlobalMem"):
        assert hasattr(runtime.cudaDeviceProp(), name)


def test_what_the_library_says_without_a_gpu(plans: Bundle, library: Library) -> None:
    if not no_gpu():
        pytest.skip("there is a GPU")
    log = make_log(library.trt)
    loaded = library.trt.Runtime(log).deserialize_cuda_engine((plans.folder / "vae_decoder/tail.plan").read_bytes())
    assert loaded is None
    assert "CUDA driver" in log.take()[0]
    assert log.take() == []
