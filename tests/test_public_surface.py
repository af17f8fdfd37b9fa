"""The names that users import: all there, all documented."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from docs.api import MODULES


def is_ours(item: Any) -> bool:
    return (inspect.isfunction(item) or inspect.ismethod(item)) and item.__module__.startswith("t2v_rt")


def public(module_name: str) -> Iterator[tuple[str, Any]]:
    """The classes and functions of a module's `__all__`, and the methods and properties of its classes."""
    module = importlib.import_module(module_name)
    for name in module.__all__:
        item = getattr(module, name)
        if is_ours(item):
            yield name, item
        elif inspect.isclass(item):
            yield name, item
            for member in dir(item):
                found = inspect.getattr_static(item, member)
                found = found.fget if isinstance(found, property) else getattr(item, member)
                if is_ours(found) and (member == "__call__" or not member.startswith("_")):
                    yield f"{name}.{member}", found


def own_text(name: str, item: Any) -> str:
    """A docstring; none where it is but the signature that a dataclass without one is given."""
    text = inspect.getdoc(item) or ""
    return "" if text.startswith(f"{name}(") else text


def documented_arguments(text: str) -> list[str]:
    """The names in a docstring's section `Args`."""
    section = re.search(r"^Args:\n((?: .*\n?|\n)*)", text, re.MULTILINE)
    return [] if section is None else re.findall(r"^    (\w+): ", section[1], re.MULTILINE)


def arguments(item: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(item).parameters if name not in ("self", "cls")]


@pytest.mark.parametrize("module_name", MODULES)
def test_all_names_are_there_each_once(module_name: str) -> None:
    module = importlib.import_module(module_name)
    assert len(module.__all__) == len(set(module.__all__))
    for name in module.__all__:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError):
        module.no_such_name  # noqa: B018


@pytest.mark.parametrize("module_name", MODULES)
def test_every_public_name_has_a_docstring(module_name: str) -> None:
    names = dict(public(module_name))
    assert names
    undocumented = [name for name, item in names.items() if not own_text(name, item)]
    assert undocumented == []


@pytest.mark.parametrize("module_name", MODULES)
def test_arguments_are_described_all_or_none_and_in_their_order(module_name: str) -> None:
    for name, item in public(module_name):
        described = documented_arguments(inspect.getdoc(item) or "")
        assert described in ([], arguments(item)), name
