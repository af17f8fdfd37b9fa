"""The doctor command: what of this machine can be used, and for the rest, why not and what to do."""

from __future__ import annotations

import argparse
import csv
import io
import os
import platform as python_platform
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from importlib import metadata, util
from typing import Any

from t2v_rt.engines.backend_info import BACKENDS, BackendInfo
from t2v_rt.system.resources import available_memory_bytes

LIBRARIES = (
    "t2v-rt", "numpy", "onnxruntime", "onnxruntime-gpu", "tokenizers", "av", "onnx", "tensorrt-rtx", "tensorrt",
    "cuda-bindings", "huggingface-hub", "torch", "diffusers",
)  # fmt: skip
GPU_FIELDS = ("name", "driver_version", "compute_cap", "memory.total", "memory.free")
SMI_SECONDS = 20  # a card that is going wrong can make nvidia-smi hang

EXAMPLE = "example: t2v-rt doctor"


def declare(parser: argparse.ArgumentParser) -> None:
    """The command has no options of its own."""
    parser.epilog = EXAMPLE


def run(parsed: argparse.Namespace) -> dict[str, Any]:
    """Examines the machine; returns the report."""
    return examine()


def examine() -> dict[str, Any]:
    """Looks at Python, libraries, memory, GPUs and backends; changes nothing and loads no library for long.

    Returns:
        A report of plain JSON values: `python`, `system`, `cores`, `memory_bytes`, `libraries`, `gpus`, `backends`
        (name -> `usable`, `why`, `todo`).
    """
    gpus, gpu_problem = find_gpus()
    return {
        "python": python_platform.python_version(),
        "system": f"{python_platform.system()} {python_platform.release()} {python_platform.machine()}",
        "cores": os.cpu_count(),
        "memory_bytes": available_memory_bytes(),
        "libraries": {name: _version(name) for name in LIBRARIES},
        "gpus": gpus,
        "gpu_problem": gpu_problem,
        "backends": {
            entry: verdict
            for name, info in BACKENDS.items()
            for entry, verdict in _verdicts(name, info, gpus, gpu_problem)
        },
    }


def find_gpus() -> tuple[list[dict[str, Any]], str]:
    """The NVIDIA GPUs that the driver tells of, and, where there are none, why.

    Returns:
        (GPUs with `name`, `driver`, `compute_capability`, `memory_bytes`, `free_bytes`; a reason or "").
    """
    command = shutil.which("nvidia-smi")
    if command is None:
        return [], "no NVIDIA driver is installed: nvidia-smi is not found"
    query = [command, f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        result = subprocess.run(query, capture_output=True, text=True, timeout=SMI_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as exc:
        return [], f"nvidia-smi does not answer ({type(exc).__name__})"
    if result.returncode != 0:
        said = " ".join((result.stdout or result.stderr).split())[:200]
        return [], f"nvidia-smi failed: {said}"
    gpus = read_gpus(result.stdout)
    return gpus, "" if gpus else "the driver knows of no GPU"


def read_gpus(text: str) -> list[dict[str, Any]]:
    """Reads what nvidia-smi prints for `GPU_FIELDS`, one GPU a line, memory in MiB; unreadable lines are left out."""
    gpus = []
    for row in csv.reader(io.StringIO(text), skipinitialspace=True):
        if len(row) != len(GPU_FIELDS):
            continue
        name, driver, compute, total, free = row
        try:
            gpus.append(
                {
                    "name": name,
                    "driver": driver,
                    "compute_capability": float(compute),
                    "memory_bytes": int(total) * 2**20,
                    "free_bytes": int(free) * 2**20,
                }
            )
        except ValueError:
            continue
    return gpus


def describe(report: Mapping[str, Any]) -> list[str]:
    """The report for a person."""
    installed = ", ".join(f"{name} {version}" for name, version in report["libraries"].items() if version)
    lines = [
        f"python     {report['python']}, {report['system']}, {report['cores']} cores",
        f"memory     {report['memory_bytes'] / 1e9:.1f} GB available",
        f"libraries  {installed}",
    ]
    for gpu in report["gpus"]:
        lines.append(
            f"gpu        {gpu['name']}, compute capability {gpu['compute_capability']}, driver {gpu['driver']}, "
            f"{gpu['free_bytes'] / 1e9:.1f} of {gpu['memory_bytes'] / 1e9:.1f} GB free"
        )
    if not report["gpus"]:
        lines.append(f"gpu        none: {report['gpu_problem']}")
    for name, backend in report["backends"].items():
        state = "usable" if backend["usable"] else f"no: {backend['why']}; {backend['todo']}"
        lines.append(f"{name:18} {state}")
    return lines


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _verdict(why: str = "", todo: str = "") -> dict[str, Any]:
    return {"usable": not why, "why": why, "todo": todo}


def _verdicts(
    name: str, info: BackendInfo, gpus: list[dict[str, Any]], gpu_problem: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and verdict of a backend, or of each provider that it can run on."""
    if info.ahead_of_time:
        yield name, _plans(info, gpus, gpu_problem)
    for provider in info.providers:
        entry = name if provider == info.default_provider else f"{name}, {provider}"
        yield entry, _graphs(info, provider, gpus, gpu_problem)


def _graphs(info: BackendInfo, provider: str, gpus: list[dict[str, Any]], gpu_problem: str) -> dict[str, Any]:
    from t2v_rt.engines.onnxruntime.backend import PROVIDERS
    from t2v_rt.engines.onnxruntime.imported import ort

    called, _ = PROVIDERS[provider]
    if called not in ort.get_available_providers():
        return _verdict(f"this ONNX Runtime has no {called}", f"install t2v-rt[{provider}] on a machine with a GPU")
    if info.has_own_memory(provider) and not gpus:
        return _verdict(gpu_problem, "use it on a machine with an NVIDIA GPU and driver")
    return _verdict()


def _plans(info: BackendInfo, gpus: list[dict[str, Any]], gpu_problem: str) -> dict[str, Any]:
    if util.find_spec(info.module) is None:
        return _verdict(f"the package {info.module} is not installed", f"install t2v-rt[{info.extra}]")
    if util.find_spec("cuda") is None or util.find_spec("cuda.bindings") is None:
        return _verdict("the package cuda-bindings is not installed", f"install t2v-rt[{info.extra}]")
    if not gpus:
        builds = "engines can be built here all the same" if "gpus" in info.options else "it builds on a GPU only"
        return _verdict(gpu_problem, builds)
    best = max(gpu["compute_capability"] for gpu in gpus)
    if info.least_compute is not None and best < info.least_compute:
        return _verdict(
            f"the GPU has compute capability {best}", f"use one of {info.least_compute} or more (RTX 20 or newer)"
        )
    return _verdict()
