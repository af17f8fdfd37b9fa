"""ONNX Runtime as a backend: CPU, or CUDA through its provider."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from t2v_rt.engines.contract import Component, Engine, EngineState, Feeds, rotate
from t2v_rt.engines.linked_graph import FOLDER_OPTION, real_graph
from t2v_rt.engines.manifest import BLOCKS, ComponentSpec, GraphSpec
from t2v_rt.engines.specs import TensorSpec
from t2v_rt.errors import BackendError, EngineError, OutOfMemoryError

OUT_OF_MEMORY = re.compile(r"(failed|unable) to allocate|bad_?alloc|out of memory", re.IGNORECASE)
ERRORS_ONLY = 3  # ONNX Runtime's log level
PROVIDERS: Mapping[str, tuple[str, dict[str, str]]] = {
    "cpu": ("CPUExecutionProvider", {}),
    # on a small card the arena must not double on growth, nor cuDNN try out workspaces of any size
    "cuda": (
        "CUDAExecutionProvider",
        {"arena_extend_strategy": "kSameAsRequested", "cudnn_conv_algo_search": "HEURISTIC"},
    ),
}


Buffers = dict[str, ort.OrtValue]


class OrtState(EngineState):
    """Device buffers that are read, and spare ones that are written; after a call they change places.

    Args:
        current: name -> buffer.
        spare: likewise, of the states that are written; states that are used one after another share one.
        sizes: what the buffers were made for.
    """

    def __init__(self, current: Buffers, spare: Buffers, sizes: Mapping[str, int]) -> None:
        self.current, self.spare, self.sizes = current, spare, sizes

    @property
    def nbytes(self) -> int:
        return sum(value.tensor_size_in_bytes() for side in (self.current, self.spare) for value in side.values())

    def to_host(self) -> dict[str, NDArray[Any]]:
        return {name: value.numpy().copy() for name, value in self.current.items()}


class OrtEngine(Engine):
    """One ONNX graph in an inference session."""

    def __init__(self, name: str, spec: GraphSpec, session: ort.InferenceSession) -> None:
        super().__init__(name, spec)
        self._session: ort.InferenceSession | None = session

    def _run(self, feeds: Feeds, state: EngineState | None) -> dict[str, NDArray[Any]]:
        if self._session is None:
            raise EngineError(f"{self.name}: the engine is closed; open the component again")
        try:
            if not isinstance(state, OrtState):
                values = self._session.run([spec.name for spec in self.outputs], dict(feeds))
                return dict(zip([spec.name for spec in self.outputs], values, strict=True))
            return self._run_bound(self._session, feeds, state)
        except EngineError:
            raise
        except Exception as exc:  # ONNX Runtime's own exceptions have no common base below Exception
            if OUT_OF_MEMORY.search(str(exc)):
                raise OutOfMemoryError(f"{self.name}: ONNX Runtime ran out of memory") from exc
            raise EngineError(f"{self.name}: ONNX Runtime failed: {str(exc).splitlines()[0][:300]}") from exc

    def _run_bound(self, session: ort.InferenceSession, feeds: Feeds, state: OrtState) -> dict[str, NDArray[Any]]:
        binding = session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        for spec in self.outputs:
            binding.bind_output(spec.name, "cpu")
        for item in self.states:
            if item.input is not None:
                binding.bind_ortvalue_input(item.input, state.current[item.tensor.name])
            if item.output is not None:
                binding.bind_ortvalue_output(item.output, state.spare[item.tensor.name])
        session.run_with_iobinding(binding)
        results = [value.numpy() for value in binding.get_outputs()[: len(self.outputs)]]
        rotate(self.states, state.current, state.spare)
        return {spec.name: value for spec, value in zip(self.outputs, results, strict=True)}

    def close(self) -> None:
        self._session = None


class OrtComponent(Component):
    """A component whose engines are ONNX Runtime sessions."""

    device = "cpu"

    def new_states(
        self, count: int, *, height: int, width: int, part: str = "", resident: int | None = None
    ) -> list[OrtState]:
        sizes = {"height": height, "width": width}

        def buffers(tensors: Sequence[TensorSpec]) -> Buffers:
            zeros = {spec.name: np.zeros(spec.resolve(sizes), spec.numpy_dtype) for spec in tensors}
            return {name: ort.OrtValue.ortvalue_from_numpy(zero, self.device, 0) for name, zero in zeros.items()}

        try:
            spare = buffers(self.written(part))
            return [OrtState(buffers(self.states(part)), spare, sizes) for _ in range(count)]
        except MemoryError as exc:
            raise OutOfMemoryError(f"{self.name}: no memory for {count} states of {height}x{width}") from exc


@dataclass(frozen=True)
class OnnxRuntimeBackend:
    """Loads components into ONNX Runtime.

    Args:
        provider: `cpu` or `cuda`.
        threads: of one engine; None for as many as there are cores.

    Raises:
        BackendError: unknown provider, or one that this installation of ONNX Runtime lacks.
    """

    provider: str = "cpu"
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.provider not in PROVIDERS:
            raise BackendError(f"unknown provider {self.provider!r}; expected one of {', '.join(PROVIDERS)}")
        if self.threads is not None and self.threads < 1:
            raise BackendError(f"threads is {self.threads}; expected 1 or more")
        if PROVIDERS[self.provider][0] not in ort.get_available_providers():
            raise BackendError(
                f"this ONNX Runtime has no provider {self.provider!r}; install t2v-rt[cuda] on a machine with a GPU"
            )

    @property
    def device(self) -> str:
        """Empty on the CPU, where bundles' answers were computed; else the provider and ONNX Runtime's version."""
        return "" if self.provider == "cpu" else f"{self.provider}, ONNX Runtime {ort.__version__}"

    @property
    def identity(self) -> str:
        """Provider and version, and the machine, whose processor chooses the kernels."""
        return f"{self.provider}, ONNX Runtime {ort.__version__}, {platform.node()}"

    @property
    def memory_bytes(self) -> int | None:
        """Not known: ONNX Runtime does not tell it."""
        return None

    def load(self, folder: Path, name: str, spec: ComponentSpec) -> OrtComponent:
        """Loads the engines of a component.

        Args:
            folder: of the bundle.
            name: of the component.
            spec: from the manifest.

        Raises:
            EngineError: ONNX Runtime cannot load a graph.
        """
        engines: dict[str, Engine] = {}
        for role, graph in spec.graphs.items():
            label = name if role == "model" else f"{name}.{role}"
            packed = not role.startswith(BLOCKS)
            engines[role] = OrtEngine(label, graph, self._session(folder / graph.path, label, packed))
        component = OrtComponent(name, spec, engines)
        component.device = self.provider
        return component

    def _session(self, path: Path, label: str, packed: bool) -> ort.InferenceSession:
        """Loads a graph.

        Args:
            path: of the graph.
            label: named in errors.
            packed: whether its matrices are copied in the order that multiplying them is fastest in. Engines that run a
                few times only are not worth it: they use their weights where they are mapped from the file.
        """
        options = ort.SessionOptions()
        if not packed:
            options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_mem_pattern = False  # laid out ahead, activations take a quarter more and are no faster
        options.log_severity_level = ERRORS_ONLY
        options.intra_op_num_threads = self.threads or 0
        options.inter_op_num_threads = 1
        options.use_deterministic_compute = True
        name, settings = PROVIDERS[self.provider]
        source: str | bytes = str(path)
        if (linked := real_graph(path)) is not None:
            source, folder = linked
            options.add_session_config_entry(FOLDER_OPTION, str(folder))
        try:
            return ort.InferenceSession(source, options, providers=[(name, settings)])
        except Exception as exc:  # as above
            raise EngineError(
                f"{label}: ONNX Runtime cannot load {path.name}: {str(exc).splitlines()[0][:300]}"
            ) from exc
