"""From prompt text to token ids, as the reference pipeline does it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from t2v_rt.errors import BundleError

logger = logging.getLogger(__name__)


class PromptTokenizer:
    """The checkpoint's own tokenizer.

    Args:
        path: of `tokenizer.json`.
        max_length: tokens kept, the closing `</s>` among them.
        clean: what is done to a prompt first.

    Raises:
        BundleError: the file cannot be read as a tokenizer.
    """

    def __init__(self, path: Path, max_length: int, clean: Callable[[str], str]) -> None:
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as exc:  # tokenizers raises bare Exception
            raise BundleError(f"{path} cannot be read as a tokenizer ({exc}); build the bundle again") from exc
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._complete = Tokenizer.from_str(self._tokenizer.to_str())
        self._tokenizer.enable_truncation(max_length)
        self.max_length = max_length
        self._clean = clean

    def encode(self, text: str) -> NDArray[np.int64]:
        """Token ids of a prompt, its own length, cut at `max_length` with a warning.

        Args:
            text: the prompt, cleaned here.

        Returns:
            int64 (L,), 1 <= L <= max_length.
        """
        cleaned = self._clean(text)
        ids = self._tokenizer.encode(cleaned).ids
        if len(ids) == self.max_length:
            total = len(self._complete.encode(cleaned).ids)
            if total > self.max_length:
                logger.warning("the prompt has %d tokens; only the first %d are used", total, self.max_length)
        return np.asarray(ids, np.int64)
