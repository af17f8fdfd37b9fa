"""Reading the JSON configs of a checkpoint: each value checked where it is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from t2v_rt.engines.bundle.manifest import Defaults
from t2v_rt.errors import CheckpointError
from t2v_rt.export.found_instead import absent, found_instead
from t2v_rt.numbers import as_integer, as_number

INDEX = "model_index.json"
T = TypeVar("T", int, float, bool, str, list[Any])


@dataclass(frozen=True)
class CheckpointConfigs:
    """What a checkpoint says of itself.

    Args:
        origin: where it is from, for errors.
        index: `model_index.json`.
        networks: `config.json` of each network.
        scheduler: `scheduler_config.json`.
        generation: `generation_config.json`, empty where there is none.
    """

    origin: str
    index: Mapping[str, Any]
    networks: Mapping[str, Mapping[str, Any]]
    scheduler: Mapping[str, Any]
    generation: Mapping[str, Any]


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object, with a byte order mark or without; raises CheckpointError where it is missing or not one."""
    if not path.is_file():
        raise CheckpointError(f"{path} {absent(path)}; expected a checkpoint in diffusers layout")
    try:
        content = json.loads(path.read_bytes())  # which tells UTF-8, 16 and 32 by their first bytes
    except OSError as exc:
        raise CheckpointError(f"{path} cannot be read ({exc.strerror}); check its rights and its disk") from exc
    except (ValueError, RecursionError) as exc:
        if (instead := found_instead(path)) is not None:
            raise CheckpointError(f"{path} {instead}") from exc
        raise CheckpointError(f"{path} cannot be read as JSON ({exc}); download it again") from exc
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected a JSON object")
    return content


def option(
    config: Mapping[str, Any], component: str, key: str, kind: type[T], default: T, *, nullable: bool = False
) -> T:
    """A config value of the given kind, or the upstream class's default where the config leaves it out.

    Raises:
        CheckpointError: the value is of another kind, or a size below one.
    """
    value = config.get(key, default)
    if value is None and nullable:
        return default
    if kind is float and type(value) is int:
        value = float(value)
    if not isinstance(value, kind) or (kind is int and not _is_size(value)):
        raise CheckpointError(
            f"{component}/config.json: {key} is {value!r}; expected a {kind.__name__}"
            + (" of 1 or more" if kind is int else "")
        )
    return value


def _is_size(value: object) -> bool:
    size = as_integer(value)
    return size is not None and size >= 1


def require(config: Mapping[str, Any], component: str, key: str, expected: object, default: object = "nothing") -> None:
    """Refuses a config whose `key` is not `expected`; `default` is what a missing key means."""
    found = config.get(key, default)
    if found != expected:
        raise CheckpointError(f"{component}/config.json: {key} is {found!r}; only {expected!r} is supported")


def read_defaults(generation: Mapping[str, Any], defaults: Defaults) -> Defaults:
    """Defaults of requests: a checkpoint's `generation_config.json` over its family's own.

    Raises:
        CheckpointError: a value of the wrong kind.
    """
    values: dict[str, Any] = {}
    for key, family_value in vars(defaults).items():
        given, kind = generation.get(key, family_value), type(family_value)
        readers = {int: as_integer, float: as_number}
        value: Any = readers[kind](given) if kind in readers else given
        if not isinstance(value, kind) or (not isinstance(value, str) and value <= 0):
            raise CheckpointError(f"generation_config.json: {key} is {given!r}; expected a positive {kind.__name__}")
        values[key] = value
    return Defaults(**values)
