"""What counts as a number in everything that a caller gives: Python's numbers, and NumPy's scalars and 0-d arrays.

Each function returns a plain Python value, so that what is kept of a setting is plain too, or None where there is none.
"""

from __future__ import annotations

import math
import re

import numpy as np


def as_integer(value: object) -> int | None:
    """The integer that a value is, of any width; None for floats, also whole ones, and for True and False."""
    value = _scalar(value)
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return int(value)
    return None


def as_number(value: object) -> float | None:
    """The finite number that a value is, an integer too, as a float; None for all else, and for True and False."""
    value = _scalar(value)
    if not isinstance(value, (int, float, np.integer, np.floating)) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer beyond any float
        return None
    return number if math.isfinite(number) else None


def as_flag(value: object) -> bool | None:
    """The True or False that a value is; None for all else, 0 and 1 too."""
    value = _scalar(value)
    return bool(value) if isinstance(value, (bool, np.bool_)) else None


def _scalar(value: object) -> object:
    """What a 0-d array holds; anything else as it is."""
    return value[()] if isinstance(value, np.ndarray) and value.ndim == 0 else value


def is_older(version: str, least: str) -> bool:
    """Whether a version such as `1.7.1.116` comes before another one, which may have fewer parts."""
    parts = [int(part) for part in re.findall(r"\d+", least)]
    return [int(part) for part in re.findall(r"\d+", version)][: len(parts)] < parts
