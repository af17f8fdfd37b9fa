"""Signals that end a command: they clean up as an interrupt does, in the command line alone."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from t2v_rt import TextToVideoPipeline, cli, console
from t2v_rt.build.work_folder import CONTINUES
from t2v_rt.commands.bars import Bars
from tests.conftest import Tiny
from tests.support.processes import start_and_meet

pytestmark = pytest.mark.skipif(os.name != "posix", reason="such signals are Unix's")
ENDING = [signal.Signals[name] for name in ("SIGTERM", "SIGHUP") if name in signal.Signals.__members__]


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("number", ENDING)
def test_a_process_that_is_told_to_end_cleans_up(narrow: Tiny, tmp_path: Path, number: int) -> None:
    command = ["generate", "a ball", "--engines", str(narrow.bundle), "--output", str(tmp_path / "out.npy")]
    endless = ["--num-inference-steps", "20000"]
    with start_and_meet(*command, *endless, at="denoise", call=3, goes_on=True) as process:
        assert hidden(tmp_path)  # the video is begun
        process.send_signal(number)
        _, errors = process.communicate()
    assert (process.returncode, errors) == (cli.EXIT_INTERRUPTED, "t2v-rt: interrupted\n")
    assert not list(tmp_path.iterdir())


IN_A_CALL = """
import hashlib
import signal
import sys
import threading
from t2v_rt.cli import main
from t2v_rt.commands.bars import Bars

signal.signal(signal.SIGINT, signal.default_int_handler)
gate = threading.Lock()


def tell():
    with gate:
        print("here", flush=True)


def update(self, stage, done, total, *, detail=""):
    if (stage, done) == ("denoise", 2):
        with gate:
            threading.Thread(target=tell, daemon=True).start()
            sys.setswitchinterval(1000)  # no other thread runs until this one is in the call
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # half an hour of native code, as an engine's call is


Bars.update = update
sys.exit(main(sys.argv[1:]))
"""


def test_an_interrupt_waits_for_an_engines_call_and_a_second_one_does_not(narrow: Tiny, tmp_path: Path) -> None:
    command = ["generate", "a ball", "--engines", str(narrow.bundle), "--output", str(tmp_path / "out.npy")]
    with subprocess.Popen(
        [sys.executable, "-c", IN_A_CALL, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "here\n"
        assert hidden(tmp_path)  # the video is begun
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == (
            "t2v-rt: ending after the engine's call in progress; press Ctrl-C again to end at once\n"
        )
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    assert (process.returncode, errors) == (cli.EXIT_INTERRUPTED, "t2v-rt: interrupted\n")
    assert not list(tmp_path.iterdir())


def test_another_listener_to_signals_stays_one() -> None:
    heard, told = socket.socketpair()
    with heard, told:
        told.setblocking(False)
        assert signal.set_wakeup_fd(told.fileno()) == -1
        try:
            with console.ended_by_signals():
                signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            assert heard.recv(1) == bytes([signal.SIGTERM])
        finally:
            assert signal.set_wakeup_fd(-1) == told.fileno()


@pytest.mark.parametrize("number", ENDING)
def test_a_build_that_is_told_to_end_keeps_its_finished_parts(
    narrow: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def end(self: Bars, stage: str, done: int, total: int, *, detail: str = "") -> None:
        if detail == "vae_decoder":
            signal.raise_signal(number)
            signal.raise_signal(number)  # while it cleans up

    monkeypatch.setattr(Bars, "update", end)
    command = ["build-engines", str(narrow.checkpoint), "--output", str(tmp_path / "b")]
    assert cli.main(command) == cli.EXIT_INTERRUPTED
    assert capsys.readouterr().err == f"t2v-rt: interrupted; {CONTINUES}\n"
    assert len(hidden(tmp_path)) == 1
    assert signal.getsignal(number) is signal.SIG_DFL
    monkeypatch.undo()
    assert cli.main(command) == 0
    assert not hidden(tmp_path)


def test_an_interrupt_that_became_another_error_is_one_all_the_same(
    narrow: Tiny, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(folder: object) -> None:  # as libraries do that are being imported meanwhile
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as exc:
            raise ImportError("initialization failed") from exc

    monkeypatch.setattr("t2v_rt.commands.inspect.open_bundle", load)
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of a shell
    try:
        assert cli.main(["inspect", str(narrow.bundle)]) == cli.EXIT_INTERRUPTED
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert capsys.readouterr().err == "t2v-rt: interrupted\n"


def test_signals_that_are_ignored_or_taken_stay_so() -> None:
    def taken(*_: object) -> None:
        raise AssertionError

    for handler in (signal.SIG_IGN, taken):  # as nohup leaves them, or a program that calls the command
        before = signal.signal(signal.SIGHUP, handler)
        try:
            with console.ended_by_signals():
                assert signal.getsignal(signal.SIGHUP) is handler
                assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
            assert signal.getsignal(signal.SIGHUP) is handler
        finally:
            signal.signal(signal.SIGHUP, before)


def test_the_library_takes_no_signals(narrow: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(number) for number in ENDING]
    TextToVideoPipeline.from_pretrained(narrow.bundle)("a ball", num_inference_steps=1)
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(cli.main(["inspect", str(narrow.bundle)])))
    thread.start()  # where Python lets nobody take one
    thread.join()
    assert codes == [0]
    assert [signal.getsignal(number) for number in ENDING] == before
