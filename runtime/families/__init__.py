"""The border of model families: what differs in algorithm, behind a few small objects, and who has them."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from t2v_rt.engines.bundle.manifest import ComponentSpec, Manifest
from t2v_rt.engines.bundle.model import ModelSpec, TextSpec
from t2v_rt.engines.contract import Component
from t2v_rt.engines.specs import TensorSpec
from t2v_rt.errors import BundleError
from t2v_rt.runtime.decode.tiles import Grid
from t2v_rt.runtime.memory.estimates import StageMemory, Way

Array = NDArray[np.float32]
MODULES: Mapping[str, str] = {"wan": "t2v_rt.runtime.families.wan"}  # each has the family as `FAMILY`


class TextRule(Protocol):
    """How a family's text becomes what its networks take."""

    def clean(self, text: str) -> str:
        """A prompt as the reference cleans it before it is tokenized."""
        ...

    def feeds(self, spec: TextSpec, length: int) -> Mapping[str, NDArray[Any]]:
        """What an engine of the text encoder is fed beside the hidden states of so many tokens."""
        ...

    def padded(self, rows: Array, length: int) -> Array:
        """Embeddings (L, D) of a prompt's own tokens -> (length, D), as the denoiser's text is laid out."""
        ...

    def unpadded(self, rows: Array) -> Array:
        """Embeddings (length, D) without what `padded` adds."""
        ...

    def inputs(self, specs: Sequence[TensorSpec], embeds: Sequence[Array]) -> dict[str, Array]:
        """What a denoiser takes of prompts.

        Args:
            specs: its inputs.
            embeds: float32 (B, L, D) each; several are one batch, one after another.

        Returns:
            Input name -> array, of the inputs that are about text.
        """
        ...


class ChunkDecoder(Protocol):
    """Decodes one video, and holds what has to stay between its chunks."""

    def decode(self, latents: Array) -> Array:
        """The next chunk: denormalized latents float32 (1, C, n, h, w) -> float32 (f, 3, H, W)."""
        ...


@dataclass(frozen=True)
class Call:
    """One call of a self-test.

    Args:
        role: of the engine.
        feeds: its inputs.
        output: name of the output that is kept.
        variant: what tells it from other calls of the same engine; empty for the only one. Calls of engines whose roles
            begin alike share a state where their variants are alike up to a dot.
        corner: rows and columns at the output's end that are kept; None for all.
        spare: whether a device that has no memory for it may leave it out: it will not work at these sizes either.
    """

    role: str
    feeds: dict[str, NDArray[Any]]
    output: str
    variant: str = ""
    corner: tuple[int, int] | None = None
    spare: bool = False

    @property
    def label(self) -> str:
        """Its name among the calls of its component: the role, and the variant after a dot."""
        return f"{self.role}.{self.variant}" if self.variant else self.role

    def kept(self, output: NDArray[Any]) -> NDArray[Any]:
        """What of the output is kept."""
        return output if self.corner is None else output[..., -self.corner[0] :, -self.corner[1] :]


class Family(Protocol):
    """A family of models at run time."""

    @property
    def text(self) -> TextRule:
        """Its text."""
        ...

    def decode_ways(self, manifest: Manifest, grid: Grid | None) -> list[Way]:
        """The ways to decode, in the order they are tried, each slower than the one before and most of them smaller.

        Args:
            manifest: of the bundle.
            grid: the only tiles to use, or None.

        Raises:
            RequestError: the engines were not built for that grid.
        """
        ...

    def decode_memory(self, manifest: Manifest, shape: tuple[int, ...], way: Way, kept: int) -> tuple[StageMemory, int]:
        """What decoding latents of a shape (B, C, F, H, W) takes, and the bytes that wait in host memory meanwhile.

        Args:
            manifest: of the bundle.
            shape: of the latents.
            way: to decode.
            kept: bytes that are held besides.
        """
        ...

    def open_decoder(self, vae: Component, shape: tuple[int, ...], way: Way) -> ChunkDecoder:
        """A decoder for one video.

        Args:
            vae: the loaded component.
            shape: (1, C, F, H, W) of the latents.
            way: to decode.

        Raises:
            RequestError: more tiles than there are features.
        """
        ...

    def self_test(
        self, name: str, component: Component, model: ModelSpec, built: ComponentSpec, results: Sequence[NDArray[Any]]
    ) -> Iterator[Call]:
        """The self-test's calls of a component; later ones may take what earlier ones gave.

        Every shape profile is called, whose kernels are its own. Calls that share a state come one after another.

        Args:
            name: of the component.
            component: loaded; the bundle's own, or its reference.
            model: constants of the model.
            built: what the manifest says of the bundle's own, whose sizes are tested.
            results: what the calls gave so far; a call that was left out has added nothing.
        """
        ...


def family_of(model: ModelSpec) -> Family:
    """The family of a bundle's model.

    Raises:
        BundleError: one that this version does not know.
    """
    if model.family not in MODULES:
        raise BundleError(
            f"the bundle's model is of the family {model.family!r}; this version knows {', '.join(MODULES)}"
        )
    found: Family = importlib.import_module(MODULES[model.family]).FAMILY
    return found
