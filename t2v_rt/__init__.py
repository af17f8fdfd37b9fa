"""Inference runtime for small text-to-video diffusion models on 8 GB consumer cards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from t2v_rt.errors import (
    BackendError,
    BundleError,
    CancelledError,
    CheckpointError,
    EngineError,
    InputError,
    RequestError,
    T2VError,
)
from t2v_rt.runtime.output import TextToVideoOutput
from t2v_rt.runtime.pipeline import TextToVideoPipeline

if TYPE_CHECKING:
    from t2v_rt.build import build_engines

__all__ = [
    "BackendError",
    "BundleError",
    "CancelledError",
    "CheckpointError",
    "EngineError",
    "InputError",
    "RequestError",
    "T2VError",
    "TextToVideoOutput",
    "TextToVideoPipeline",
    "__version__",
    "build_engines",
]


def __getattr__(name: str) -> Any:
    """What takes long to import and is seldom asked for."""
    if name == "build_engines":
        from t2v_rt.build import build_engines

        return build_engines
    if name == "__version__":
        from importlib import metadata

        return metadata.version("t2v-rt")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
