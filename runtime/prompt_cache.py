"""Prompt embeddings in the user's cache: a text that was encoded once is not encoded again, in any process.

An entry belongs to the very files of the text encoder and to what they ran on, so that it is, to the last bit, what
encoding would give. Entries are private files; those used longest ago go when there are too many.
"""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from t2v_rt.engines import platform

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
        self._folder = platform.cache_dir() / "prompts"

    def get(self, ids: NDArray[np.int64], width: int) -> Array | None:
        """The embeddings float32 (L, width) of token ids (L,), or None; a damaged entry counts as none."""
        path = self._path(ids)
        try:
            rows = np.load(path, allow_pickle=False)
            os.utime(path)  # tells the ones that are used
        except FileNotFoundError:
            return None
        except (OSError, ValueError, EOFError) as exc:
            logger.info("%s is not used: %s", path, exc)
            return None
        fits = rows.dtype == np.float32 and rows.shape == (len(ids), width) and bool(np.all(np.isfinite(rows)))
        return rows if fits else None

    def put(self, ids: NDArray[np.int64], rows: Array) -> None:
        """Keeps embeddings; a cache that cannot be written only costs the next call its time."""
        path = self._path(ids)
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            temporary = platform.temporary_sibling(path)
            with platform.create_private(temporary) as stream:
                np.save(stream, rows, allow_pickle=False)
            platform.replace_file(temporary, path)
            self._make_room()
        except OSError as exc:
            logger.info("prompt embeddings are not kept: %s", exc)

    def _path(self, ids: NDArray[np.int64]) -> Path:
        key = hashlib.sha256(self._encoder.encode() + b"\0" + ids.astype("<i8").tobytes()).hexdigest()
        return self._folder / f"{key[:40]}.npy"

    def _make_room(self) -> None:
        entries = [(entry.stat().st_mtime_ns, entry.stat().st_size, entry) for entry in self._folder.glob("*.npy")]
        total = sum(size for _, size, _ in entries)
        for _, size, entry in sorted(entries):
            if total <= self._most:
                break
            entry.unlink(missing_ok=True)
            total -= size
