"""Prompt embeddings in the user's cache: a text that was encoded once is not encoded again, in any process.

An entry belongs to the very files of the text encoder and to what they ran on, so that it is, to the last bit, what
encoding would give. Entries are private files; those used longest ago go when there are too many.
"""

from __future__ import annotations

import hashlib
import io
import logging

import numpy as np
from numpy.typing import NDArray

from t2v_rt.system.user_cache import UserCache

logger = logging.getLogger(__name__)
Array = NDArray[np.float32]
MOST_BYTES = 500_000_000  # of all entries: some hundred prompts of typical length at Wan's width


class PromptCache:
    """The entries of one text encoder.

    Args:
        encoder: text that is another wherever the embeddings could be: files, libraries, device.
        most_bytes: that all entries, of all encoders, may take together.
    """

    def __init__(self, encoder: str, most_bytes: int = MOST_BYTES) -> None:
        self._encoder = encoder
        self._most = most_bytes
        self._entries = UserCache("prompts")

    def get(self, ids: NDArray[np.int64], width: int) -> Array | None:
        """The embeddings float32 (L, width) of token ids (L,), or None; a damaged entry counts as none."""
        name = self._name(ids)
        content = self._entries.get(name)
        if content is None:
            return None
        try:
            rows = np.load(io.BytesIO(content), allow_pickle=False)
        except (ValueError, EOFError) as exc:
            logger.info("%s is not used: %s", self._entries.path(name), exc)
            return None
        self._entries.touch(name)  # tells the ones that are used
        fits = rows.dtype == np.float32 and rows.shape == (len(ids), width) and bool(np.all(np.isfinite(rows)))
        return rows if fits else None

    def put(self, ids: NDArray[np.int64], rows: Array) -> None:
        """Keeps embeddings; a cache that cannot be written only costs the next call its time."""
        content = io.BytesIO()
        np.save(content, rows, allow_pickle=False)
        if self._entries.put(self._name(ids), content.getvalue()):
            self._entries.prune(self._most)

    def _name(self, ids: NDArray[np.int64]) -> str:
        key = hashlib.sha256(self._encoder.encode() + b"\0" + ids.astype("<i8").tobytes()).hexdigest()
        return f"{key[:40]}.npy"
