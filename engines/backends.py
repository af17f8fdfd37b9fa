"""The backends by name, and the one place that chooses among them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from t2v_rt.engines.bundle.manifest import ComponentSpec
from t2v_rt.engines.bundle.store import Bundle
from t2v_rt.engines.contract import Component
from t2v_rt.errors import BackendError

BACKENDS = ("onnxruntime", "tensorrt-rtx", "tensorrt")


class Backend(Protocol):
    """Loads components of a bundle."""

    @property
    def device(self) -> str:
        """GPU, driver and library, where they have to prove themselves before they are used; empty on the CPU."""
        ...

    @property
    def identity(self) -> str:
        """Whatever may change a result in its last bits: libraries, device, driver."""
        ...

    @property
    def memory_bytes(self) -> int | None:
        """Of the device in all, where it has memory of its own; None where it is the machine's."""
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
    """Makes ONNX Runtime ready to load components of any bundle.

    Args:
        name: `onnxruntime`.
        provider: provider of ONNX Runtime: `cpu` or `cuda`.
        threads: threads of each engine on the CPU; None for as many as there are cores.

    Raises:
        BackendError: unknown, not installed, or not usable on this machine.
    """
    if check_backend(name) != "onnxruntime":
        raise BackendError(f"{name} runs the plans of a bundle; open one that was built for it")
    from t2v_rt.engines.onnxruntime.backend import OnnxRuntimeBackend

    return OnnxRuntimeBackend(provider, threads)


def backend_of(
    bundle: Bundle,
    name: str | None = None,
    *,
    provider: str = "cpu",
    threads: int | None = None,
    trust: bool = False,
) -> Backend:
    """Makes the backend ready that a bundle was built for.

    Args:
        bundle: the opened bundle.
        name: must be the bundle's own; None takes that one.
        provider: provider of ONNX Runtime: `cpu` or `cuda`.
        threads: threads of each engine on the CPU; None for as many as there are cores.
        trust: whether plans may be run that were not built on this machine by this user.

    Raises:
        BackendError: unknown, not the bundle's, not installed, or not usable on this machine.
    """
    built_for = bundle.manifest.backend
    if name is not None and check_backend(name) != built_for:
        raise BackendError(f"{bundle.folder} was built for {built_for}, not {name}; build it for {name}")
    if built_for == "onnxruntime":
        return get_backend(built_for, provider=provider, threads=threads)
    from t2v_rt.engines.tensorrt.backend import TensorRTBackend

    return TensorRTBackend(bundle, trust)
