"""OpenVINO on the bundle's own graphs: the same pipeline, with its runtime under the engines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module, util
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t2v_rt.benchmarks.peers.ours import SAME_NUMBERS, PipelinePeer
from t2v_rt.benchmarks.workloads import Job
from t2v_rt.engines.bundle.manifest import ComponentSpec, GraphSpec
from t2v_rt.engines.bundle.store import Bundle, open_bundle
from t2v_rt.engines.contract import Component, Engine, EngineState, Feeds, rotate
from t2v_rt.errors import EngineError
from t2v_rt.system.files import native_name
from t2v_rt.system.resources import usable_threads

GRAPHS = "onnxruntime"  # the backend whose bundles hold graphs
HALF_PRECISION = 0.1  # of bfloat16: 8 bits of a product, added up over a call
PRECISIONS: Mapping[str, str] = {"fp32": "f32", "bf16": "bf16"}


class ArrayState(EngineState):
    """States in arrays of the host.

    Args:
        current: name -> array that is read.
        spare: name -> array that a call writes.
        sizes: what they were made for.
    """

    def __init__(
        self, current: dict[str, NDArray[Any]], spare: dict[str, NDArray[Any]], sizes: Mapping[str, int]
    ) -> None:
        self.current, self.spare, self.sizes = current, spare, sizes

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for side in (self.current, self.spare) for array in side.values())

    def to_host(self) -> dict[str, NDArray[Any]]:
        return {name: array.copy() for name, array in self.current.items()}


class OpenVinoEngine(Engine):
    """One graph, compiled."""

    def __init__(self, name: str, spec: GraphSpec, compiled: Any) -> None:
        super().__init__(name, spec)
        self._request = compiled.create_infer_request()

    def _run(self, feeds: Feeds, state: EngineState | None, keep: Sequence[str]) -> dict[str, NDArray[Any]]:
        if self._request is None:
            raise EngineError(f"{self.name}: the engine is closed; open the component again")
        tensor = import_module("openvino").Tensor
        # arrays must be writeable, C-contiguous, and live until the end
        fed = {name: np.require(np.asarray(array), requirements=("C", "W")) for name, array in feeds.items()}
        for name, array in fed.items():
            self._request.set_tensor(name, tensor(array, shared_memory=True))
        if isinstance(state, ArrayState):
            for item in self.states:
                if item.input is not None:
                    current = state.current[item.tensor.name]
                    self._request.set_tensor(item.input, tensor(current, shared_memory=True))
                if item.output is not None:
                    spare = state.spare[item.tensor.name]
                    self._request.set_tensor(item.output, tensor(spare, shared_memory=True))
        self._request.infer()
        results = {spec.name: self._request.get_tensor(spec.name).data.copy() for spec in self.outputs}
        if isinstance(state, ArrayState):
            rotate(self.states, state.current, state.spare)
        return results

    def close(self) -> None:
        self._request = None


class OpenVinoComponent(Component):
    """A component of compiled graphs."""

    def new_states(
        self, count: int, *, height: int, width: int, role_prefix: str = "", resident: int | None = None
    ) -> Sequence[ArrayState]:
        sizes = {"height": height, "width": width}

        def arrays(tensors: Sequence[Any]) -> dict[str, NDArray[Any]]:
            return {spec.name: np.zeros(spec.resolve(sizes), spec.numpy_dtype) for spec in tensors}

        spare = arrays(self.written(role_prefix))
        return [ArrayState(arrays(self.states(role_prefix)), spare, sizes) for _ in range(count)]

    def trim(self) -> None:
        """Does nothing: what requests hold is theirs."""


@dataclass(frozen=True)
class OpenVinoBackend:
    """Loads graphs of a bundle into OpenVINO, on the CPU.

    Args:
        precision: that it may compute in: `f32` or `bf16`.
        threads: of its streams, or None.
    """

    precision: str
    threads: int | None
    device: str = ""
    identity: str = "openvino"
    own_memory: bool = False
    memory_bytes: int | None = None
    device_key: str | None = None

    def free_bytes(self) -> int | None:
        """The host's memory is no device's own."""
        return None

    def buffer_bytes(self) -> int | None:
        """The host's memory is no device's own."""
        return None

    def load(self, folder: Path, name: str, spec: ComponentSpec) -> OpenVinoComponent:
        """Compiles the graphs of a component."""
        core = import_module("openvino").Core()
        settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": self.precision, "PERFORMANCE_HINT": "LATENCY"}
        threads = usable_threads(self.threads)
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        engines: dict[str, Engine] = {}
        for role, graph in spec.graphs.items():
            model = core.read_model(native_name(folder / graph.path))
            engines[role] = OpenVinoEngine(f"{name}.{role}", graph, core.compile_model(model, "CPU", settings))
        return OpenVinoComponent(name, spec, engines)


def make_backend(precision: str, bundle: Bundle, job: Job) -> OpenVinoBackend:
    """OpenVINO for a bundle of graphs."""
    return OpenVinoBackend(PRECISIONS[precision], job.threads)


def why_missing(precision: str, job: Job) -> str:
    """Without the package, where the bundle holds no graphs, or where the processor has no units for the precision."""
    if util.find_spec("openvino") is None:
        return "the package openvino is not installed; install it"
    backend = open_bundle(job.bundle).manifest.backend
    if backend != GRAPHS:
        return f"the bundle is of {backend}; build one of {GRAPHS}, which holds graphs"
    if precision != "fp32":
        able = import_module("openvino").Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if precision.upper() not in able:
            return f"this processor computes {', '.join(able)} and no {precision}; use one that has units for it"
    return ""


OPENVINO = PipelinePeer(partial(make_backend, "fp32"), partial(why_missing, "fp32"), SAME_NUMBERS)
OPENVINO_BF16 = PipelinePeer(partial(make_backend, "bf16"), partial(why_missing, "bf16"), HALF_PRECISION)
