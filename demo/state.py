"""Training state on disk: replaced in one step, so that an interrupted training continues from a whole one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def save_state(path: Path, **values: Any) -> None:
    """Writes the values beside `path` and moves them into place."""
    temporary = path.with_suffix(".tmp")
    torch.save(values, temporary)
    temporary.replace(path)


def load_state(path: Path) -> dict[str, Any] | None:
    """The values of an earlier run, or None; tensors and plain values only."""
    return dict(torch.load(path, weights_only=True)) if path.is_file() else None
