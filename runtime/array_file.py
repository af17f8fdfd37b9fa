"""Arrays and the settings that determined them in one .npz file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from t2v_rt.engines.bundle.manifest import from_plain
from t2v_rt.errors import RequestError, T2VError
from t2v_rt.system.files import writing
from t2v_rt.system.outputs import check_file

T = TypeVar("T")
SUFFIX, SETTINGS = ".npz", "settings"


def check_array_path(path: str | Path, what: str) -> Path:
    """Checks that such a file can be written.

    Args:
        path: of the file.
        what: it keeps, named in errors.

    Returns:
        The path that is to be written, see `check_file`.

    Raises:
        RequestError: it cannot.
    """
    return check_file(path, SUFFIX, f"a file of {what}")


def save_arrays(path: str | Path, what: str, arrays: Mapping[str, NDArray[Any]], settings: Mapping[str, Any]) -> None:
    """Writes arrays and settings, whole or not at all; the same ones give the same bytes.

    Args:
        path: of the file.
        what: it keeps, named in errors.
        arrays: by name.
        settings: plain JSON values.

    Raises:
        RequestError: the path cannot be written to.
        T2VError: the disk failed.
    """
    target = check_array_path(path, what)
    named: dict[str, NDArray[Any]] = {**arrays, SETTINGS: np.array(json.dumps(settings, ensure_ascii=False))}
    try:
        with writing(target) as stream:
            np.savez(stream, **named)  # type: ignore[arg-type]
    except OSError as exc:
        raise T2VError(f"{target} cannot be written ({exc}); free some disk space or choose another place") from exc


def load_arrays(
    path: str | Path, what: str, names: tuple[str, ...], maker: str, kind: type[T]
) -> tuple[list[NDArray[Any]], T]:
    """Reads what `save_arrays` wrote.

    Args:
        path: of the file.
        what: it keeps, named in errors.
        names: of the arrays.
        maker: the command that makes such a file.
        kind: that the settings are, such as a dataclass; `dict` for any.

    Returns:
        The arrays in that order, and the settings.

    Raises:
        RequestError: the file is missing, damaged or another one.
    """
    try:
        with Path(path).open("rb") as stream, np.load(stream, allow_pickle=False) as content:
            settings = from_plain(json.loads(str(content[SETTINGS])), kind)
            return [content[name] for name in names], settings
    except (OSError, ValueError, KeyError, TypeError, IndexError, EOFError, BadZipFile) as exc:
        raise RequestError(f"{path}: no {what} can be read ({exc}); make them with {maker}") from exc
