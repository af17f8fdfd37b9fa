"""The commands: one module each, which is imported when its command is asked for."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping
from typing import Any, Protocol, cast

COMMANDS: Mapping[str, str] = {
    "build-engines": "Export a checkpoint (safetensors) and build its engines; an ended build goes on where it was.",
    "encode": "Encode a prompt into a file, for machines that have no room for the text encoder.",
    "generate": "Make a video from a prompt; what is left out takes the bundle's default.",
    "inspect": "Check a bundle and tell what is in it.",
    "plan": "Tell what a request needs in memory, stage by stage, and whether it fits; nothing is loaded.",
    "bench": "Measure a bundle, stage by stage and beside peers; with the word compare, judge two results.",
    "verify": "Hold a bundle's engines, on this machine, against the answers of their float32 reference.",
    "doctor": "Tell what of this machine can be used, and why not.",
}


class Command(Protocol):
    """What a module of a command has."""

    def declare(self, parser: argparse.ArgumentParser) -> None:
        """Adds the command's options."""

    def run(self, parsed: argparse.Namespace) -> dict[str, Any]:
        """Does what the command is for; returns a report of plain JSON values."""

    def describe(self, report: Mapping[str, Any]) -> list[str]:
        """The report in lines for a person."""


def command_of(name: str) -> Command:
    """The module of a command."""
    return cast(Command, importlib.import_module(f"{__name__}.{name.replace('-', '_')}"))
