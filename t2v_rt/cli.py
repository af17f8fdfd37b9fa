"""The command line: `t2v-rt build-engines | encode | generate | inspect | plan | verify | doctor`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from t2v_rt import console
from t2v_rt.commands import COMMANDS, command_of
from t2v_rt.errors import RequestError, T2VError, VerificationError

EXIT_USAGE, EXIT_FAILURE, EXIT_INTERRUPTED = 2, 1, console.INTERRUPTED
EXAMPLE = 'example: t2v-rt generate "a red ball bouncing" --engines build/demo --output ball.mp4 --seed 7'


class Parser(argparse.ArgumentParser):
    """Argument errors in one line."""

    def error(self, message: str) -> NoReturn:
        raise RequestError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: the arguments, without the program's name; None takes the process's own.

    Returns:
        The exit code: 0 done, 2 bad usage or input, 1 anything else, 130 interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    console.prepare_streams()
    with console.ended_by_signals() as ending:
        try:
            parsed = make_parser(arguments).parse_args(arguments)
            if parsed.json:
                console.check_output_is_open()
            _run(parsed)
        except (KeyboardInterrupt, Exception) as exc:
            if ending.came or isinstance(exc, KeyboardInterrupt):
                console.tell(f"t2v-rt: interrupted{_notes(exc)}")
                return EXIT_INTERRUPTED
            if isinstance(exc, BrokenPipeError):
                return EXIT_FAILURE
            if isinstance(exc, T2VError):
                console.tell(f"t2v-rt: error: {exc}{_notes(exc)}")
                return exc.exit_code
            if "--verbose" in arguments:  # whatever else goes wrong is one line for the user, but for who wants more
                raise
            console.tell(f"t2v-rt: error: {type(exc).__name__}: {' '.join(str(exc).split())}{_notes(exc)}")
            return EXIT_FAILURE
    return 0


def _notes(error: BaseException) -> str:
    """What was added to an error on its way up."""
    return "".join(f"; {note}" for note in getattr(error, "__notes__", ()))


def make_parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """All commands, and the options of the one that is asked for.

    Args:
        arguments: that will be parsed.
    """
    from t2v_rt import __version__

    parser = Parser(prog="t2v-rt", description="Text-to-video on 8 GB cards, or on the CPU.", epilog=EXAMPLE)
    parser.add_argument("--version", action="version", version=f"t2v-rt {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    asked = next((word for word in arguments if not word.startswith("-")), "")
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(command=name)
        command.add_argument("--json", action="store_true", help="print one JSON object on standard output")
        command.add_argument("--verbose", action="store_true", help="show where an unexpected error came from")
        if name == asked:
            command_of(name).declare(command)
    return parser


def _run(parsed: argparse.Namespace) -> None:
    """Runs the command and prints its report: one JSON object, in ASCII for any stream, or lines for a person."""
    command = command_of(parsed.command)

    def show(report: Mapping[str, Any]) -> None:
        console.answer(json.dumps(report) if parsed.json else "\n".join(command.describe(report)))

    try:
        report = command.run(parsed)
    except VerificationError as exc:
        show(exc.report)
        raise
    show(report)
