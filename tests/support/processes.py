"""Commands in processes of their own that are met at a chosen place, so that no test waits for a time."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

MET = """
import signal
import sys
from t2v_rt.cli import main
from t2v_rt.commands.bars import Bars

place, calls = sys.argv[1], int(sys.argv[2])
# what a shell ignores in its background, nohup too, would be ignored here as well
signal.signal(signal.SIGINT, signal.default_int_handler)
for name in {"SIGTERM", "SIGHUP"} & set(signal.Signals.__members__):
    signal.signal(signal.Signals[name], signal.SIG_DFL)


def update(self, stage, done, total, *, detail=""):
    global calls
    calls -= place in (stage, detail)
    if place in (stage, detail) and not calls:
        print("here", flush=True)
        sys.stdin.readline()  # until the test writes a line; at once where there is no input


Bars.update = update
sys.exit(main(sys.argv[3:]))
"""


def start_and_meet(
    *command: str, at: str, call: int = 1, goes_on: bool = False, **settings: Any
) -> subprocess.Popen[str]:
    """Starts a command of t2v-rt and returns once it has reached a place.

    Args:
        command: the arguments of `t2v-rt`.
        at: a stage of a video, or a step of a build, whose progress it tells.
        call: which of its reports of that place is waited for.
        goes_on: whether it goes on from there at once; else it stands until it is ended.
        settings: of the process.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", MET, at, str(call), *command],
        stdin=subprocess.DEVNULL if goes_on else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **settings,
    )
    assert process.stdout is not None
    if process.stdout.readline() != "here\n":
        _, errors = process.communicate()
        raise AssertionError(f"the command ended before it reached {at}: {errors}")
    return process
