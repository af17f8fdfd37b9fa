"""A bundle's components at work: loaded when a stage needs them, released when the budget says so."""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import numpy as np
from numpy.typing import NDArray

from t2v_rt.engines import forked, platform
from t2v_rt.engines.backends import Backend, load_parts
from t2v_rt.engines.bundle import Bundle
from t2v_rt.engines.contract import Component, Engine
from t2v_rt.engines.manifest import Manifest
from t2v_rt.errors import OutOfMemoryError, RequestError
from t2v_rt.runtime import wan
from t2v_rt.runtime.cancel import check_cancelled
from t2v_rt.runtime.embedding import EmbeddingTable
from t2v_rt.runtime.encoder import PromptEncoder, check_finite
from t2v_rt.runtime.first_use import prove
from t2v_rt.runtime.frame_decoder import FrameDecoder
from t2v_rt.runtime.memory_plan import MemoryPlan, decode_ways, make_plan, on_card
from t2v_rt.runtime.prompt import PromptTokenizer
from t2v_rt.runtime.prompt_cache import PromptCache
from t2v_rt.runtime.tiles import Grid

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
    """The components of an opened bundle; safe to share between threads.

    Args:
        bundle: the opened bundle.
        backend: loads its engines.
        budget: bytes the engines may take together; where all do not fit, each is released after its stage.
        vae_tiles: tiles of the VAE decoder's tail; None for as few as the budget allows.
        prompt_cache: whether embeddings are kept from process to process.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        budget: int | None = None,
        vae_tiles: Grid | None = None,
        prompt_cache: bool = False,
    ) -> None:
        self.bundle = bundle
        self.manifest = bundle.manifest
        self._backend = backend
        self._budget = budget
        self._vae_tiles = vae_tiles
        self._components: dict[str, Component] = {}
        self._users: Counter[str] = Counter()  # stages that are using a component now
        self._lock = threading.Lock()
        model, components = self.manifest.model, self.manifest.components
        self._room = None if on_card(self.manifest) else platform.available_memory_bytes()
        self._keep = budget is None  # these two until a request's plan says more
        weights = sum(spec.weights_bytes for spec in components.values())
        self._stream = not self._keep or (self._room is not None and weights > self._room)
        with bundle.held((TOKENIZER,)):
            self.tokenizer = PromptTokenizer(bundle.folder / TOKENIZER, model.text_length)
        self._encoder: PromptEncoder | None = None
        if "text_encoder" in components:
            embedding = components["text_encoder"].embedding
            assert embedding is not None
            table = EmbeddingTable(bundle.folder, embedding)
            kept = PromptCache(f"{encoder_files(self.manifest)}\n{backend.identity}") if prompt_cache else None
            rows = partial(self._embed, table, embedding.path)
            self._encoder = PromptEncoder(model, self.tokenizer, rows, self._text_engines, kept)
        forked.watch(self)

    def after_fork(self) -> None:
        """Leaves the engines to the parent; the next use loads them again. See `t2v_rt.engines.forked`."""
        self._components, self._users, self._lock = {}, Counter(), threading.Lock()

    def encode_prompt(self, texts: Sequence[str]) -> Array:
        """Prompt embeddings float32 (B, L, D) of texts, padded with zeros; remembered for later calls.

        Raises:
            RequestError: the bundle has no text encoder.
            EngineError: it failed.
        """
        if self._encoder is None:
            raise RequestError(
                f"{self.bundle.folder} was built without its text encoder ({self.manifest.encoder_id}); give prompt "
                "embeddings: t2v-rt encode makes them with a bundle that has it"
            )
        return self._encoder.encode(texts)

    def _embed(self, table: EmbeddingTable, path: str, ids: NDArray[np.int64]) -> Array:
        """Token embeddings, out of the file that was opened."""
        with self.bundle.held((path,)):
            return table.rows(ids)

    def _text_engines(self) -> Generator[Engine, None, None]:
        """The text encoder's engines in the order they run, all of them loaded or one at a time, as the plan says."""
        name = "text_encoder"
        if self._stream and name not in self._components:
            parts = partial(load_parts, self._backend, self.bundle.folder, name, self.manifest.components[name])
            with self.bundle.held(self.bundle.component_files(name)):
                prove(self.bundle, name, parts, self._backend.device)
                for component in parts():
                    yield from component.engines.values()
        else:
            with self.stage(name) as component:
                yield from component.engines.values()

    def decode(
        self,
        latents: Array,
        progress: Progress | None = None,
        cancel: threading.Event | None = None,
        grid: Grid | None = None,
    ) -> Iterator[Array]:
        """Decodes one video's latents, one latent frame at a time.

        Args:
            latents: float32 (1, C, F, H, W), as sampled (output_type "latent").
            progress: called as `f("decode", done, total)`.
            cancel: looked at before each chunk, or None.
            grid: tiles of the decoder's tail, from top to bottom and from left to right, instead of `vae_tiles` or
                the budget's; the result is the same. Where memory runs out, smaller tiles are tried.

        Returns:
            An iterator over chunks (f, H, W, 3) float32 in [0, 1]: one frame, then `temporal_factor` frames each.

        Raises:
            CancelledError: `cancel` was set.
            RequestError: latents of another shape, or more tiles than there are features.
            EngineError: the VAE failed or gave values that are not finite.
        """
        model = self.manifest.model
        if latents.ndim != 5 or latents.shape[:2] != (1, model.latent_channels) or 0 in latents.shape:
            raise RequestError(
                f"latents have shape {list(latents.shape)}; expected those of one video of this model, "
                f"(1, {model.latent_channels}, frames, rows, columns)"
            )
        ways = self._ways(latents.shape, grid)
        check_cancelled(cancel, "decode")
        done, count = 0, latents.shape[2]
        while done < count:
            try:
                with self.stage("vae_decoder") as vae:
                    for frames in self._frames(vae, latents, *ways[0], done, cancel):
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
                self.release("vae_decoder")  # with all that the failed try had allocated

    def _frames(
        self, vae: Component, latents: Array, grid: Grid, parks: bool, done: int, cancel: threading.Event | None
    ) -> Iterator[Array]:
        """Chunks of one video in one way of decoding, those left out that are `done` already."""
        model = self.manifest.model
        _, _, count, height, width = latents.shape
        decoder = FrameDecoder(vae, height, width, grid, parks)
        for i in range(count):
            check_cancelled(cancel, "decode")
            frames = decoder.decode(wan.denormalize(model, latents[:, :, i]))
            check_finite(frames, "decode", "the VAE decoder")
            if i >= done:
                yield wan.to_unit_range(frames)

    def _ways(self, shape: tuple[int, ...], grid: Grid | None) -> list[tuple[Grid, bool]]:
        """How to decode latents of `shape` under the budget, then the ways that take less memory."""
        grid = grid or self._vae_tiles
        chosen = make_plan(self.manifest, shape, budget=self._budget, grid=grid)
        ways = decode_ways(self.manifest, grid)
        return ways[ways.index((chosen.grid, chosen.parked_bytes > 0)) :]

    def plan(self, shape: tuple[int, ...], *, kept_frames: int, one_batch: bool) -> MemoryPlan:
        """The memory plan of a request under this budget and these tiles; see `make_plan`."""
        return make_plan(
            self.manifest,
            shape,
            budget=self._budget,
            grid=self._vae_tiles,
            kept_frames=kept_frames,
            one_batch=one_batch,
            room=self._room,
        )

    def follow(self, plan: MemoryPlan) -> None:
        """From here on, keeps components loaded, or releases each after its stage or shard, as a plan says."""
        self._keep, self._stream = plan.resident, plan.streamed

    def component(self, name: str) -> Component:
        """A component's engines, loaded at the first use, and tested at the first on this device."""
        with self._lock:
            if name not in self._components:
                self._components[name] = self._load(name)
            return self._components[name]

    def _load(self, name: str) -> Component:
        """Loads a component from the files that were opened, and tests it."""
        with ExitStack() as undo:
            with self.bundle.held(self.bundle.component_files(name)):
                component = self._backend.load(self.bundle.folder, name, self.manifest.components[name])
                undo.callback(component.close)
                prove(self.bundle, name, lambda: [component], self._backend.device)
            undo.pop_all()
        return component

    @contextmanager
    def stage(self, name: str) -> Iterator[Component]:
        """A component for one stage; released afterwards, also after an error, where not all fit the budget."""
        component, files = self.component(name), self.bundle.component_files(name)
        with self._lock:
            users = self._users  # a child that is forked in the block counts anew
            users[name] += 1
        try:
            self.bundle.check_loaded(files)
            yield component
            self.bundle.check_loaded(files)
        finally:
            with self._lock:
                users[name] -= 1
            if not self._keep:
                self.release(name)

    def release(self, name: str) -> None:
        """Closes a component's engines unless a stage is using them; the next use loads them again."""
        with self._lock:
            component = None if self._users[name] else self._components.pop(name, None)
        if component is not None:
            component.close()

    def close(self) -> None:
        """Releases all engines; a later call loads them again."""
        for name in list(self._components):
            self.release(name)
