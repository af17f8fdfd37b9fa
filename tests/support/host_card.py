"""A GPU for tests that is none: CUDA's calls and a library's runtime on host memory, as strict as their documents.

Stands in for the modules `cuda.bindings.runtime` and `tensorrt_rtx`. A plan is not run: ONNX Runtime computes the graph
that it was built from, on what lies at the addresses that the context was given. What this shows is that buffers,
states, profiles and workspaces are handled as the library asks for; nothing of a GPU's results or times.
"""

from __future__ import annotations

import ctypes
import hashlib
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from t2v_rt.build import prepare
from t2v_rt.build.options import BuildOptions
from t2v_rt.engines.bundle.profiles import PlanSpec
from t2v_rt.engines.bundle.store import Bundle
from t2v_rt.engines.onnxruntime.imported import ort

SUCCESS, OUT_OF_MEMORY, INVALID = 0, 2, 1
DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
# members of `DataType`
TENSOR_DTYPES = {onnx.TensorProto.FLOAT: "FLOAT", onnx.TensorProto.FLOAT16: "HALF", onnx.TensorProto.INT64: "INT64"}
STREAM = 7
DIRT = 255  # of fresh memory, a NaN in every float


class HostCuda:
    """The calls of `cuda.bindings.runtime` that are used; every address must lie in memory that is allocated.

    Args:
        capacity: of the device, in bytes.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.peak = capacity, 0
        kinds = {"cudaMemcpyHostToDevice": "hd", "cudaMemcpyDeviceToHost": "dh", "cudaMemcpyDeviceToDevice": "dd"}
        self.cudaMemcpyKind = SimpleNamespace(**kinds)
        self._memory: dict[str, dict[int, ctypes.Array[ctypes.c_ubyte]]] = {"d": {}, "h": {}}

    def used(self, where: str = "d") -> int:
        """Bytes that are allocated on the device (`d`) or pinned on the host (`h`)."""
        return sum(map(len, self._memory[where].values()))

    def view(self, where: str, address: int, nbytes: int) -> NDArray[np.uint8]:
        """The bytes at an address."""
        for start, block in self._memory[where].items():
            if start <= address and address + nbytes <= start + len(block):
                return np.frombuffer(memoryview(block), np.uint8, nbytes, address - start)
        raise AssertionError(f"{nbytes} bytes at {address:#x} are not allocated")

    def _allocate(self, where: str, nbytes: int) -> tuple[int, int | None]:
        if where == "d" and self.used() + nbytes > self.capacity:
            return OUT_OF_MEMORY, None
        block = (ctypes.c_ubyte * nbytes)()
        ctypes.memset(block, DIRT, nbytes)
        self._memory[where][ctypes.addressof(block)] = block
        self.peak = max(self.peak, self.used())
        return SUCCESS, ctypes.addressof(block)

    def cudaMalloc(self, nbytes: int) -> tuple[int, int | None]:  # noqa: N802
        return self._allocate("d", nbytes)

    def cudaHostAlloc(self, nbytes: int, flags: int) -> tuple[int, int | None]:  # noqa: N802
        return self._allocate("h", nbytes)

    def cudaFree(self, address: int) -> tuple[int]:  # noqa: N802
        del self._memory["d"][address]
        return (SUCCESS,)

    def cudaFreeHost(self, address: int) -> tuple[int]:  # noqa: N802
        del self._memory["h"][address]
        return (SUCCESS,)

    def cudaMemcpyAsync(self, target: int, source: int, nbytes: int, kind: str, stream: int) -> tuple[int]:  # noqa: N802
        assert stream == STREAM
        self.view(kind[1], target, nbytes)[:] = self.view(kind[0], source, nbytes)
        return (SUCCESS,)

    def cudaMemsetAsync(self, address: int, value: int, nbytes: int, stream: int) -> tuple[int]:  # noqa: N802
        assert stream == STREAM
        self.view("d", address, nbytes)[:] = value
        return (SUCCESS,)

    def cudaGetDeviceCount(self) -> tuple[int, int]:  # noqa: N802
        return SUCCESS, 1

    def cudaSetDevice(self, index: int) -> tuple[int]:  # noqa: N802
        return (SUCCESS if index == 0 else INVALID,)

    def cudaGetDeviceProperties(self, index: int) -> tuple[int, Any]:  # noqa: N802
        return SUCCESS, SimpleNamespace(name=b"host\0", major=8, minor=6, totalGlobalMem=self.capacity)

    def cudaDriverGetVersion(self) -> tuple[int, int]:  # noqa: N802
        return SUCCESS, 13000

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[int, int]:  # noqa: N802
        return SUCCESS, STREAM

    def cudaStreamSynchronize(self, stream: int) -> tuple[int]:  # noqa: N802
        return (SUCCESS if stream == STREAM else INVALID,)

    def cudaStreamDestroy(self, stream: int) -> tuple[int]:  # noqa: N802
        return (SUCCESS,)

    def cudaGetErrorString(self, code: int) -> tuple[int, bytes]:  # noqa: N802
        return SUCCESS, b"an error"


class HostLog:
    """`ILogger`."""

    INTERNAL_ERROR, ERROR, WARNING = range(3)


class HostLibrary:
    """The module of the library, with the plans that it can read.

    Args:
        cuda: what the plans are on.
        version: of the library.
        graphs: sha256 of a plan -> the graph it was built from, and what the builder told.
    """

    ILogger = HostLog
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user")
    CudaGraphStrategy = SimpleNamespace(DISABLED="off", WHOLE_GRAPH_CAPTURE="on")

    def __init__(self, cuda: HostCuda, version: str, graphs: Mapping[str, tuple[Path, PlanSpec]]) -> None:
        self.cuda, self.graphs = cuda, graphs
        self.__version__ = version
        self.compiled: list[str] = []  # kernels that were in no cache
        self.recorded = self.replayed = 0  # CUDA graphs

    def Runtime(self, log: Any) -> HostRuntime:  # noqa: N802
        return HostRuntime(self, log)


class HostRuntime:
    """`IRuntime`."""

    def __init__(self, module: HostLibrary, log: Any) -> None:
        self.module, self.log, self.engine_host_code_allowed = module, log, True

    def deserialize_cuda_engine(self, plan: Any) -> HostEngine | None:
        assert not self.engine_host_code_allowed
        graph, told = self.module.graphs[hashlib.sha256(plan).hexdigest()]
        code, address = self.module.cuda.cudaMalloc(told.weights_bytes)
        if code != SUCCESS or address is None:
            self.log.log(HostLog.ERROR, "OutOfMemory: no room for weights")
            return None
        engine = HostEngine(self, graph, told)
        weakref.finalize(engine, self.module.cuda.cudaFree, address)
        return engine


class HostEngine:
    """`ICudaEngine`."""

    def __init__(self, runtime: HostRuntime, graph: Path, told: PlanSpec) -> None:
        self.runtime, self.graph, self.told = runtime, graph, told
        declared = onnx.load(str(graph), load_external_data=False).graph
        self.tensors = {item.name: item.type.tensor_type for item in (*declared.input, *declared.output)}

    @property
    def num_io_tensors(self) -> int:
        return len(self.tensors)

    def get_tensor_name(self, index: int) -> str:
        return str(list(self.tensors)[index])

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=TENSOR_DTYPES[self.tensors[name].elem_type])

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        """A size that is not fixed is -1, as in `Dims`."""
        return tuple(dim.dim_value if dim.HasField("dim_value") else -1 for dim in self.tensors[name].shape.dim)

    def get_device_memory_size_for_profile_v2(self, index: int) -> int:
        return self.told.profiles[index].context_bytes

    def create_runtime_config(self) -> HostConfig:
        return HostConfig()

    def create_execution_context(self, config: HostConfig) -> HostContext:
        assert config.strategy == "user"
        return HostContext(self, config)


class HostConfig:
    """`IRuntimeConfig`."""

    strategy: str | None = None
    cuda_graph_strategy: str | None = None
    cache: HostCache | None = None

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> HostCache:
        return HostCache()

    def set_runtime_cache(self, cache: HostCache) -> bool:
        self.cache = cache
        return True


class HostCache:
    """`IRuntimeCache`: the names of what was compiled."""

    def __init__(self) -> None:
        self.kernels: set[str] = set()

    def serialize(self) -> memoryview:
        return memoryview("\n".join(sorted(self.kernels)).encode())

    def deserialize(self, content: bytes) -> bool:
        self.kernels = set(content.decode().split("\n"))
        return True


class HostContext:
    """`IExecutionContext`; refuses as the library does, by False, by an exception and by the log."""

    def __init__(self, engine: HostEngine, config: HostConfig) -> None:
        assert config.cache is not None
        self.engine, self.config, self.kernels = engine, config, config.cache.kernels
        self.cuda, self.module = engine.runtime.module.cuda, engine.runtime.module
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.use_deterministic_compute = True
        self.session = ort.InferenceSession(str(engine.graph), options, providers=["CPUExecutionProvider"])
        self.profile = 0
        self.memory: tuple[int, int] | None = None
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.graph: tuple[object, tuple[int, int] | None] | None = None  # tensors and workspace it was recorded on

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        if not 0 <= index < len(self.engine.told.profiles):
            self.engine.runtime.log.log(HostLog.INTERNAL_ERROR, f"there is no profile {index}")
            raise RuntimeError("Error in set optimization profile async.")
        if index != self.profile:
            self.shapes.clear()
        self.profile = index
        return True

    def set_device_memory(self, address: int, nbytes: int) -> None:
        assert nbytes >= self.engine.get_device_memory_size_for_profile_v2(self.profile)
        self.memory = address, nbytes

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        declared = {item.name: item.shape for item in self.session.get_inputs()}[name]
        ranges = self.engine.told.profiles[self.profile].sizes
        for size, known in zip(shape, declared, strict=True):
            if size != known and (not isinstance(known, str) or (known in ranges and size not in ranges[known])):
                self.engine.runtime.log.log(HostLog.ERROR, f"{name}: {shape} is not in profile {self.profile}")
                return False
        self.shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == STREAM
        assert self.memory is not None
        self.cuda.view("d", *self.memory)[:] = DIRT  # what it works in holds nothing from call to call
        feeds, read = {}, []
        for item in self.session.get_inputs():
            dtype = np.dtype(DTYPES[item.type])
            nbytes = int(np.prod(self.shapes[item.name])) * dtype.itemsize
            memory = self.cuda.view("d", self.addresses[item.name], nbytes)
            read.append(memory)
            feeds[item.name] = memory.view(dtype).reshape(self.shapes[item.name])
        self._compile(feeds)
        self._record()
        names = [item.name for item in self.session.get_outputs()]
        for name, value in zip(names, self.session.run(names, feeds), strict=True):
            target = self.cuda.view("d", self.addresses[name], value.nbytes)
            assert not any(np.shares_memory(target, memory) for memory in read), f"{name} overwrites what is read"
            target[:] = np.ascontiguousarray(value).view(np.uint8).reshape(-1)
        return True

    def _compile(self, feeds: Mapping[str, NDArray[Any]]) -> None:
        kernel = f"{self.engine.graph.name} {sorted((name, array.shape) for name, array in feeds.items())}"
        if kernel not in self.kernels:
            self.kernels.add(kernel)
            self.module.compiled.append(kernel)

    def _record(self) -> None:
        """A graph is recorded anew where tensors move or change shape; that the workspace moves it does not notice."""
        if self.config.cuda_graph_strategy != "on":
            return
        tensors = (dict(self.addresses), dict(self.shapes))
        if self.graph is None or self.graph[0] != tensors:
            self.graph = tensors, self.memory
            self.module.recorded += 1
        else:
            assert self.graph[1] == self.memory, "a graph is replayed on memory that it was not recorded on"
            self.module.replayed += 1


def plans_by_hash(bundle: Bundle, graphs: Mapping[tuple[str, str], Path]) -> dict[str, tuple[Path, PlanSpec]]:
    """What `HostLibrary` takes, from the graph of each component and role."""
    result = {}
    for name, component in bundle.manifest.components.items():
        for role, graph in component.graphs.items():
            assert graph.plan is not None
            result[bundle.manifest.files[graph.path].sha256] = graphs[name, role], graph.plan
    return result


def export_graphs(checkpoint: Path, sizes: Sequence[int | str | None], folder: Path) -> dict[tuple[str, str], Path]:
    """The graphs that plans are built from, but for bfloat16, which ONNX Runtime's CPU does not multiply.

    Args:
        checkpoint: that is exported.
        sizes: height, width and number of frames of the plans.
        folder: that the graphs are written to.
    """
    height, width, frames = sizes
    size = {"height": height, "width": width, "num_frames": frames}
    job, manifest = prepare(BuildOptions(checkpoint, backend="tensorrt-rtx", gpus="sm86", **size))  # type: ignore[arg-type]
    return {
        (unit.component, role): folder / graph.path
        for unit in job.units(manifest)
        for role, graph in job._export(replace(unit, precision="fp16"), folder).graphs.items()
    }
