"""Options as fields of frozen dataclasses: each is declared, described and checked once, for calls and commands alike.

An option's text is its line in the class's `Args`. The parser shows it as help (`t2v_rt.commands.parsing`), and calls
that take the option by name show it in their own `Args` (`documented_by`).
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

KEY = "option"  # of a field's metadata
NEXT = re.compile(r"^(?=(?:Returns|Raises):)|\Z", re.MULTILINE)  # where a docstring without `Args` would have them
SECTION = re.compile(r"^Args:\n((?: {4}.*\n?|\n)+)", re.MULTILINE)
ENTRY = re.compile(r"^ {4}(\w+): .*\n?(?:^ {5,}.*\n?)*", re.MULTILINE)
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Option:
    """How an option is written on the command line.

    Args:
        flag: its name there; empty for the field's own, with dashes.
        positional: whether it has no name there.
        metavar: what stands for its value in the usage; empty for the parser's choice.
        read: makes the value of the word that is given.
        words: the words that it may be -> their values, instead of `read`.
        repeated: whether it may be given several times; its value is the list of all.
        help: its text there, where that of the docstring says what the command line cannot do; empty for that one.
    """

    flag: str = ""
    positional: bool = False
    metavar: str = ""
    read: Callable[[str], Any] = str
    words: Mapping[str, Any] | None = None
    repeated: bool = False
    help: str = ""


def option(
    default: Any = dataclasses.MISSING,
    *,
    flag: str = "",
    positional: bool = False,
    metavar: str = "",
    read: Callable[[str], Any] = str,
    words: Mapping[str, Any] | None = None,
    repeated: bool = False,
    help: str = "",
) -> Any:
    """A dataclass's field that is an option of a command too; see `Option` for the arguments after `default`."""
    return dataclasses.field(
        default=default, metadata={KEY: Option(flag, positional, metavar, read, words, repeated, help)}
    )


def options_of(cls: type) -> Iterator[tuple[dataclasses.Field[Any], Option]]:
    """The fields of a dataclass that are options of a command: its own first, then those of its bases."""
    fields = {item.name: item for item in dataclasses.fields(cls)}
    for base in cls.__mro__:
        for name in inspect.get_annotations(base):
            if name in fields and KEY in fields[name].metadata:
                item = fields.pop(name)
                yield item, item.metadata[KEY]


def texts_of(cls: type) -> dict[str, str]:
    """Name -> text of the arguments that a dataclass and its bases describe."""
    entries = {name: entry for base in reversed(cls.__mro__) for name, entry in _entries(base.__doc__).items()}
    return {name: " ".join(entry.split()).partition(": ")[2] for name, entry in entries.items()}


def documented_by(*sources: object) -> Callable[[F], F]:
    """Fills in the texts of arguments that are described elsewhere; the function's docstring has the rest.

    Args:
        sources: dataclasses of options, or functions, that describe arguments of the same names.
    """

    def fill(function: F) -> F:
        if function.__doc__ is None:  # python -OO
            return function
        text = inspect.cleandoc(function.__doc__)
        entries = {**{k: v for source in sources for k, v in _entries(source.__doc__).items()}, **_entries(text)}
        named = [entries[name] for name in inspect.signature(function).parameters if name in entries]
        lines = "".join(entry if entry.endswith("\n") else f"{entry}\n" for entry in named)
        place = SECTION if SECTION.search(text) else NEXT
        function.__doc__ = place.sub(lambda found: f"Args:\n{lines}\n", text, count=1)
        return function

    return fill


def _entries(doc: str | None) -> dict[str, str]:
    """Name -> the lines of each argument that a docstring describes."""
    section = SECTION.search(inspect.cleandoc(doc or ""))
    return {} if section is None else {found[1]: found[0] for found in ENTRY.finditer(section[1])}
