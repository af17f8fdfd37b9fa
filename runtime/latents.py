"""Latents on disk: what sampling made, with all that determined it, so that decoding can follow later."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from t2v_rt.engines import platform
from t2v_rt.errors import RequestError

SUFFIX = ".npz"


def check_latents_path(path: str | Path) -> Path:
    """Checks that latents can be written to a path; raises RequestError where they cannot."""
    target = Path(path)
    if target.suffix.lower() != SUFFIX or target.is_dir():
        raise RequestError(f"{target}: latents are kept in a {SUFFIX} file; give a name that ends so")
    platform.check_writable_parent(target)
    return target


def save_latents(path: str | Path, latents: NDArray[np.float32], settings: Mapping[str, Any]) -> None:
    """Writes latents and settings, whole or not at all.

    Args:
        path: of the .npz file.
        latents: float32 (1, C, F, H, W), as sampled.
        settings: plain JSON values that determined them.
    """
    target = check_latents_path(path)
    temporary = platform.temporary_sibling(target)
    try:
        with temporary.open("wb") as stream:
            np.savez(stream, latents=latents, settings=np.array(json.dumps(settings, ensure_ascii=False)))
        platform.replace_file(temporary, target)
    finally:
        platform.remove_tree(temporary)


def load_latents(path: str | Path) -> tuple[NDArray[np.float32], dict[str, Any]]:
    """Reads what `save_latents` wrote.

    Returns:
        Latents float32 (1, C, F, H, W) and their settings.

    Raises:
        RequestError: the file is missing or not such a file.
    """
    try:
        with np.load(path, allow_pickle=False) as content:
            return content["latents"], dict(json.loads(str(content["settings"])))
    except (OSError, ValueError, KeyError, TypeError, BadZipFile) as exc:
        raise RequestError(f"{path}: no latents can be read ({exc}); expected a file of --save-latents") from exc
