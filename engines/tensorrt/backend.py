"""TensorRT and TensorRT for RTX as backends: plans of a bundle, run on a GPU.

What is sure without a GPU is checked first: the library's version, where the plans come from, the files themselves, the
shapes. Then the GPU. Plans are native code, so nothing of a file is used before its hash was compared.

One GPU stream and one workspace serve all engines of a pipeline, which run one at a time.
"""

from __future__ import annotations

import logging
import mmap
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t2v_rt.engines.bundle.manifest import ComponentSpec, GraphSpec, Manifest
from t2v_rt.engines.bundle.profiles import nearest_profile
from t2v_rt.engines.bundle.store import Bundle, check_file, check_manifest
from t2v_rt.engines.bundle.trust import check_trust
from t2v_rt.engines.contract import Component, Engine, EngineState, Feeds
from t2v_rt.engines.tensorrt.boundary import check_boundary
from t2v_rt.engines.tensorrt.cuda import DeviceBuffer
from t2v_rt.engines.tensorrt.device_state import DeviceState, StateGroup, new_states
from t2v_rt.engines.tensorrt.gpu import Gpu, KernelCache
from t2v_rt.engines.tensorrt.libraries import Library, load_library
from t2v_rt.errors import BackendError, EngineError
from t2v_rt.system import forked

logger = logging.getLogger(__name__)


def check_version(manifest: Manifest, library: Library) -> None:
    """Refuses plans of another version than the library's, which could not read them.

    Raises:
        BackendError: says how to build them again.
    """
    built = manifest.builder.get(library.backend)
    if built != library.version:
        raise BackendError(
            f"the plans were built by {library.backend} {built}, {library.version} is installed; build them again with "
            f"t2v-rt build-engines … --backend {library.backend}, or install {library.backend}=={built}"
        )


def check_target(manifest: Manifest, target: str, gpu: str) -> None:
    """Refuses a GPU that the plans were not built for.

    Args:
        manifest: of the bundle.
        target: of the GPU, such as `sm89`.
        gpu: its name.

    Raises:
        BackendError: says how to build them for it.
    """
    if manifest.targets and target not in manifest.targets:
        raise BackendError(
            f"the plans were built for {', '.join(manifest.targets)}, {gpu} is {target}; build them for it with "
            f"t2v-rt build-engines … --gpu {target}"
        )


def choose_profile(spec: GraphSpec, sizes: Mapping[str, int], name: str) -> int:
    """The shape profile of a plan that holds a call's sizes.

    Args:
        spec: of the plan.
        sizes: symbol -> size.
        name: of the engine.

    Raises:
        EngineError: none does; names the nearest sizes that one does hold.
    """
    assert spec.plan is not None
    ranges = [profile.sizes for profile in spec.plan.profiles]
    wanted = {symbol: sizes[symbol] for symbol in ranges[0]}
    index, nearest = nearest_profile(ranges, wanted)
    if nearest != wanted:
        found, best = (", ".join(f"{key} {size}" for key, size in item.items()) for item in (wanted, nearest))
        raise EngineError(f"{name}: called with {found}; the nearest that the plan was built for is {best}")
    return index


