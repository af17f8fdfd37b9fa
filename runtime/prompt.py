"""From prompt text to token ids, as the reference pipeline does it."""

from __future__ import annotations

import html
import logging
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from t2v_rt.engines import forked
from t2v_rt.errors import BundleError

logger = logging.getLogger(__name__)


def clean_prompt(text: str) -> str:
    """Repairs mis-decoded text, resolves HTML entities twice and collapses white space.

    Source: `prompt_clean` of diffusers' `pipeline_wan.py`.
    """
    with forked.loading:  # a child that is forked during an import waits for its end for ever
        import ftfy  # costs more than the rest of the start-up; a call with precomputed embeddings does without

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


class PromptTokenizer:
    """The checkpoint's own tokenizer.

    Args:
        path: of `tokenizer.json`.
        max_length: tokens kept, the closing `</s>` among them.

    Raises:
        BundleError: the file cannot be read as a tokenizer.
    """

    def __init__(self, path: Path, max_length: int) -> None:
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as exc:  # tokenizers raises bare Exception
            raise BundleError(f"{path} cannot be read as a tokenizer ({exc}); build the bundle again") from exc
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._complete = Tokenizer.from_str(self._tokenizer.to_str())
        self._tokenizer.enable_truncation(max_length)
        self.max_length = max_length

    def encode(self, text: str) -> NDArray[np.int64]:
        """Token ids of a prompt, its own length, cut at `max_length` with a warning.

        Args:
            text: the prompt, cleaned here.

        Returns:
            int64 (L,), 1 <= L <= max_length.
        """
        cleaned = clean_prompt(text)
        ids = self._tokenizer.encode(cleaned).ids
        if len(ids) == self.max_length:
            total = len(self._complete.encode(cleaned).ids)
            if total > self.max_length:
                logger.warning("the prompt has %d tokens; only the first %d are used", total, self.max_length)
        return np.asarray(ids, np.int64)
