"""The doctor command: what of this machine can be used, and for the rest, why not and what to do."""

from __future__ import annotations

import argparse
import os
import platform as python_platform
from collections.abc import Iterator, Mapping
from importlib import util
from typing import Any

from t2v_rt.engines.backend_info import BACKENDS, BackendInfo
from t2v_rt.engines.gpu_support import FIRST_DRIVERS, why_unusable
from t2v_rt.errors import BackendError
from t2v_rt.numbers import is_older
from t2v_rt.system.installed import installed_version, query_driver, read_rows
from t2v_rt.system.resources import available_memory_bytes

LIBRARIES = (
    "t2v-rt", "numpy", "onnxruntime", "onnxruntime-gpu", "tokenizers", "av", "onnx", "tensorrt-rtx", "tensorrt",
    "cuda-bindings", "huggingface-hub", "torch", "diffusers",
)  # fmt: skip
GPU_FIELDS = ("name", "driver_version", "compute_cap", "memory.total", "memory.free")
EXPERIMENTAL = "experimental: it has not run on a GPU yet"

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
        (name -> `usable`, `why`, `todo`, `note`).
    """
    gpus, gpu_problem = find_gpus()
    return {
        "python": python_platform.python_version(),
        "system": f"{python_platform.system()} {python_platform.release()} {python_platform.machine()}",
        "cores": os.cpu_count(),
        "memory_bytes": available_memory_bytes(),
        "libraries": {name: installed_version(name) for name in LIBRARIES},
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
    text, problem = query_driver(GPU_FIELDS)
    gpus = read_gpus(text)
    return gpus, problem or ("" if gpus else "the driver knows of no GPU")


def read_gpus(text: str) -> list[dict[str, Any]]:
    """Reads what nvidia-smi prints for `GPU_FIELDS`, one GPU a line, memory in MiB; unreadable lines are left out."""
    gpus = []
    for name, driver, compute, total, free in read_rows(text, len(GPU_FIELDS)):
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
        state += f" ({backend['note']})" if backend["note"] else ""
        lines.append(f"{name:18} {state}")
    return lines


def _verdict(why: str = "", todo: str = "", note: str = "") -> dict[str, Any]:
    return {"usable": not why, "why": why, "todo": todo, "note": note}


def _verdicts(
    name: str, info: BackendInfo, gpus: list[dict[str, Any]], gpu_problem: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and verdict of a backend, or of each provider that it can run on."""
    if info.ahead_of_time:
        yield name, _plans(name, info, gpus, gpu_problem)
    for provider in info.providers:
        entry = name if provider == info.default_provider else f"{name}, {provider}"
        yield entry, _on_card(info, gpus, gpu_problem) if info.has_own_memory(provider) else _verdict()


def _on_card(info: BackendInfo, gpus: list[dict[str, Any]], gpu_problem: str) -> dict[str, Any]:
    """Of ONNX Runtime's provider for GPUs."""
    from t2v_rt.engines.onnxruntime import cuda_provider
    from t2v_rt.engines.onnxruntime.imported import ort

    try:
        cuda_provider.check_provider()
    except BackendError as exc:
        why, todo = str(exc).split("; ", 1)
        return _verdict(why, todo, EXPERIMENTAL)
    if not gpus:
        return _verdict(gpu_problem, "use it on a machine with an NVIDIA GPU and driver", EXPERIMENTAL)
    built_for = int(ort.cuda_version.split(".")[0] or 0)
    return _verdict(*best_verdict("onnxruntime-gpu", info, gpus, built_for), EXPERIMENTAL)


def _plans(name: str, info: BackendInfo, gpus: list[dict[str, Any]], gpu_problem: str) -> dict[str, Any]:
    if util.find_spec(info.module) is None:
        return _verdict(f"the package {info.module} is not installed", f"install t2v-rt[{info.extra}]")
    if util.find_spec("cuda") is None or util.find_spec("cuda.bindings") is None:
        return _verdict("the package cuda-bindings is not installed", f"install t2v-rt[{info.extra}]")
    if (version := installed_version(info.extra)) is not None and is_older(version, info.least_version):
        return _verdict(f"{name} {version} is older than {info.least_version}", f"install t2v-rt[{info.extra}] anew")
    if not gpus:
        builds = "engines can be built here all the same" if "gpus" in info.options else "it builds on a GPU only"
        return _verdict(gpu_problem, builds)
    bindings = int((installed_version("cuda-bindings") or "0").split(".")[0])
    own = [major for major in FIRST_DRIVERS if installed_version(f"{info.extra}-cu{major}") is not None]
    return _verdict(*best_verdict(name, info, gpus, max([bindings, *own])))


def best_verdict(name: str, info: BackendInfo, gpus: list[dict[str, Any]], major: int) -> tuple[str, str]:
    """Why a backend runs on none of the GPUs, and what to do, as of the first; two empty texts where one will do."""
    cards = [(gpu["name"], gpu["compute_capability"], gpu["driver"]) for gpu in gpus]
    verdicts = [why_unusable(name, info, card, major) for card in cards]
    return ("", "") if ("", "") in verdicts else verdicts[0]
