"""The text encoder's table of token embeddings: it stays in its file, and rows are gathered on the host."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from t2v_rt.engines.bundle.manifest import EmbeddingSpec
from t2v_rt.errors import BundleError

STORED = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}  # NumPy has no bfloat16: its bits


class EmbeddingTable:
    """Rows of a table that is never read whole.

    Args:
        folder: of the bundle.
        spec: from the manifest.
    """

    def __init__(self, folder: Path, spec: EmbeddingSpec) -> None:
        self._path = folder / spec.path
        self._spec = spec

    def rows(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Gathers rows.

        Args:
            ids: int64 (L,), token ids.

        Returns:
            A new float32 array (1, L, D).

        Raises:
            BundleError: a token that the table has no row for, or a file of another size.
        """
        spec = self._spec
        if ids.size and not 0 <= ids.min() <= ids.max() < spec.rows:
            raise BundleError(
                f"{self._path}: the tokenizer gives token {int(ids.max())}, the text encoder has {spec.rows}; they do "
                "not belong together: build the bundle from one checkpoint"
            )
        try:  # mapped anew for each prompt, which takes microseconds, so that no file stays open in between
            table = np.memmap(self._path, STORED[spec.dtype], mode="r", shape=(spec.rows, spec.columns))
        except (OSError, ValueError) as exc:
            raise BundleError(f"{self._path} cannot be read ({exc}); build the bundle again") from exc
        rows = np.asarray(table[ids])
        if spec.dtype == "bfloat16":  # the upper half of a float32
            return (rows.astype(np.uint32) << 16).view(np.float32)[None]
        return rows.astype(np.float32)[None]
