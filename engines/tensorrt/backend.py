"""TensorRT and TensorRT for RTX as backends: plans of a bundle, run on a GPU.

What is sure without a GPU is checked first: the library's version, where the plans come from, the files themselves, the
shapes. Then the GPU. Plans are native code, so nothing of a file is used before its hash was compared.

One GPU stream and one arena serve all engines of a process on a GPU, which run one at a time.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from t2v_rt.engines.backend_info import backend_info
from t2v_rt.engines.bundle.manifest import ComponentSpec, Manifest
from t2v_rt.engines.bundle.store import Bundle, check_file, check_manifest
from t2v_rt.engines.bundle.trust import check_trust
from t2v_rt.engines.contract import Component
from t2v_rt.engines.devices import version_text
from t2v_rt.engines.gpu_support import FIRST_DRIVERS, INSTEAD, TARGETS, explain_old_driver
from t2v_rt.engines.tensorrt.boundary import check_boundary
from t2v_rt.engines.tensorrt.cuda import Buffer
from t2v_rt.engines.tensorrt.device_state import DeviceState, StateGroup, new_states
from t2v_rt.engines.tensorrt.engine import TensorRTEngine
from t2v_rt.engines.tensorrt.gpu import Gpu, KernelCache, open_gpu
from t2v_rt.engines.tensorrt.libraries import Library, load_library
from t2v_rt.errors import BackendError, EngineError, OutOfMemoryError
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
        BackendError: says how to build them for it, or what to use instead where that cannot be.
    """
    if not manifest.targets or target in manifest.targets:
        return
    if target not in TARGETS:
        raise BackendError(f"{gpu} is {target}, for which {manifest.backend} has no kernels; {INSTEAD}")
    raise BackendError(
        f"the plans were built for {', '.join(manifest.targets)}, {gpu} is {target}; build them for it with "
        f"t2v-rt build-engines … --gpu {target}"
    )


def explain_refusal(library: Library, diagnostics: int, driver: int) -> str:
    """Why a library does not take a plan here and what to do, by the first of its reasons, after a semicolon.

    Args:
        library: that was asked.
        diagnostics: its reasons, each a bit; 0 where it has none.
        driver: newest CUDA version that the driver supports, as 13050 for 13.5.
    """
    backend, reasons = library.backend, library.trt.EngineInvalidityDiagnostics
    extra, again = backend_info(backend).extra, f"build it again with t2v-rt build-engines … --backend {backend}"
    has = f"CUDA {version_text(driver)}"
    texts = {
        reasons.MALFORMED_ENGINE: f"it is no plan of {backend}; {again}",
        reasons.VERSION_MISMATCH: f"it was built by another version of {backend}; {again}",
        reasons.CUDA_ERROR: "the NVIDIA driver does not answer; t2v-rt doctor tells more",
        reasons.OLD_CUDA_DRIVER: explain_old_driver(has, f"{backend} needs a newer one", max(FIRST_DRIVERS), extra),
        reasons.OLD_CUDA_RUNTIME: f"it needs a newer CUDA runtime; pip install --upgrade t2v-rt[{extra}]",
        reasons.UNSUPPORTED_CC: f"it has no kernels for this GPU; {again} --gpu …, or {INSTEAD}",
        reasons.INSUFFICIENT_GPU_MEMORY: "the GPU has too little memory for it; t2v-rt plan tells what would fit",
    }
    return next((f"; {text}" for reason, text in texts.items() if diagnostics & int(reason.value)), "")


class TensorRTComponent(Component):
    """A component whose engines are plans.

    Args:
        name: of the component.
        spec: from the manifest.
        engines: role -> engine.
        gpu: that they are on.
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
        index: of the GPU.

    Raises:
        BackendError: the library is missing or of another version, the bundle is from elsewhere, or there is no GPU
            that its plans can run on.
        EngineError: the GPU cannot be used, as after a fault of it.
    """

    def __init__(self, bundle: Bundle, trust: bool = False, index: int = 0) -> None:
        self._bundle, self._trust, self._index = bundle, trust, index
        library = load_library(bundle.manifest.backend)
        check_version(bundle.manifest, library)
        check_trust(bundle.folder, trust)
        check_manifest(bundle)  # the one that is trusted is the one that was opened
        self._library, self._gpu = library, open_gpu(library, index)
        info = self._gpu.cuda.info
        check_target(bundle.manifest, info.target, info.name)

    def __reduce__(self) -> tuple[type[TensorRTBackend], tuple[Bundle, bool, int]]:
        return type(self), (self._bundle, self._trust, self._index)

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

    @property
    def device_key(self) -> str | None:
        return self._gpu.cuda.key

    def free_bytes(self) -> int | None:
        return self._gpu.cuda.free_bytes()

    def buffer_bytes(self) -> int | None:
        return self._gpu.cuda.buffer_bytes

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
        engines: dict[str, TensorRTEngine] = {}
        with self._gpu.lock:
            self._gpu.cuda.activate()
            self._gpu.memory.release()  # a stage's plan counts either its weights or what another stage works in
            for role, graph in spec.graphs.items():
                label = name if role == "model" else f"{name}.{role}"
                entry = check_file(self._bundle, graph.path)
                cache = KernelCache(f"{entry.sha256}\n{self._gpu.identity}")
                engine = self._deserialize(folder / graph.path, label)
                check_boundary(label, graph, engine)
                engines[role] = TensorRTEngine(label, graph, engine, self._gpu, cache)
        return TensorRTComponent(name, spec, engines, self._gpu)

    def _deserialize(self, path: Path, label: str) -> Any:
        self._gpu.begin()
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            engine = self._gpu.runtime.deserialize_cuda_engine(content)
            if engine is None:
                failure = self._gpu.failure(f"{label}: {path.name} cannot be loaded")
                raise type(failure)(f"{failure}{self._advice(failure, content)}")
        return engine

    def _advice(self, failure: EngineError, plan: mmap.mmap) -> str:
        """What to do where a plan cannot be loaded, after a semicolon."""
        if not isinstance(failure, OutOfMemoryError):
            return self._why_refused(plan)
        free, total = (f"{nbytes / 1e9:.1f}" for nbytes in (self.free_bytes() or 0, self.memory_bytes or 0))
        return f"; {free} of {total} GB are free, close other programs that use the GPU, which nvidia-smi lists"

    def _why_refused(self, plan: mmap.mmap) -> str:
        """What the library says of a plan's header, and what to do.

        It is asked after it failed only. Before, it would refuse what works: it calls every plan invalid on a GPU that
        it is not meant for but runs on.
        """
        if not self._library.builds_without_gpu:  # the other library cannot tell
            return ""
        _, diagnostics = self._gpu.runtime.get_engine_validity(plan[: self._gpu.runtime.engine_header_size])
        return explain_refusal(self._library, int(diagnostics), self._gpu.cuda.info.driver)
