"""ONNX Runtime as a backend: CPU, or CUDA through its provider."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t2v_rt.engines.backend_info import BACKENDS
from t2v_rt.engines.bundle.manifest import BLOCKS, ComponentSpec, GraphSpec
from t2v_rt.engines.contract import Component, DeviceArray, Engine, EngineState, Feeds, rotate
from t2v_rt.engines.devices import card_bytes, check_index, device_key
from t2v_rt.engines.onnxruntime import cuda_provider
from t2v_rt.engines.onnxruntime.imported import ort
from t2v_rt.engines.onnxruntime.linked_graph import FOLDER_OPTION, real_graph
from t2v_rt.engines.specs import TensorSpec
from t2v_rt.errors import BackendError, EngineError, OutOfMemoryError
from t2v_rt.numbers import as_integer
from t2v_rt.system import forked
from t2v_rt.system.files import native_name
from t2v_rt.system.resources import usable_threads

OUT_OF_MEMORY = re.compile(r"(failed|unable) to allocate|bad_?alloc|out of memory", re.IGNORECASE)
ERRORS_ONLY = 3  # ONNX Runtime's log level
# A product with a matrix that is mapped from its file adds up its terms in blocks, whose length is another where a
# thread has 64 columns or fewer. So threads have more than that each, and narrow matrices always the same number of
# threads: then results do not depend on how many are asked for.
COLUMNS_PER_THREAD = 128
FEW_THREADS = 2
PROVIDERS: Mapping[str, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": cuda_provider.PROVIDER,
}


Buffers = dict[str, ort.OrtValue]


class OrtState(EngineState):
    """Device buffers that are read, and spare ones that are written; after a call they change places.

    Args:
        current: name -> buffer.
        spare: name -> buffer of the states that are written; states that are used one after another share one.
        sizes: what the buffers were made for.
    """

    def __init__(self, current: Buffers, spare: Buffers, sizes: Mapping[str, int]) -> None:
        self.current, self.spare, self.sizes = current, spare, sizes
        forked.watch(self)

    def after_fork(self) -> None:
        """Leaves the buffers to the parent, as they may lie on a GPU; see `t2v_rt.system.forked`."""
        forked.abandon(*self.current.values(), *self.spare.values())

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
        self._closed = "the engine is closed; open the component again"
        forked.watch(self)

    def after_fork(self) -> None:
        """Leaves the session to the parent; see `t2v_rt.system.forked`."""
        forked.abandon(self._session)
        self._session = None
        self._closed = "the engine belongs to the process that this one was forked from; call the pipeline anew"

    def _run(self, feeds: Feeds, state: EngineState | None, keep: Sequence[str]) -> dict[str, NDArray[Any]]:
        """Outputs to keep are on the host as well: where engines work, or where the provider's give what they made."""
        if self._session is None:
            raise EngineError(f"{self.name}: {self._closed}")
        arrays: dict[str, NDArray[Any]] = {}
        for name, array in feeds.items():
            if isinstance(array, DeviceArray):
                raise EngineError(f"{self.name}: {name!r} is on a GPU; expected a NumPy array, as its to_host() gives")
            arrays[name] = np.asarray(array, order="C")
        try:
            if not isinstance(state, OrtState):
                values = self._session.run([spec.name for spec in self.outputs], arrays)
                return dict(zip([spec.name for spec in self.outputs], values, strict=True))
            return self._run_bound(self._session, arrays, state)
        except EngineError:
            raise
        except Exception as exc:  # ONNX Runtime's own exceptions have no common base below Exception
            if OUT_OF_MEMORY.search(str(exc)):
                raise OutOfMemoryError(f"{self.name}: ONNX Runtime ran out of memory") from exc
            raise EngineError(f"{self.name}: ONNX Runtime failed: {str(exc).splitlines()[0][:300]}") from exc

    def _run_bound(
        self, session: ort.InferenceSession, feeds: Mapping[str, NDArray[Any]], state: OrtState
    ) -> dict[str, NDArray[Any]]:
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
        with forked.loading:
            self._session = None


class OrtComponent(Component):
    """A component whose engines are ONNX Runtime sessions."""

    device, index = "cpu", 0

    def new_states(
        self, count: int, *, height: int, width: int, role_prefix: str = "", resident: int | None = None
    ) -> list[OrtState]:
        sizes = {"height": height, "width": width}

        def buffers(tensors: Sequence[TensorSpec]) -> Buffers:
            zeros = {spec.name: np.zeros(spec.resolve(sizes), spec.numpy_dtype) for spec in tensors}
            return {
                name: ort.OrtValue.ortvalue_from_numpy(zero, self.device, self.index) for name, zero in zeros.items()
            }

        try:
            spare = {
                spec.name: ort.OrtValue.ortvalue_from_shape_and_type(
                    spec.resolve(sizes), spec.numpy_dtype, self.device, self.index
                )
                for spec in self.written(role_prefix)  # each is written before it is read
            }
            return [OrtState(buffers(self.states(role_prefix)), spare, sizes) for _ in range(count)]
        except MemoryError as exc:
            raise OutOfMemoryError(f"{self.name}: no memory for {count} states of {height}x{width}") from exc

    def trim(self) -> None:
        """Does nothing: a session's arena is its own, and plans count it as long as the session is there."""


