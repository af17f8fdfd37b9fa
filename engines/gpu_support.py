"""Which GPUs and drivers a backend runs on, by what is known without asking CUDA; pure functions and tables."""

from __future__ import annotations

from collections.abc import Mapping

from t2v_rt.engines.backend_info import BACKENDS, BackendInfo

# first branch of NVIDIA's drivers that supports a CUDA version
CUDA_OF_DRIVERS: Mapping[int, tuple[int, int]] = {
    525: (12, 0), 530: (12, 1), 535: (12, 2), 545: (12, 3), 550: (12, 4), 555: (12, 5), 560: (12, 6), 565: (12, 7),
    570: (12, 8), 575: (12, 9), 580: (13, 0), 590: (13, 1),
}  # fmt: skip
FIRST_DRIVERS = {12: 525, 13: 580}  # of CUDA's major versions
# GPUs that plans are built for by name, and what they are
TARGETS: Mapping[str, str] = {
    "sm75": "GeForce RTX 20",
    "sm80": "A100",
    "sm86": "GeForce RTX 30",
    "sm89": "GeForce RTX 40",
    "sm120": "GeForce RTX 50",
    "sm121": "GB10",
}
LEAST_COMPUTE = {12: 5.0, 13: 7.5}  # of a GPU, for CUDA's major versions
INSTEAD = "use --backend onnxruntime with --provider cuda (experimental), or --backend tensorrt, built on such a GPU"


def driver_cuda(driver: str) -> str:
    """The newest CUDA version that a driver supports, as text.

    Args:
        driver: its version, such as `560.94`.
    """
    branch = _branch(driver)
    known = [cuda for first, cuda in CUDA_OF_DRIVERS.items() if first <= branch]
    return f"CUDA {known[-1][0]}.{known[-1][1]}" if known else "no CUDA 12"


def _branch(driver: str) -> int:
    first = driver.split(".", maxsplit=1)[0]
    return int(first) if first.isdigit() else 0


def old_driver(has: str, needs: str, major: int, extra: str) -> tuple[str, str]:
    """Why a driver is too old, and what to do.

    Args:
        has: what it supports, such as `CUDA 12.6`.
        needs: what asks for more, such as `cuda-bindings is of CUDA 13.5`.
        major: of the CUDA version that is asked for.
        extra: of t2v-rt that brings the packages.
    """
    newer = f"driver R{FIRST_DRIVERS[major]} or newer" if major in FIRST_DRIVERS else "a newer driver"
    older = next((info.for_cuda_12 for info in BACKENDS.values() if info.extra == extra), "") if major > 12 else ""
    install = f', or pip install {older} "cuda-bindings<13" in an environment without {extra}' if older else ""
    return f"the NVIDIA driver supports {has}, {needs}", f"install {newer}{install}"


def explain_old_driver(has: str, needs: str, major: int, extra: str) -> str:
    """The same in one line; see `old_driver`."""
    return "; ".join(old_driver(has, needs, major, extra))


def why_unusable(backend: str, info: BackendInfo, gpu: tuple[str, float, str], major: int) -> tuple[str, str]:
    """Why a backend does not run on a GPU with its driver, and what to do; two empty texts where it does.

    Args:
        backend: its name.
        info: what is known of it.
        gpu: name, compute capability and version of the driver, as nvidia-smi tells them.
        major: of the CUDA version that its packages are for; 0 where that is not known.
    """
    name, capability, driver = gpu
    target = f"sm{round(capability * 10)}"
    least = LEAST_COMPUTE.get(major, 0.0) if info.least_compute is None else info.least_compute
    if capability < least:
        return f"{name} has compute capability {capability}", f"use one of {least} or more (RTX 20 or newer)"
    if "gpus" in info.options and target not in TARGETS:
        return f"{name} is {target}, for which {backend} has no kernels", INSTEAD
    if _branch(driver) < FIRST_DRIVERS.get(major, 0):
        needs = f"{backend} is installed for CUDA {major}"
        return old_driver(driver_cuda(driver), needs, major, info.extra)
    return "", ""
