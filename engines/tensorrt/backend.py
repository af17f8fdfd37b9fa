"""TensorRT and TensorRT for RTX as backends: plans of a bundle, run on a GPU.

What is sure without a GPU is checked first: the library's version, where the plans come from, the files themselves, the
shapes. Then the GPU. Plans are native code, so nothing of a file is used before its hash was compared.

One GPU stream and one arena serve all engines of a pipeline, which run one at a time.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from t2v_rt.engines.bundle.manifest import ComponentSpec, Manifest
from t2v_rt.engines.bundle.store import Bundle, check_file, check_manifest
from t2v_rt.engines.bundle.trust import check_trust
from t2v_rt.engines.contract import Component
from t2v_rt.engines.tensorrt.cuda import Buffer
from t2v_rt.engines.tensorrt.device_state import DeviceState, StateGroup, new_states
from t2v_rt.engines.tensorrt.engine import TensorRTEngine
from t2v_rt.engines.tensorrt.gpu import Gpu, KernelCache
from t2v_rt.engines.tensorrt.libraries import Library, load_library
from t2v_rt.errors import BackendError
from t2v_rt.system import forked


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


class TensorRTComponent(Component):
    """A component whose engines are plans.

    Args:
        name: of the component.
        spec: from the manifest.
        engines: role -> engine.
        card: that they are on.
    """

    def __init__(self, name: str, spec: ComponentSpec, engines: Mapping[str, TensorRTEngine], gpu: Gpu) -> None:
        super().__init__(name, spec, engines)
        self._plans, self._gpu = engines, gpu

    def new_states(
        self, count: int, *, height: int, width: int, role_prefix: str = "", resident: int | None = None
    ) -> list[DeviceState[Buffer]]:
        sizes = {"height": height, "width": width}
        users = [engine for role, engine in self._plans.items() if role.startswith(role_prefix)]
        beside = max(engine.most_workspace(sizes) for engine in users)

        def allocate(nbytes: int) -> Buffer:
            return self._gpu.memory.state_buffer(nbytes, beside)

        group = StateGroup[Buffer](
            self._gpu.cuda, self.states(role_prefix), self.written(role_prefix), sizes, count, resident, allocate
        )
        return new_states(group, count)

    def trim(self) -> None:
        with self._gpu.lock:
            self._gpu.cuda.activate()
            for engine in self._plans.values():
                engine.trim()
            self._gpu.memory.release()


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
            EngineError: the library cannot load a plan.
            BackendError: the GPU is that of the process that this one was forked from.
        """
        forked.claim_gpu()
        engines: dict[str, TensorRTEngine] = {}
        with self._gpu.lock:
            self._gpu.cuda.activate()
            self._gpu.memory.release()  # a stage's plan counts either its weights or what another stage works in
            for role, graph in spec.graphs.items():
                label = name if role == "model" else f"{name}.{role}"
                entry = check_file(self._bundle, graph.path)
                cache = KernelCache(f"{entry.sha256}\n{self._gpu.identity}")
                engine = self._deserialize(folder / graph.path, label)
                engines[role] = TensorRTEngine(label, graph, engine, self._gpu, cache)
        return TensorRTComponent(name, spec, engines, self._gpu)

    def _deserialize(self, path: Path, label: str) -> Any:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            engine = self._gpu.runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise self._gpu.failure(f"{label}: {path.name} cannot be loaded")
        return engine