@dataclass(frozen=True)
class OnnxRuntimeBackend:
    """Loads components into ONNX Runtime.

    Args:
        provider: `cpu` or `cuda`.
        threads: of one engine; None for as many as there are cores. Never more than this process may use. The text
            encoder has fewer, or two at least, where its result would depend on their number.
        index: of the GPU, for `cuda`; None for the first.
        spinning: whether threads that wait for work keep their processors busy, which saves the time to wake them.

    Raises:
        BackendError: unknown provider, one that this installation of ONNX Runtime lacks, or no such GPU.
    """

    provider: str = "cpu"
    threads: int | None = None
    index: int | None = None
    spinning: bool = True

    def __post_init__(self) -> None:
        BACKENDS["onnxruntime"].has_own_memory(self.provider)  # refuses an unknown one
        threads = as_integer(self.threads)
        if self.threads is not None and (threads is None or threads < 1):
            raise BackendError(f"threads is {self.threads!r}; expected an integer of 1 or more")
        object.__setattr__(self, "threads", usable_threads(threads))
        if self.own_memory:
            cuda_provider.check_provider()
        elif self.index is not None:
            raise BackendError(
                f"provider {self.provider} has no GPUs to choose from; leave --device (device=) out, or use "
                "--provider cuda"
            )
        if self.index is not None:
            cuda_provider.check_card(check_index(self.index))

    @property
    def device(self) -> str:
        """Empty on the CPU, where bundles' answers were computed; else provider, GPU and ONNX Runtime's version."""
        if not self.own_memory:
            return ""
        return f"{self.provider}, {cuda_provider.describe_card(self._index)}, ONNX Runtime {ort.__version__}"

    @property
    def identity(self) -> str:
        """Provider and version, and the machine, whose processor chooses the kernels."""
        return f"{self.device or f'{self.provider}, ONNX Runtime {ort.__version__}'}, {platform.node()}"

    @property
    def _index(self) -> int:
        return self.index or 0

    @property
    def own_memory(self) -> bool:
        """Whether the provider's engines work in a card's memory."""
        return BACKENDS["onnxruntime"].has_own_memory(self.provider)

    @property
    def memory_bytes(self) -> int | None:
        """Of the card, which CUDA tells and ONNX Runtime does not; None, and told once, where it cannot be asked."""
        return card_bytes(cuda_provider.EXTRA, self._index)[1] if self.own_memory else None

    @property
    def device_key(self) -> str | None:
        """The card, by the name that plans on it have as well; None for the machine's memory."""
        return device_key(self._index) if self.own_memory else None

    def free_bytes(self) -> int | None:
        """Of the card now, as CUDA tells."""
        return card_bytes(cuda_provider.EXTRA, self._index)[0] if self.own_memory else None

    def buffer_bytes(self) -> None:
        """Nobody knows what ONNX Runtime's arenas hold."""

    def load(self, folder: Path, name: str, spec: ComponentSpec) -> OrtComponent:
        """Loads the engines of a component.

        Args:
            folder: of the bundle.
            name: of the component.
            spec: from the manifest.

        Raises:
            EngineError: ONNX Runtime cannot load a graph.
            BackendError: the GPU is that of the process that this one was forked from.
        """
        if self.own_memory:
            forked.claim_gpu()
        engines: dict[str, Engine] = {}
        for role, graph in spec.graphs.items():
            label = name if role == "model" else f"{name}.{role}"
            columns = int(graph.outputs[0].shape[-1]) if role.startswith(BLOCKS) else 0
            engines[role] = OrtEngine(label, graph, self._session(folder / graph.path, label, columns))
        component = OrtComponent(name, spec, engines)
        component.device, component.index = self.provider, self._index
        return component

    def _engine_threads(self, columns: int) -> int:
        """Threads of an engine with mapped matrices of so many columns, or none; 0 for as many as there are cores."""
        most = columns // COLUMNS_PER_THREAD
        if columns and most < FEW_THREADS:
            return FEW_THREADS
        return most if columns and (self.threads or os.cpu_count() or 1) > most else self.threads or 0

    def _session(self, path: Path, label: str, columns: int) -> ort.InferenceSession:
        """Loads a graph.

        Args:
            path: of the graph.
            label: named in errors.
            columns: of its matrices where they are used as they are mapped from the file, which suits engines that run
                a few times only; 0 to copy them in the order that multiplying them is fastest in.
        """
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._engine_threads(columns)
        if columns:
            options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_mem_pattern = False  # laid out ahead, activations take a quarter more and are no faster
        options.log_severity_level = ERRORS_ONLY
        options.inter_op_num_threads = 1
        if not self.spinning:
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.use_deterministic_compute = True
        source: str | bytes = native_name(path)
        if (linked := real_graph(path)) is not None:
            source, folder = linked
            options.add_session_config_entry(FOLDER_OPTION, str(folder))
        try:
            with forked.loading:
                session = self._open(source, options)
        except Exception as exc:  # as above
            raise EngineError(
                f"{label}: ONNX Runtime cannot load {path.name}: {str(exc).splitlines()[0][:300]}"
            ) from exc
        if self.own_memory:
            cuda_provider.check_in_use(session.get_providers(), label)
        return session

    def _open(self, source: str | bytes, options: ort.SessionOptions) -> ort.InferenceSession:
        """A session on the provider, and on no other where that one cannot be started."""
        settings = {}
        if self.own_memory:
            cuda_provider.preload()
            settings = cuda_provider.cuda_settings(self._index)
        providers = [(PROVIDERS[self.provider], settings)]
        return ort.InferenceSession(source, options, providers=providers, enable_fallback=0)
