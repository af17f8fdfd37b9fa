"""Prompt texts to prompt embeddings, each text encoded once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Sequence
from contextlib import closing

import numpy as np
from numpy.typing import NDArray

from t2v_rt.engines.bundle.model import TextSpec
from t2v_rt.engines.contract import Engine
from t2v_rt.errors import EngineError
from t2v_rt.runtime.families import TextRule
from t2v_rt.runtime.prompts.cache import PromptCache
from t2v_rt.runtime.prompts.tokenizer import PromptTokenizer
from t2v_rt.system import forked

Array = NDArray[np.float32]
OpenEngines = Callable[[], Generator[Engine, None, None]]
CACHED_TEXTS = 64  # the embeddings of 64 prompts of 512 tokens at Wan's width are 0.5 GB; most are 20 times shorter


class PromptEncoder:
    """Encodes prompts at their own length and remembers the results; safe to share between threads.

    Args:
        spec: how the model takes its prompt.
        rule: of the model's family.
        tokenizer: of the bundle.
        rows: token ids int64 (L,) -> their embeddings float32 (1, L, D).
        kept: embeddings of earlier processes, or None.
    """

    def __init__(
        self,
        spec: TextSpec,
        rule: TextRule,
        tokenizer: PromptTokenizer,
        rows: Callable[[NDArray[np.int64]], Array],
        kept: PromptCache | None = None,
    ) -> None:
        self._spec, self._rule = spec, rule
        self._tokenizer = tokenizer
        self._rows = rows
        self._kept = kept
        self._cache: OrderedDict[str, Array] = OrderedDict()
        self._lock = threading.Lock()
        self._running = threading.Lock()
        forked.watch(self)

    def after_fork(self) -> None:
        """Takes new locks, as threads that are not there may hold the old ones; see `t2v_rt.system.forked`."""
        self._lock, self._running = threading.Lock(), threading.Lock()

    def encode(self, texts: Sequence[str], open_engines: OpenEngines) -> Array:
        """Prompt embeddings as the reference pads them.

        Args:
            texts: the prompts; those that are new run through each engine together, while it is loaded.
            open_engines: the text encoder's engines in the order they run, each loaded when it is asked for and done
                with when the next one is; called only when a text is not remembered.

        Returns:
            float32 (B, length, D).

        Raises:
            BundleError: tokenizer and text encoder do not belong together.
            EngineError: the text encoder failed or gave values that are not finite.
        """
        found = self._cached(texts)
        if len(found) < len(set(texts)):
            with self._running:  # two threads would load everything twice
                found = self._cached(texts)
                found |= self._run([text for text in dict.fromkeys(texts) if text not in found], open_engines)
        return np.stack([self._rule.padded(found[text], self._spec.length) for text in texts])

    def forget(self) -> None:
        """Forgets all results of this process, so that the next call of each text runs the engines."""
        with self._lock:
            self._cache.clear()

    def encode_anew(self, text: str, open_engines: OpenEngines) -> Array:
        """Prompt embeddings float32 (1, length, D) of a text, whether it is remembered or not; nothing is kept."""
        (rows,) = self._infer([self._tokenizer.encode(text)], open_engines)
        padded: Array = self._rule.padded(rows, self._spec.length)[None]
        return padded

    def _cached(self, texts: Sequence[str]) -> dict[str, Array]:
        """Embeddings (L, D) of those texts that are remembered."""
        with self._lock:
            found = {text: self._cache[text] for text in texts if text in self._cache}
            for text in found:
                self._cache.move_to_end(text)
        return found

    def _run(self, texts: Sequence[str], open_engines: OpenEngines) -> dict[str, Array]:
        """Embeddings (L, D) of texts, each at its own length L; remembered."""
        ids = {text: self._tokenizer.encode(text) for text in texts}
        found = {}
        for text in texts if self._kept is not None else ():
            rows = self._kept.get(ids[text], self._spec.dim) if self._kept is not None else None
            if rows is not None:
                found[text] = rows
        new = {text: ids[text] for text in texts if text not in found}
        made = dict(zip(new, self._infer(list(new.values()), open_engines), strict=True)) if new else {}
        for text, rows in made.items():
            if self._kept is not None:
                self._kept.put(ids[text], rows)
        found |= made
        with self._lock:
            self._cache.update(found)
            while len(self._cache) > CACHED_TEXTS:
                self._cache.popitem(last=False)
        return found

    def _infer(self, ids: Sequence[NDArray[np.int64]], open_engines: OpenEngines) -> list[Array]:
        """Embeddings (L, D) of token ids (L,)."""
        hidden = [self._rows(tokens) for tokens in ids]
        beside = [self._rule.feeds(self._spec, states.shape[1]) for states in hidden]
        with closing(open_engines()) as engines:
            for engine in engines:
                for i, (states, others) in enumerate(zip(hidden, beside, strict=True)):
                    (hidden[i],) = engine.infer({"hidden_states": states, **others}).values()
        for embeds in hidden:
            check_finite(embeds, "encode", "the text encoder")
        return [embeds[0] for embeds in hidden]


def check_finite(array: NDArray[np.floating], stage: str, what: str) -> None:
    """Refuses values that are not finite.

    Raises:
        EngineError: names the stage.
    """
    if not np.isfinite(array).all():
        raise EngineError(
            f"stage {stage}: {what} gave values that are not finite; the engine is damaged or overflows: "
            "build the bundle again, at fp32 if it is at a lower precision"
        )
