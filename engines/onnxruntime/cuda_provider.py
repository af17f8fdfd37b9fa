"""ONNX Runtime's CUDA provider: its settings, and what is checked before it is used. Experimental: no GPU has run it.

Where the provider cannot be started, ONNX Runtime goes on without a word on the CPU; so each session is asked.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from contextlib import redirect_stdout
from functools import cache

from t2v_rt.engines.devices import find_device, load_cuda
from t2v_rt.engines.onnxruntime.imported import ort
from t2v_rt.errors import BackendError, EngineError
from t2v_rt.numbers import is_older
from t2v_rt.system import forked

logger = logging.getLogger(__name__)
PROVIDER, EXTRA = "CUDAExecutionProvider", "cuda"
PACKAGES = ("onnxruntime", "onnxruntime-gpu")  # both put their files into the folder onnxruntime
LEAST_VERSION = "1.26"  # before it attention was computed on the CPU, whatever the provider
INSTALL = (
    f'pip uninstall {" ".join(PACKAGES)}, then pip install "onnxruntime-gpu[cuda,cudnn]>={LEAST_VERSION}" on a machine '
    "with a GPU"
)


def cuda_settings(index: int) -> dict[str, str]:
    """The provider's settings for a GPU.

    On a small card the arena must not double on growth, nor cuDNN try out workspaces of any size. TF32 has 10 bits
    after the point, which is too few for what is said to be float32.
    """
    return {
        "device_id": str(index),
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC",
        "use_tf32": "0",
    }


def check_provider() -> None:
    """Refuses an installation that cannot run on a GPU; whether the GPU can be used shows when a graph is loaded.

    Raises:
        BackendError: both packages of ONNX Runtime are installed, or one without the provider, or too old a one.
    """
    from t2v_rt.system.installed import installed_version  # takes long to import, and the CPU needs it not

    found = {name: version for name in PACKAGES if (version := installed_version(name)) is not None}
    if len(found) > 1:
        both = " and ".join(f"{name} {version}" for name, version in found.items())
        raise BackendError(f"{both} are installed into one folder, where one hides the other's provider; {INSTALL}")
    if PROVIDER not in ort.get_available_providers():
        raise BackendError(f"this ONNX Runtime has no provider 'cuda'; {INSTALL}")
    if is_older(ort.__version__, LEAST_VERSION):
        raise BackendError(
            f"onnxruntime-gpu {ort.__version__} is installed, {LEAST_VERSION} or newer is needed; {INSTALL}"
        )


@cache
def preload() -> str:
    """Loads CUDA's libraries from their packages, once; returns what ONNX Runtime says of those that it missed."""
    with redirect_stdout(io.StringIO()) as said:  # it prints
        ort.preload_dlls()
    return " ".join(said.getvalue().split())


def check_in_use(providers: Sequence[str], label: str) -> None:
    """Refuses a session that does not run on the GPU.

    Args:
        providers: of the session, the one that it runs on first.
        label: of its engine.

    Raises:
        BackendError: it runs on the CPU instead.
    """
    if providers[0] != PROVIDER:
        said = preload()[:200]
        why = f" ({said})" if said else ""
        raise BackendError(
            f"{label}: ONNX Runtime could not start CUDA and would run on {providers[0]}{why}; "
            'install a driver and, by pip install "onnxruntime-gpu[cuda,cudnn]", CUDA and cuDNN'
        )


def describe_card(index: int) -> str:
    """The GPU and its driver as CUDA tells of them, or its index where it does not."""
    forked.claim_gpu()
    try:
        info = find_device(load_cuda(EXTRA), EXTRA, index)
    except (BackendError, EngineError):
        return f"GPU {index}"
    return f"{info.name}, CUDA driver {info.driver}"


def check_card(index: int) -> None:
    """Refuses a GPU that is not there; raises BackendError, which names those that are."""
    forked.claim_gpu()
    find_device(load_cuda(EXTRA), EXTRA, index)
