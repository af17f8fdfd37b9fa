"""The one place that chooses among the backends; what is known of each is in `backend_info`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from t2v_rt.engines.backend_info import backend_info, check_backend, check_options
from t2v_rt.engines.bundle.manifest import ComponentSpec
from t2v_rt.engines.bundle.store import Bundle
from t2v_rt.engines.contract import Component
from t2v_rt.engines.devices import check_index
from t2v_rt.errors import BackendError


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
    def own_memory(self) -> bool:
        """Whether engines work in memory of the device's own, a card's; otherwise in the machine's."""
        ...

    @property
    def memory_bytes(self) -> int | None:
        """Of the device in all, where it has memory of its own; None where that is not known, or the machine's."""
        ...

    @property
    def device_key(self) -> str | None:
        """The same for all that share the device's memory in this process; None where that is the machine's."""
        ...

    def free_bytes(self) -> int | None:
        """Of the device's own memory, what is free now, whoever holds the rest; None where it is not known."""
        ...

    def buffer_bytes(self) -> int | None:
        """Of the device's own memory, what this process holds beside weights; None where its library does not tell."""
        ...

    def load(self, folder: Path, name: str, spec: ComponentSpec) -> Component:
        """Loads the engines of one component."""
        ...


def load_shards(backend: Backend, folder: Path, name: str, spec: ComponentSpec) -> Iterator[Component]:
    """Loads the shards of a component one after another, each released before the next (see `ComponentSpec.shards`)."""
    for shard in spec.shards:
        with backend.load(folder, name, shard) as component:
            yield component


def get_backend(
    name: str, *, provider: str | None = None, threads: int | None = None, device: int | None = None
) -> Backend:
    """Makes a backend ready that can load components of any bundle.

    Args:
        name: of a backend that runs graphs.
        provider: provider of ONNX Runtime, `cpu` or `cuda`; None for `cpu`.
        threads: threads of each engine on the CPU; None for as many as there are cores.
        device: index of the GPU, as CUDA counts them; None for the first.

    Raises:
        BackendError: unknown, not installed, or not usable on this machine; or an option that it does not have.
    """
    info = backend_info(name)
    if info.ahead_of_time:
        raise BackendError(f"{name} runs the plans of a bundle; open one that was built for it")
    check_options(name, {"provider": provider, "threads": threads, "device": device})
    from t2v_rt.engines.onnxruntime.backend import OnnxRuntimeBackend

    return OnnxRuntimeBackend(str(info.default_provider) if provider is None else provider, threads, device)


def backend_of(
    bundle: Bundle,
    name: str | None = None,
    *,
    provider: str | None = None,
    threads: int | None = None,
    device: int | None = None,
    trust: bool = False,
) -> Backend:
    """Makes the backend ready that a bundle was built for.

    Args:
        bundle: the opened bundle.
        name: must be the bundle's own; None takes that one.
        provider: provider of ONNX Runtime, `cpu` or `cuda`; None for `cpu`.
        threads: threads of each engine on the CPU; None for as many as there are cores.
        device: index of the GPU, as CUDA counts them; None for the first.
        trust: whether plans may be run that were not built on this machine by this user.

    Raises:
        BackendError: unknown, not the bundle's, not installed, or not usable on this machine; or an option that it does
            not have.
    """
    built_for = bundle.manifest.backend
    if name is not None and check_backend(name) != built_for:
        raise BackendError(f"{bundle.folder} was built for {built_for}, not {name}; build it for {name}")
    given = {"provider": provider, "threads": threads, "device": device, "trust": trust or None}
    check_options(built_for, given)
    if not backend_info(built_for).ahead_of_time:
        return get_backend(built_for, provider=provider, threads=threads, device=device)
    from t2v_rt.engines.tensorrt.backend import TensorRTBackend

    return TensorRTBackend(bundle, trust, check_index(device))
