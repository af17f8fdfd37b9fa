"""What the command line does to its process, and nothing else may: its streams, its signals, what it prints."""

from __future__ import annotations

import io
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from types import FrameType
from typing import TextIO

from t2v_rt.errors import T2VError
from t2v_rt.system.temporaries import remove_unfinished

STREAMS = (0, 1, 2)
INTERRUPTED = 130  # exit code
PATIENCE = (
    1.0  # seconds that an interrupt may wait for an engine's call before that is said: on the CPU few take longer
)
ENDING = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")  # those that the system has; they end a command


class Lines(logging.Handler):
    """Log records as lines on standard error, wherever that is by then."""

    def emit(self, record: logging.LogRecord) -> None:
        tell(self.format(record))


def prepare_streams() -> None:
    """Makes text that a stream cannot spell an escape instead of an error, and sees to it that 0, 1 and 2 are taken.

    A file opened while one of them is free would get its number, and with it all that native code prints.
    """
    for number in STREAMS:
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # which takes the lowest number that is free
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with suppress(ValueError, OSError):  # it is closed
                stream.reconfigure(errors="backslashreplace")
    handler = Lines()
    handler.setFormatter(logging.Formatter("t2v-rt: %(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])


def tell(line: str) -> None:
    """Prints a line on standard error; where that cannot take it, there is nobody to tell."""
    if sys.stderr is None:  # as under pythonw
        return
    try:
        _write(sys.stderr, line)
    except (OSError, ValueError):
        drop(sys.stderr)


def answer(text: str) -> None:
    """Prints a command's result on standard output, at once.

    Raises:
        BrokenPipeError: nobody reads it any more.
        T2VError: it cannot be written.
    """
    if sys.stdout is None:
        return
    try:
        _write(sys.stdout, text)
    except BrokenPipeError:
        drop(sys.stdout)
        raise
    except (OSError, ValueError) as exc:
        drop(sys.stdout)
        raise T2VError(f"the result cannot be printed ({exc}); give standard output somewhere to go") from exc


def check_output_is_open() -> None:
    """Refuses a command, before any work, whose result is to be read and has nowhere to go.

    Raises:
        T2VError: there is no standard output.
    """
    if sys.stdout is None:
        raise T2VError("standard output is closed, and --json prints there; leave --json out, or redirect it to a file")


def drop(stream: TextIO) -> None:
    """Forgets what a stream could not take, or Python would fail over it once more at its end."""
    with suppress(AttributeError, OSError, ValueError):  # where it is no file
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def _write(stream: TextIO, text: str) -> None:
    try:
        stream.write(text + "\n")
    except UnicodeEncodeError:  # a stream of another kind, which could not be told to escape
        stream.write(text.encode("ascii", "backslashreplace").decode("ascii") + "\n")
    with suppress(AttributeError):  # a stand-in that has only what it needs
        stream.flush()


class Ending:
    """Whether a signal ends the command: what it interrupts has been told."""

    def __init__(self) -> None:
        self.told = threading.Event()

    @property
    def came(self) -> bool:
        """Whether a signal came."""
        return self.told.is_set()


@contextmanager
def ended_by_signals() -> Iterator[Ending]:
    """Ends the block on a signal to end or to hang up as on an interrupt, so that it cleans up.

    Only the first counts: further ones, but for interrupts, would end the cleaning up. One that is ignored, as under
    nohup, stays so. The interrupt does not always come out as one: what it ends may make an error of its own of it.
    While an engine's call goes on, nothing can be told to end; see `_interrupted_calls`.
    """
    ending = Ending()
    if threading.current_thread() is not threading.main_thread():
        yield ending  # where Python takes no handlers
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        ending.told.set()
        for known in before:
            if known != signal.SIGINT:
                signal.signal(known, signal.SIG_IGN)
        raise KeyboardInterrupt

    found = [signal.Signals[name] for name in ENDING if name in signal.Signals.__members__]
    before = {number: signal.getsignal(number) for number in found}
    before = {number: old for number, old in before.items() if old in (signal.SIG_DFL, signal.default_int_handler)}
    for number in before:
        signal.signal(number, interrupt)
    try:
        with _interrupted_calls(ending) if signal.SIGINT in before else nullcontext():
            yield ending
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def _interrupted_calls(ending: Ending) -> Iterator[None]:
    """Says what an interrupt waits for, and ends the process at a second one that finds it still waiting.

    Python gives a signal to the main thread between two of its own instructions, and a call of an engine is one: on a
    card it takes up to 13 seconds. Another thread hears of it at once, through the socket that Python writes it to.
    """
    heard, told = socket.socketpair()
    with heard, told:
        told.setblocking(False)
        before = signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
        if before != -1:  # a program's own, which calls the command
            signal.set_wakeup_fd(before)
            yield
            return
        thread = threading.Thread(target=_wait_for_interrupts, args=(heard, ending), daemon=True)
        thread.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(-1)
            told.shutdown(socket.SHUT_WR)
            thread.join()


def _wait_for_interrupts(heard: socket.socket, ending: Ending) -> None:
    """Until nobody can write any more."""
    waiting = False
    while number := heard.recv(1):
        if number[0] != signal.SIGINT or ending.told.wait(0.0 if waiting else PATIENCE):
            continue
        if waiting:
            remove_unfinished()
            tell("t2v-rt: interrupted")
            os._exit(INTERRUPTED)
        waiting = True
        tell("t2v-rt: ending after the engine's call in progress; press Ctrl-C again to end at once")
