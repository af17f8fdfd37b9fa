"""A scheduler's settings: frozen, checked, and readable as a mapping."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np

from t2v_rt.errors import RequestError
from t2v_rt.numbers import as_flag, as_integer, as_number


@dataclass(frozen=True)
class SchedulerConfig(Mapping[str, Any]):
    """A scheduler's settings: a frozen dataclass that reads as a mapping, as diffusers' configs do.

    Raises:
        RequestError: a value is not of its field's kind.
    """

    def __getitem__(self, key: str) -> Any:
        if key not in type(self).__dataclass_fields__:
            raise KeyError(key)
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        return (item.name for item in fields(self))

    def __len__(self) -> int:
        return len(fields(self))

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for item in fields(self):
            value = getattr(self, item.name)
            if type(value) is type(item.default) and value == item.default:
                continue  # lets a default be infinite
            object.__setattr__(self, item.name, _checked(item.name, value, hints[item.name]))


def _checked(name: str, value: Any, hint: Any) -> Any:
    """The value, where it is of an annotated kind: an integer counts as a float, lists and arrays become tuples.

    NumPy's scalars become Python's.
    """
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    readers = {float: as_number, int: as_integer, bool: as_flag}
    for kind in kinds:
        if get_origin(kind) is Literal:
            if isinstance(value, str) and value in get_args(kind):
                return value
        elif get_origin(kind) is tuple:
            if isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.ndim):
                return tuple(_checked(f"an item of {name}", item, get_args(kind)[0]) for item in value)
        elif kind in readers:
            if (read := readers[kind](value)) is not None:
                return read
        elif type(value) is kind:
            return value
    raise RequestError(f"{name} is {value!r}; expected {' or '.join(_words(kind) for kind in kinds)}")


def _words(kind: Any) -> str:
    """An annotation, in words for a message."""
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(repr, get_args(kind)))}"
    if get_origin(kind) is tuple:
        return f"a list of {get_args(kind)[0].__name__}"
    return {float: "a finite float", type(None): "None"}.get(kind, str(kind.__name__))
