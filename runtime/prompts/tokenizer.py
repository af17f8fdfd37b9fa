"""From prompt text to token ids, as the reference pipeline does it."""

from __future__ import annotations

import locale
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from t2v_rt.errors import BundleError, RequestError
from t2v_rt.system.files import native_name

logger = logging.getLogger(__name__)
SURROGATE = re.compile("[\ud800-\udfff]")
ESCAPED_BYTES = re.compile("[\udc80-\udcff]")  # what Python makes of bytes of an argument that it cannot decode


def check_text(name: str, text: str | None) -> None:
    """Refuses text that is none: lone surrogates, which is how bytes that the locale cannot read reach a program.

    Args:
        name: of the text, in the error.
        text: of a prompt; None where there is none.

    Raises:
        RequestError: it has such characters; names the locale where they can come from it.
    """
    found = None if text is None else SURROGATE.search(text)
    if found is None:
        return
    if not ESCAPED_BYTES.match(found[0]):
        raise RequestError(f"{name} has half a character ({found[0]!a} at {found.start()}); give whole ones")
    encoding = sys.getfilesystemencoding()
    if encoding == "utf-8":
        raise RequestError(f"{name} has bytes that are not UTF-8 ({found[0]!a} at {found.start()}); give text in UTF-8")
    raise RequestError(
        f"{name} has characters that the locale {locale.setlocale(locale.LC_CTYPE)!r} ({encoding}) cannot read; set "
        "LC_ALL=C.UTF-8 or PYTHONUTF8=1"
    )


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
        name = native_name(path)
        try:
            self._tokenizer = Tokenizer.from_file(name)
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

        Raises:
            RequestError: it is no text, see `check_text`.
        """
        check_text("the prompt", text)
        cleaned = self._clean(text)
        ids = self._tokenizer.encode(cleaned).ids
        if len(ids) == self.max_length:
            total = len(self._complete.encode(cleaned).ids)
            if total > self.max_length:
                logger.warning("the prompt has %d tokens; only the first %d are used", total, self.max_length)
        return np.asarray(ids, np.int64)
