"""TensorRT and TensorRT for RTX: one interface in two libraries, and the one place that chooses between them.

What differs is here: whether it builds for named GPUs without having one, whose kernels are then compiled by the first
calls.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from t2v_rt.engines.backend_info import backend_info, check_options
from t2v_rt.engines.bundle.profiles import PlanSpec
from t2v_rt.engines.gpu_support import TARGETS
from t2v_rt.errors import BackendError
from t2v_rt.numbers import is_older

logger = logging.getLogger(__name__)
PROMPT_LENGTH = "length"  # the size of a graph's input that is another with nearly every prompt
DEFAULT_TARGETS = ("sm80", "sm86", "sm89", "sm120")  # Turing has no float32 matrix kernels here: its graphs differ


@dataclass(frozen=True)
class Library:
    """One of the two libraries, imported.

    Args:
        backend: `tensorrt-rtx` or `tensorrt`.
        trt: the module.
    """

    backend: str
    trt: Any

    @property
    def version(self) -> str:
        return str(self.trt.__version__)

    @property
    def builds_without_gpu(self) -> bool:
        """Whether plans are built for named GPUs; the other library builds for the one that it runs on."""
        return "gpus" in backend_info(self.backend).options

    def builder_config(self, builder: Any, targets: Sequence[str]) -> Any:
        """A builder config for the targets; a timing cache is never set, for it asks for a GPU.

        Where the library has it, plans are refused that would allocate memory behind the caller's back.
        """
        config = builder.create_builder_config()
        own_memory = self.trt.BuilderFlag.__members__.get("REQUIRE_USER_ALLOCATION")
        if own_memory is not None:
            config.set_flag(own_memory)
        if self.builds_without_gpu:
            config.num_compute_capabilities = len(targets)
            for i, target in enumerate(targets):
                config.set_compute_capability(getattr(self.trt.ComputeCapability, target.upper()), i)
        return config

    def create_context(self, engine: Any, spec: PlanSpec, kernels: bytes | None, graphs: bool) -> tuple[Any, Any]:
        """An execution context whose memory the caller gives it.

        Args:
            engine: deserialised.
            spec: of its plan.
            kernels: kept from an earlier context, or None.
            graphs: whether calls are recorded as CUDA graphs; for shapes and addresses that do not change.

        Returns:
            The context, None where it cannot be made; and the cache of the kernels that are compiled for it, None where
            plans come compiled.
        """
        own = self.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if not self.builds_without_gpu:  # so its kernels are in the plan
            return engine.create_execution_context(own), None
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(own)
        strategies = self.trt.CudaGraphStrategy
        config.cuda_graph_strategy = strategies.WHOLE_GRAPH_CAPTURE if graphs else strategies.DISABLED
        if (specialized := specializes(spec)) is not None:
            strategy = self.trt.DynamicShapesKernelSpecializationStrategy
            config.dynamic_shapes_kernel_specialization_strategy = strategy.EAGER if specialized else strategy.NONE
        cache = config.create_runtime_cache()
        if kernels is not None and not cache.deserialize(kernels):
            logger.debug("kernels of another driver or library are compiled again")
        config.set_runtime_cache(cache)
        return engine.create_execution_context(config), cache


def specializes(spec: PlanSpec) -> bool | None:
    """Whether kernels are compiled for each size that an engine is called with; None where it takes fixed sizes only.

    The library's own choice is to compile them behind the first calls, in a thread of its own: then the same prompt
    gives other last bits when it is asked for again. Here they are compiled before the first call of a size, once for
    all later ones, or, where nearly each call has another size and is short, never.
    """
    ranges = [(name, size) for profile in spec.profiles for name, size in profile.sizes.items() if not size.fixed]
    return all(name != PROMPT_LENGTH for name, _ in ranges) if ranges else None


def load_library(backend: str) -> Library:
    """Imports the library of a backend.

    Raises:
        BackendError: it is not installed, cannot be loaded here, or is too old; the extra is named.
    """
    info = backend_info(backend)
    try:
        library = Library(backend, importlib.import_module(info.module))
    except (ImportError, OSError) as exc:
        reason = " ".join(str(exc).split())
        raise BackendError(
            f"backend {backend} needs the package {info.module!r} ({reason}); install t2v-rt[{info.extra}]"
        ) from exc
    if is_older(library.version, info.least_version):
        raise BackendError(
            f"{backend} {library.version} is installed, {info.least_version} or newer is needed; "
            f"pip install --upgrade t2v-rt[{info.extra}]"
        )
    return library


def check_targets(backend: str, gpus: str | Sequence[str] | None) -> tuple[str, ...]:
    """Reads the GPUs to build for.

    Args:
        backend: any.
        gpus: names, or a text of them with commas between; None for the default.

    Returns:
        The names, each once, oldest GPU first; none where the backend does not build for named GPUs.

    Raises:
        BackendError: an unknown name, no name, or a backend that does not build for named GPUs.
    """
    check_options(backend, {"gpus": gpus})
    if "gpus" not in backend_info(backend).options:
        return ()
    if gpus is None:
        return DEFAULT_TARGETS
    names = gpus.split(",") if isinstance(gpus, str) else list(gpus)
    wanted = {name.strip().lower() for name in names}
    unknown = sorted(wanted - set(TARGETS))
    if unknown or not wanted:
        known = ", ".join(f"{name} ({gpu})" for name, gpu in TARGETS.items())
        raise BackendError(f"unknown GPU {', '.join(map(repr, unknown))}; expected one or more of {known}")
    return tuple(name for name in TARGETS if name in wanted)