class TensorRTEngine(Engine):
    """One plan, deserialised; its context is made at the first call.

    Args:
        name: component and role.
        spec: of the plan.
        engine: the library's.
        card: that it is on.
        cache: of its kernels.
    """

    def __init__(self, name: str, spec: GraphSpec, engine: Any, gpu: Gpu, cache: KernelCache) -> None:
        super().__init__(name, spec)
        assert spec.plan is not None
        self._engine, self._gpu, self._cache = engine, gpu, cache
        fixed = all(size.fixed for item in spec.plan.profiles for size in item.sizes.values())
        self._records_graphs = fixed and not spec.states  # which change their buffers from call to call
        self._context: Any = None
        self._kernels: Any = None
        self._kept: bytes | None = None
        self._calls = 0
        self._profile = -1
        self._workspace: tuple[int, int] | None = None  # address and bytes; the memory itself is the card's
        self._device: dict[str, DeviceBuffer] = {}
        self._host: dict[str, NDArray[Any]] = {}
        self._sticky: dict[str, list[tuple[weakref.ref[NDArray[Any]], DeviceBuffer]]] = {}

        forked.watch(self)

    def after_fork(self) -> None:
        """Leaves everything on the GPU to the parent; see `t2v_rt.system.forked`."""
        forked.abandon(self._engine, self._context, self._kernels)
        self._engine = self._context = self._kernels = None

    def _run(self, feeds: Feeds, state: EngineState | None) -> dict[str, NDArray[Any]]:
        sizes: dict[str, int] = {}
        for spec in self.inputs:
            spec.check(feeds[spec.name], sizes, self.name)
        profile = choose_profile(self.spec, sizes, self.name)
        with self._gpu.lock:
            if self._engine is None:
                raise EngineError(f"{self.name}: the engine is closed; open the component again")
            self._gpu.cuda.activate()
            try:
                self._prepare(profile)
                self._execute(feeds, state, sizes)
            except EngineError:
                raise
            except RuntimeError as exc:  # the bindings raise it for some calls, and return False for others
                raise self._gpu.failure(self.name) from exc
            if isinstance(state, DeviceState):
                state.rotate(self.states)
            self._calls += 1
            if self._calls & (self._calls - 1) == 0:  # most kernels are compiled at the first calls, some behind them
                self._keep_kernels()
            return {spec.name: self._host[spec.name].copy() for spec in self.outputs}

    def _execute(self, feeds: Feeds, state: EngineState | None, sizes: dict[str, int]) -> None:
        """Feeds in, outputs to pinned memory; waits for all of it."""
        for spec in self.inputs:
            self._bind_input(spec.name, feeds[spec.name])
        if isinstance(state, DeviceState):
            self._bind_state(state)
        for spec in self.outputs:
            self._bind_output(spec.name, spec.resolve(sizes), spec.numpy_dtype)
        if not self._context.execute_async_v3(self._gpu.cuda.stream):
            raise self._gpu.failure(self.name)
        for spec in self.outputs:
            self._gpu.cuda.download(self._device[spec.name], self._host[spec.name])
        self._gpu.cuda.synchronize()

    # -- before the call ---------------------------------------------------------------------------------------------

    def _prepare(self, profile: int) -> None:
        """Makes the context at the first call, switches to a profile, and gives it the workspace."""
        workspace = self._gpu.workspace(int(self._engine.get_device_memory_size_for_profile_v2(profile)))
        if self._records_graphs and self._workspace != (workspace.address, workspace.nbytes):
            self._drop_context()  # with graphs that were recorded on other memory
        if self._context is None:
            self._kept = self._kept or self._cache.read()
            self._context, self._kernels = self._gpu.create_context(self._engine, self._kept, self._records_graphs)
            if self._context is None:
                raise self._gpu.failure(self.name)
        if profile != self._profile:
            if not self._context.set_optimization_profile_async(profile, self._gpu.cuda.stream):
                raise self._gpu.failure(self.name)
            self._gpu.cuda.synchronize()
            self._profile = profile
        self._workspace = workspace.address, workspace.nbytes
        self._context.set_device_memory(*self._workspace)

    def _drop_context(self) -> None:
        self._keep_kernels()
        self._context = self._kernels = self._workspace = None
        self._profile = -1

    def _bind(self, name: str, address: int, shape: Sequence[int] | None = None) -> None:
        context = self._context
        if shape is not None and not context.set_input_shape(name, tuple(shape)):
            raise self._gpu.failure(f"{self.name}: shape {list(shape)} of {name}")
        if not context.set_tensor_address(name, address):
            raise self._gpu.failure(f"{self.name}: {name}")

    def _bind_input(self, name: str, array: NDArray[Any]) -> None:
        cuda, buffer = self._gpu.cuda, self._buffer(name, array.nbytes)
        if array.flags.writeable:
            cuda.upload(self._staged(name, array), buffer)
        else:
            cuda.copy(self._on_device(name, array), buffer, array.nbytes)
        self._bind(name, buffer.address, array.shape)

    def _on_device(self, name: str, array: NDArray[Any]) -> DeviceBuffer:
        """A read-only array's copy on the device, made once as long as the array lives."""
        known = [(ref, buffer) for ref, buffer in self._sticky.get(name, []) if ref() is not None]
        for ref, buffer in known:
            if ref() is array:
                return buffer
        buffer = self._gpu.cuda.allocate(array.nbytes)
        self._gpu.cuda.upload(self._staged(name, array), buffer)
        self._sticky[name] = [*known, (weakref.ref(array), buffer)]
        return buffer

    def _bind_state(self, state: DeviceState[DeviceBuffer]) -> None:
        current = state.group.activate(state)
        for item in self.states:
            if item.input is not None:
                self._bind(item.input, current[item.tensor.name].address, item.tensor.resolve(state.sizes))
            if item.output is not None:
                self._bind(item.output, state.group.spare[item.tensor.name].address)

    def _bind_output(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        array = self._host.get(name)
        if array is None or array.shape != shape:
            self._host[name] = array = self._gpu.cuda.host_array(shape, dtype)
        self._bind(name, self._buffer(name, array.nbytes).address)

    def _buffer(self, name: str, nbytes: int) -> DeviceBuffer:
        """The device memory of an input or output; its address stays as long as it is large enough."""
        if name not in self._device or self._device[name].nbytes < nbytes:
            self._device.pop(name, None)
            self._device[name] = self._gpu.cuda.allocate(nbytes)
        return self._device[name]

    def _staged(self, name: str, array: NDArray[Any]) -> NDArray[Any]:
        """The array in pinned memory; what was staged there before is on the device, since each call waits."""
        pinned = self._host.get(name)
        if pinned is None or pinned.shape != array.shape:
            self._host[name] = pinned = self._gpu.cuda.host_array(array.shape, array.dtype)
        np.copyto(pinned, array)
        return pinned

    # -- after it ----------------------------------------------------------------------------------------------------

    def _keep_kernels(self) -> None:
        """Keeps what the library has compiled since the last time."""
        if self._kernels is None:
            return
        try:
            with self._kernels.serialize() as memory:
                content = bytes(memory)
        except RuntimeError as exc:  # as after a fault of the GPU, when all that is left is to let go
            logger.info("compiled kernels are not kept: %s", exc)
            return
        if content != self._kept:
            self._cache.write(content)
            self._kept = content

    def close(self) -> None:
        with self._gpu.lock:
            if self._engine is None:
                return
            self._gpu.cuda.activate()
            self._drop_context()
            self._gpu.release_workspace()
            self._engine = None
            self._device, self._host, self._sticky = {}, {}, {}


class TensorRTComponent(Component):
    """A component whose engines are plans.

    Args:
        name: of the component.
        spec: from the manifest.
        engines: role -> engine.
        card: that they are on.
    """

    def __init__(self, name: str, spec: ComponentSpec, engines: Mapping[str, Engine], gpu: Gpu) -> None:
        super().__init__(name, spec, engines)
        self._gpu = gpu

    def new_states(
        self, count: int, *, height: int, width: int, role_prefix: str = "", resident: int | None = None
    ) -> list[DeviceState[DeviceBuffer]]:
        sizes = {"height": height, "width": width}
        with self._gpu.lock:
            self._gpu.cuda.activate()
            group = StateGroup(
                self._gpu.cuda, self.states(role_prefix), self.written(role_prefix), sizes, count, resident
            )
            return new_states(group, count)


class TensorRTBackend:
    """Loads plans of one bundle.

    Args:
        bundle: the opened bundle.
        trust: whether a bundle from elsewhere may be used: its plans are native code.

    Raises:
        BackendError: the library is missing or of another version, the bundle is from elsewhere, or there is no GPU
            that its plans can run on.
    """

    def __init__(self, bundle: Bundle, trust: bool = False) -> None:
        self._bundle, self._trust = bundle, trust
        library = load_library(bundle.manifest.backend)
        check_version(bundle.manifest, library)
        check_trust(bundle.folder, trust)
        check_manifest(bundle)  # the one that is trusted is the one that was opened
        self._gpu = Gpu(library)
        info = self._gpu.cuda.info
        check_target(bundle.manifest, info.target, info.name)

    def __reduce__(self) -> tuple[type[TensorRTBackend], tuple[Bundle, bool]]:
        return type(self), (self._bundle, self._trust)

    @property
    def device(self) -> str:
        return self._gpu.identity

    @property
    def identity(self) -> str:
        return self._gpu.identity

    @property
    def own_memory(self) -> bool:
        return True

    @property
    def memory_bytes(self) -> int | None:
        return self._gpu.cuda.info.memory_bytes

    def load(self, folder: Path, name: str, spec: ComponentSpec) -> TensorRTComponent:
        """Loads the engines of a component.

        Args:
            folder: of the bundle.
            name: of the component.
            spec: from the manifest, of all or a part of it.

        Raises:
            BundleError: a plan is not the file that was built.
            EngineError: the library cannot load a plan, or it takes or gives other tensors than the manifest says.
            BackendError: the GPU is that of the process that this one was forked from.
        """
        forked.claim_gpu()
        engines: dict[str, Engine] = {}
        with self._gpu.lock:
            self._gpu.cuda.activate()
            for role, graph in spec.graphs.items():
                label = name if role == "model" else f"{name}.{role}"
                entry = check_file(self._bundle, graph.path)
                cache = KernelCache(f"{entry.sha256}\n{self._gpu.identity}")
                engine = self._deserialize(folder / graph.path, label)
                check_boundary(label, graph, engine)
                engines[role] = TensorRTEngine(label, graph, engine, self._gpu, cache)
        return TensorRTComponent(name, spec, engines, self._gpu)

    def _deserialize(self, path: Path, label: str) -> Any:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            engine = self._gpu.runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise self._gpu.failure(f"{label}: {path.name} cannot be loaded")
        return engine
