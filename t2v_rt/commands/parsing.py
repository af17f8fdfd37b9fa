"""A command's options, made from the fields of a dataclass, and read back into its values."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import MISSING
from functools import wraps
from typing import Any

from t2v_rt.errors import RequestError
from t2v_rt.options import options_of, texts_of


def declare_options(parser: argparse.ArgumentParser, cls: type) -> None:
    """Adds an option for each field of a dataclass that is one; what is left out is left to the dataclass.

    Args:
        parser: of the command.
        cls: the dataclass.
    """
    texts = texts_of(cls)
    for field, option in options_of(cls):
        required = field.default is MISSING
        settings: dict[str, Any] = {}
        if isinstance(field.default, bool):
            settings["action"] = "store_false" if field.default else "store_true"
        else:
            settings["metavar"] = option.metavar or None
            settings["type"] = _reader(option.read)
            settings["choices"] = None if option.words is None else tuple(option.words)
            if option.repeated:
                settings["action"] = "append"
        if option.positional:
            names, settings["nargs"] = [field.name], None if required else "?"
        else:
            names = [option.flag or "--" + field.name.replace("_", "-")]
            settings |= {"dest": field.name, "required": required}
        text = option.help or texts.get(field.name, "").replace("`", "").removesuffix(".")
        if isinstance(field.default, str):
            text += f" (default: {field.default})"
        parser.add_argument(*names, default=argparse.SUPPRESS, help=text.replace("%", "%%"), **settings)


def given_options(cls: type, parsed: argparse.Namespace) -> dict[str, Any]:
    """The values of the options that were given, by the names of the dataclass's fields.

    Args:
        cls: the dataclass that the options were declared from.
        parsed: what the parser made of the command line.
    """
    found = vars(parsed)
    return {
        field.name: found[field.name] if option.words is None else option.words[found[field.name]]
        for field, option in options_of(cls)
        if field.name in found
    }


def _reader(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """What the parser reads a word by; it tells an error's own message for one type of error only."""

    @wraps(read)
    def reader(text: str) -> Any:
        try:
            return read(text)
        except RequestError as exc:
            raise argparse.ArgumentTypeError(str(exc)) from exc

    return reader
