"""Names the machine a figure was measured on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from t2v_rt.benchmarks.cards import describe_cards
from t2v_rt.system.installed import installed_version
from t2v_rt.system.resources import usable_processors

PACKAGES = (
    *("t2v-rt", "numpy", "onnxruntime", "onnxruntime-gpu", "tensorrt-rtx", "tensorrt", "torch", "diffusers"),
    *("transformers", "openvino", "stable-diffusion-cpp-python"),
)


def describe_machine() -> dict[str, object]:
    """CPU, cores, memory, system, Python and the versions of the packages that matter; the cards, where there are."""
    versions = {name: version for name in PACKAGES if (version := installed_version(name)) is not None}
    machine: dict[str, object] = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "usable_cores": usable_processors(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": versions,
    }
    cards = describe_cards()
    return {**machine, "cards": cards} if cards else machine


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
