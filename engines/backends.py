"""The backends by name, and the one place that chooses among them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from t2v_rt.engines.contract import Component
from t2v_rt.engines.manifest import ComponentSpec
from t2v_rt.errors import BackendError

BACKENDS = ("onnxruntime", "tensorrt-rtx", "tensorrt")


class Backend(Protocol):
    """Loads components of a bundle."""

    @property
    def device(self) -> str:
        """GPU, driver and library, where they have to prove themselves before they are used; empty on the CPU."""
        ...

    def load(self, folder: Path, name: str, spec: ComponentSpec) -> Component:
        """Loads the engines of one component."""
        ...


def load_parts(backend: Backend, folder: Path, name: str, spec: ComponentSpec) -> Iterator[Component]:
    """Loads the parts of a component one after another, each released before the next (see `ComponentSpec.parts`)."""
    for part in spec.parts:
        with backend.load(folder, name, part) as component:
            yield component


def check_backend(name: str) -> str:
    """Returns a known backend's name; raises BackendError, with the known ones, for any other."""
    if name not in BACKENDS:
        raise BackendError(f"unknown backend {name!r}; expected one of {', '.join(BACKENDS)}")
    return name


def get_backend(name: str, *, provider: str = "cpu", threads: int | None = None) -> Backend:
    """Makes a backend ready to load components.

    Args:
        name: one of `BACKENDS`.
        provider: of ONNX Runtime: `cpu` or `cuda`.
        threads: per engine on the CPU; None for as many as there are cores.

    Raises:
        BackendError: unknown, not installed, or not usable on this machine.
    """
    if check_backend(name) != "onnxruntime":
        raise BackendError(f"running engines of {name} is not available in this version; use onnxruntime")
    from t2v_rt.engines.backend_onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend(provider, threads)
