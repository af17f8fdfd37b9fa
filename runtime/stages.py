"""The stages of a run: prompts to embeddings, latents to frames, each with the components that its plan allows."""

from __future__ import annotations

import copy
import hashlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Self

import numpy as np
from numpy.typing import NDArray

from t2v_rt.engines.backends import Backend
from t2v_rt.engines.bundle.manifest import Manifest
from t2v_rt.engines.bundle.store import Bundle
from t2v_rt.engines.contract import Component
from t2v_rt.errors import OutOfMemoryError, RequestError
from t2v_rt.runtime.cancel import check_cancelled
from t2v_rt.runtime.components import Components
from t2v_rt.runtime.families import family_of
from t2v_rt.runtime.frames import denormalize, to_unit_range
from t2v_rt.runtime.memory.estimates import Way
from t2v_rt.runtime.memory.plan import MemoryPlan
from t2v_rt.runtime.prompts.cache import PromptCache
from t2v_rt.runtime.prompts.embedding import EmbeddingTable
from t2v_rt.runtime.prompts.encoder import PromptEncoder, check_finite
from t2v_rt.runtime.prompts.tokenizer import PromptTokenizer

logger = logging.getLogger(__name__)
Array = NDArray[np.float32]
Progress = Callable[[str, int, int], None]
TOKENIZER = "tokenizer/tokenizer.json"


def encoder_files(manifest: Manifest) -> str:
    """A hash over the text encoder's files in a bundle and its tokenizer."""
    hashes = [
        entry.sha256
        for path, entry in sorted(manifest.files.items())
        if path.startswith(("text_encoder/", "tokenizer/"))
    ]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


class Stages:
    """What the runs of an opened bundle do with its components; safe to share between threads.

    Args:
        bundle: the opened bundle.
        backend: loads its engines.
        prompt_cache: whether embeddings are kept from process to process.
    """

    def __init__(self, bundle: Bundle, backend: Backend, prompt_cache: bool = False) -> None:
        self.bundle = bundle
        self.manifest = bundle.manifest
        self.components = Components(bundle, backend)
        model, components = self.manifest.model, self.manifest.components
        self._family = family_of(model)
        text = self.text = self._family.text
        with bundle.held((TOKENIZER,)):
            self.tokenizer = PromptTokenizer(bundle.folder / TOKENIZER, model.text.length, text.clean)
        self._encoder: PromptEncoder | None = None
        if "text_encoder" in components:
            embedding = components["text_encoder"].embedding
            assert embedding is not None
            table = EmbeddingTable(bundle.folder, embedding)
            kept = PromptCache(f"{encoder_files(self.manifest)}\n{backend.identity}") if prompt_cache else None
            rows = partial(self._embed, table, embedding.path)
            self._encoder = PromptEncoder(model.text, text, self.tokenizer, rows, kept)

    def encode_prompt(self, texts: Sequence[str], plan: MemoryPlan) -> Array:
        """Prompt embeddings of texts, remembered for later calls.

        Args:
            texts: the prompts.
            plan: of the run.

        Returns:
            float32 (B, L, D), padded with zeros.

        Raises:
            RequestError: the bundle has no text encoder.
            EngineError: it failed.
        """
        if self._encoder is None:
            raise RequestError(
                f"{self.bundle.folder} was built without its text encoder ({self.manifest.encoder_id}); give prompt "
                "embeddings: t2v-rt encode makes them with a bundle that has it"
            )
        return self._encoder.encode(texts, partial(self.components.engines, "text_encoder", plan))

    def forget_prompts(self) -> None:
        """Forgets the embeddings that were remembered for later calls, for who measures how long making them takes."""
        if self._encoder is not None:
            self._encoder.forget()

    def encode_anew(self, text: str, plan: MemoryPlan) -> Array:
        """As `encode_prompt` of one text, but run through the engines in any case; zeros where there are none."""
        if self._encoder is None:
            return np.zeros((1, self.manifest.model.text.length, self.manifest.model.text.dim), np.float32)
        return self._encoder.encode_anew(text, partial(self.components.engines, "text_encoder", plan))

    def twin(self) -> Self:
        """The same with engines of their own; what is remembered of prompts is shared."""
        twin = copy.copy(self)
        twin.components = self.components.twin()
        return twin

    def _embed(self, table: EmbeddingTable, path: str, ids: NDArray[np.int64]) -> Array:
        """Token embeddings, out of the file that was opened."""
        with self.bundle.held((path,)):
            return table.rows(ids)

    def decode(
        self,
        latents: Array,
        plan: MemoryPlan,
        progress: Progress | None = None,
        cancel: threading.Event | None = None,
    ) -> Iterator[Array]:
        """Decodes one video's latents, chunk by chunk.

        Args:
            latents: float32 (1, C, F, H, W), as sampled (output_type "latent").
            plan: of the run. Where memory runs out all the same, the next of its ways to decode is tried.
            progress: called as `f("decode", done, total)`.
            cancel: looked at before each chunk, or None.

        Returns:
            An iterator over chunks (f, H, W, 3) float32 in [0, 1], as many frames each as the model's schedule says.

        Raises:
            CancelledError: `cancel` was set.
            EngineError: the VAE failed or gave values that are not finite.
        """
        ways = plan.ways
        check_cancelled(cancel, "decode")
        done, count = 0, len(self.manifest.model.decode.chunks(latents.shape[2]))
        while done < count:
            try:
                with self.components.stage("vae_decoder", plan) as vae:
                    for frames in self.frames(vae, latents, ways[0], done, cancel):
                        done += 1
                        if progress is not None:
                            progress("decode", done, count)
                        yield frames
            except OutOfMemoryError as exc:
                if len(ways) == 1:
                    raise
                (rows, columns), parks = ways[1]
                where = ", caches in host memory" if parks else ""
                logger.warning("%s; decoding again in %dx%d tiles%s", str(exc), rows, columns, where)
                ways = ways[1:]
                self.components.release("vae_decoder")  # with all that the failed try had allocated

    def frames(
        self, vae: Component, latents: Array, way: Way, done: int = 0, cancel: threading.Event | None = None
    ) -> Iterator[Array]:
        """Chunks of one video, decoded in one way.

        Args:
            vae: the loaded decoder.
            latents: as `decode` takes them.
            way: to decode.
            done: chunks that are left out, as they were yielded before.
            cancel: looked at before each chunk, or None.
        """
        model, start = self.manifest.model, 0
        decoder = self._family.open_decoder(vae, latents.shape, way)
        for i, count in enumerate(model.decode.chunks(latents.shape[2])):
            check_cancelled(cancel, "decode")
            frames = decoder.decode(denormalize(model.latents, latents[:, :, start : start + count]))
            start += count
            check_finite(frames, "decode", "the VAE decoder")
            if i >= done:
                yield to_unit_range(frames)
