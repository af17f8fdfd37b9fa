"""A GPU for tests that is none: a library's runtime on host memory (see `host_cuda`), as strict as its documents.

Stands in for the module `tensorrt_rtx`. A plan is not run: ONNX Runtime computes the graph
that it was built from, on what lies at the addresses that the context was given. What this shows is that buffers,
states, profiles and workspaces are handled as the library asks for; nothing of a GPU's results or times.
"""

from __future__ import annotations

import hashlib
import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import Enum
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
from tests.support.host_cuda import ALIGNMENT, DIRT, SUCCESS, HostCuda

DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
HEADER = 64  # bytes of a plan that tell what it is
# members of `DataType`
TENSOR_DTYPES = {onnx.TensorProto.FLOAT: "FLOAT", onnx.TensorProto.FLOAT16: "HALF", onnx.TensorProto.INT64: "INT64"}


class HostLog:
    """`ILogger`."""

    INTERNAL_ERROR, ERROR, WARNING = range(3)


class Reason(Enum):
    """`EngineInvalidityDiagnostics`."""

    VERSION_MISMATCH = 1
    UNSUPPORTED_CC = 2
    OLD_CUDA_DRIVER = 4
    OLD_CUDA_RUNTIME = 8
    INSUFFICIENT_GPU_MEMORY = 16
    MALFORMED_ENGINE = 32
    CUDA_ERROR = 64


class HostLibrary:
    """The module of the library, with the plans that it can read.

    Args:
        cuda: what the plans are on.
        version: of the library.
        graphs: sha256 of a plan -> the graph it was built from, and what the builder told.
    """

    ILogger = HostLog
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user")
    DynamicShapesKernelSpecializationStrategy = SimpleNamespace(LAZY="lazy", EAGER="eager", NONE="none")
    EngineInvalidityDiagnostics = Reason
    CudaGraphStrategy = SimpleNamespace(DISABLED="off", WHOLE_GRAPH_CAPTURE="on")

    def __init__(self, cuda: HostCuda, version: str, graphs: Mapping[str, tuple[Path, PlanSpec]]) -> None:
        self.cuda, self.graphs = cuda, graphs
        self.__version__ = version
        self.compiled: list[str] = []  # kernels that were in no cache
        self.recorded = self.replayed = 0  # CUDA graphs
        self.strategies: dict[str, str] = {}  # graph -> of its kernels, where it takes other sizes than fixed ones
        self.refusal = 0  # why plans are refused, as bits of EngineInvalidityDiagnostics
        self.says: list[str] = []  # what is logged where memory runs out, instead of the first library's own words

    def Runtime(self, log: Any) -> HostRuntime:  # noqa: N802
        return HostRuntime(self, log)


class HostRuntime:
    """`IRuntime`."""

    def __init__(self, module: HostLibrary, log: Any) -> None:
        self.module, self.log, self.engine_host_code_allowed = module, log, True
        self.engine_header_size = HEADER

    def get_engine_validity(self, header: Any) -> tuple[str, int]:
        assert len(header) == HEADER
        return "invalid", self.module.refusal

    def deserialize_cuda_engine(self, plan: Any) -> HostEngine | None:
        assert not self.engine_host_code_allowed
        if self.module.refusal:
            self.log.log(HostLog.ERROR, "the plan is not taken")
            return None
        graph, told = self.module.graphs[hashlib.sha256(plan).hexdigest()]
        code, address = self.module.cuda.cudaMalloc(told.weights_bytes)
        if code != SUCCESS or address is None:
            for line in self.module.says or ["OutOfMemory: no room for weights"]:
                self.log.log(HostLog.ERROR, line)
            return None
        engine = HostEngine(self, graph, told)
        weakref.finalize(engine, self.module.cuda.cudaFree, address)
        return engine


class HostEngine:
    """`ICudaEngine`."""

    def __init__(self, runtime: HostRuntime, graph: Path, told: PlanSpec) -> None:
        self.runtime, self.graph, self.told = runtime, graph, told
        self.device = runtime.module.cuda.current
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
        sizes = [size for profile in self.told.profiles for size in profile.sizes.values()]
        if not all(size.fixed for size in sizes):
            strategy = config.dynamic_shapes_kernel_specialization_strategy
            assert strategy in {"eager", "none"}, "kernels would be compiled behind the calls, by a thread that logs"
            self.runtime.module.strategies[self.graph.stem] = strategy
        return HostContext(self, config)


class HostConfig:
    """`IRuntimeConfig`."""

    strategy: str | None = None
    cuda_graph_strategy: str | None = None
    dynamic_shapes_kernel_specialization_strategy = "lazy"
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

    def serialize(self) -> HostMemory:
        return HostMemory("\n".join(sorted(self.kernels)).encode())

    def deserialize(self, content: bytes) -> bool:
        self.kernels = set(content.decode().split("\n"))
        return True


class HostMemory(bytearray):
    """`IHostMemory`: a buffer, which still is a context manager, but warns of it."""

    def __enter__(self) -> HostMemory:
        warnings.warn("a context manager is no longer needed", DeprecationWarning, stacklevel=2)
        return self

    def __exit__(self, *error: object) -> None:
        self.clear()


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
        self.needed: int | None = None  # memory at the current shapes, once it was asked for
        self.graph: tuple[object, tuple[int, int] | None] | None = None  # tensors and workspace it was recorded on

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        if not 0 <= index < len(self.engine.told.profiles):
            self.engine.runtime.log.log(HostLog.INTERNAL_ERROR, f"there is no profile {index}")
            raise RuntimeError("Error in set optimization profile async.")
        if index != self.profile:
            self.shapes.clear()
            self.needed = None
        self.profile = index
        return True

    def update_device_memory_size_for_shapes(self) -> int:
        names = {item.name for item in self.session.get_inputs()}
        assert set(self.shapes) == names, f"{names - set(self.shapes)} have no shape yet: the partition is spoilt"
        told = self.engine.told.profiles[self.profile]
        sizes = self._sizes()
        share = [min(sizes[name], size.max) / size.max for name, size in told.sizes.items() if name in sizes]
        self.needed = int(told.context_bytes * float(np.prod(share)))
        return self.needed

    def _sizes(self) -> dict[str, int]:
        """Symbol -> size, of the shapes that were set."""
        declared = {item.name: item.shape for item in self.session.get_inputs()}
        pairs = [pair for name, shape in self.shapes.items() for pair in zip(declared[name], shape, strict=True)]
        return {str(known): size for known, size in pairs}

    def set_device_memory(self, address: int, nbytes: int) -> None:
        most = self.engine.get_device_memory_size_for_profile_v2(self.profile)
        assert nbytes >= (most if self.needed is None else self.needed)
        assert address % ALIGNMENT == 0
        self.memory = address, nbytes

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        declared = {item.name: item.shape for item in self.session.get_inputs()}[name]
        ranges = self.engine.told.profiles[self.profile].sizes
        for size, known in zip(shape, declared, strict=True):
            if size != known and (not isinstance(known, str) or (known in ranges and size not in ranges[known])):
                self.engine.runtime.log.log(HostLog.ERROR, f"{name}: {shape} is not in profile {self.profile}")
                return False
        if self.shapes.get(name) != shape:
            self.shapes[name] = shape
            self.needed = None
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address % ALIGNMENT == 0, name
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        self.cuda.check_stream(stream)
        assert self.engine.device == self.cuda.current
        assert self.memory is not None
        if self.cuda.fault:
            self.engine.runtime.log.log(HostLog.ERROR, "Error Code 1: Cuda Runtime (an illegal memory access)")
            return False
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
