"""Prompt texts to prompt embeddings, each text encoded once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from t2v_rt.engines.contract import Component
from t2v_rt.engines.manifest import ModelSpec
from t2v_rt.errors import EngineError
from t2v_rt.runtime import wan
from t2v_rt.runtime.prompt import PromptTokenizer

Array = NDArray[np.float32]
CACHED_TEXTS = 64  # the embeddings of 64 prompts of 512 tokens at Wan's width are 0.5 GB; most are 20 times shorter


class PromptEncoder:
    """Encodes prompts at their own length and remembers the results; safe to share between threads.

    Args:
        model: constants of the model.
        tokenizer: of the bundle.
        open_component: loads the text encoder, called only when a text is not cached.
    """

    def __init__(self, model: ModelSpec, tokenizer: PromptTokenizer, open_component: Callable[[], Component]) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._open = open_component
        self._cache: OrderedDict[str, Array] = OrderedDict()
        self._lock = threading.Lock()

    def encode(self, texts: Sequence[str]) -> Array:
        """Prompt embeddings as the reference pads them.

        Args:
            texts: the prompts.

        Returns:
            float32 (B, text_length, D): each prompt's rows, then zeros.

        Raises:
            EngineError: the text encoder failed or gave values that are not finite.
        """
        model = self._model
        result = np.zeros((len(texts), model.text_length, model.text_dim), np.float32)
        for row, text in zip(result, texts, strict=True):
            rows = self._rows(text)
            row[: len(rows)] = rows
        return result

    def _rows(self, text: str) -> Array:
        """Embeddings (L, D) of one text, L its own length."""
        with self._lock:
            if text in self._cache:
                self._cache.move_to_end(text)
                return self._cache[text]
        ids = self._tokenizer.encode(text)
        model = self._model
        buckets = wan.relative_buckets(len(ids), model.relative_buckets, model.relative_max_distance)
        embeds = self._open()["model"].infer({"input_ids": ids[None], "relative_buckets": buckets})["prompt_embeds"]
        check_finite(embeds, "encode", "the text encoder")
        with self._lock:
            self._cache[text] = embeds[0]
            if len(self._cache) > CACHED_TEXTS:
                self._cache.popitem(last=False)
        rows: Array = embeds[0]
        return rows


def check_finite(array: NDArray[np.floating], stage: str, what: str) -> None:
    """Refuses values that are not finite.

    Raises:
        EngineError: names the stage.
    """
    if not np.all(np.isfinite(array)):
        raise EngineError(
            f"stage {stage}: {what} gave values that are not finite; the engine is damaged or overflows: "
            "build the bundle again, at fp32 if it is at a lower precision"
        )
