"""How diffusers' networks of a family are loaded and called, for peers that run them: one module for each family."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from t2v_rt.engines.bundle.model import ModelSpec
from t2v_rt.errors import RequestError

# by the manifest's word for the family; each module has it as `FAMILY`
MODULES: Mapping[str, str] = {"wan": "t2v_rt.benchmarks.families.wan"}


class ReferenceFamily(Protocol):
    """A family as diffusers has it; tensors are torch's."""

    def compile(self, pipe: Any) -> None:
        """Compiles those networks of a pipeline that take most of a call."""
        ...

    def denoiser(self, checkpoint: Path, dtype: Any) -> Any:
        """The denoiser alone."""
        ...

    def predict(self, network: Any, latents: Any, timestep: float, embeds: Any) -> Any:
        """One prediction (B, C, F, H, W)."""
        ...

    def text_pipeline(self, checkpoint: Path, dtype: Any) -> Any:
        """What encodes prompts, and nothing else."""
        ...

    def encode(self, pipe: Any, prompt: str, length: int) -> Any:
        """Embeddings (1, length, D) of a prompt."""
        ...

    def vae(self, checkpoint: Path, dtype: Any) -> Any:
        """The VAE."""
        ...

    def decode_first(self, vae: Any, latents: Any) -> Any:
        """Begins a video: its first chunk of frames (1, 3, f, H, W) in [-1, 1]."""
        ...

    def decode_next(self, vae: Any, latents: Any) -> Any:
        """The chunk after the one that was decoded last."""
        ...


def reference_family(model: ModelSpec) -> ReferenceFamily:
    """The family of a bundle's model; raises RequestError for one that no peer knows."""
    if model.family not in MODULES:
        raise RequestError(f"peers know no family {model.family!r}; they know {', '.join(MODULES)}")
    found: ReferenceFamily = importlib.import_module(MODULES[model.family]).FAMILY
    return found
