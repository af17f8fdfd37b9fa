"""A process for each peer: so that peaks of memory are its own, and one peer's threads and allocator are no other's."""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import sys
import time
import tracemalloc
import warnings
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

import numpy as np
import psutil

from t2v_rt.benchmarks.peers import Runner, peer
from t2v_rt.benchmarks.workloads import Job
from t2v_rt.errors import T2VError
from t2v_rt.system.resources import peak_rss_bytes

END_SECONDS = 30.0  # that a process has to end by itself
PROTECTED = (KeyboardInterrupt, SystemExit)


class Worker:
    """A peer in a process of its own; made to answer one question after another.

    Args:
        name: of the peer.
        job: to do.
        settings: environment of the process, such as the threads of NumPy's products.

    Raises:
        T2VError: the peer could not be opened; says why.
    """

    def __init__(self, name: str, job: Job, settings: Mapping[str, str] | None = None) -> None:
        self.name = name
        self._connection, theirs = multiprocessing.get_context("spawn").Pipe()
        self._process = multiprocessing.get_context("spawn").Process(
            target=serve, args=(theirs, name, job, dict(settings or {})), daemon=True
        )
        self._process.start()
        theirs.close()
        try:
            self.opened = self._answer()
        except BaseException:
            self.close()
            raise

    def ask(self, question: str, *arguments: Any) -> Any:
        """The answer to a question; raises T2VError where there is none."""
        try:
            self._connection.send((question, *arguments))
        except OSError as exc:
            raise self._ended() from exc
        return self._answer()

    def _answer(self) -> Any:
        try:
            good, answer = self._connection.recv()
        except (EOFError, OSError) as exc:
            raise self._ended() from exc
        if not good:
            raise T2VError(str(answer))
        return answer

    def _ended(self) -> T2VError:
        self._process.join(END_SECONDS)
        code = self._process.exitcode
        why = "most likely for lack of memory" if code == -9 else "see what it printed"
        return T2VError(f"{self.name}: its process ended with exit code {code}; {why}")

    def close(self) -> None:
        """Ends the process."""
        self._connection.close()  # which ends its loop
        self._process.join(END_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def serve(connection: Connection, name: str, job: Job, settings: Mapping[str, str]) -> None:
    """What the process does: opens the peer and answers until nobody asks any more."""
    os.environ.update(settings)
    sys.stdout.flush()
    os.dup2(2, 1)  # what libraries print must not mix with a report on standard output
    warnings.simplefilter("ignore")
    runner: list[Runner] = []

    def opening() -> dict[str, Any]:
        before = psutil.Process().memory_info().rss
        start = time.perf_counter()
        runner.append(peer(name).open(job))
        return {"seconds": time.perf_counter() - start, "rss_bytes_before": before, "pid": os.getpid()}

    _answer(connection, opening)
    while runner:
        try:
            question, *arguments = connection.recv()
        except (EOFError, OSError):
            break
        _answer(connection, lambda: QUESTIONS[question](runner[0], *arguments))  # noqa: B023  # called at once
    for item in runner:
        item.close()


def _answer(connection: Connection, work: Callable[[], Any]) -> None:
    try:
        connection.send((True, work()))
    except PROTECTED:
        raise
    except Exception as exc:
        text = " ".join(str(exc).split())
        connection.send((False, text if isinstance(exc, T2VError) else f"{type(exc).__name__}: {text[:500]}"))


def run_once(runner: Runner, output: str | None = None) -> dict[str, Any]:
    """One run: seconds, stages, memory afterwards; its result goes into a file where one is named."""
    runner.prepare()
    start = time.perf_counter()
    result = runner.run()
    taken = time.perf_counter() - start
    if output is not None:
        np.save(output, result)
    return {
        "seconds": taken,
        "stages": {name: list(values) for name, values in runner.stages().items()},
        "rss_bytes": psutil.Process().memory_info().rss,
    }


def facts(runner: Runner) -> dict[str, Any]:
    """What the peer tells of itself, and the most memory its process has held."""
    return {**runner.facts(), "peak_rss_bytes": peak_rss_bytes()}


def allocations(runner: Runner) -> dict[str, int]:
    """What a run allocates in Python and NumPy: the most at once, and what it leaves; not what engines do.

    Tracing slows a run several times over, so this is a run of its own.
    """
    runner.prepare()
    gc.collect()
    tracemalloc.start()
    try:
        result = runner.run()
        size = result.nbytes
        _, peak = tracemalloc.get_traced_memory()
        del result
        gc.collect()
        held, _ = tracemalloc.get_traced_memory()
        runner.prepare()
        runner.run()
        gc.collect()
        left = tracemalloc.get_traced_memory()[0] - held  # by one more run
    finally:
        tracemalloc.stop()
    return {"most_bytes": peak, "result_bytes": size, "left_bytes": left}


def reopen(runner: Runner, name: str, job: Job) -> float:
    """Seconds that opening takes once more, nothing loaded, beside the one that is open."""
    start = time.perf_counter()
    twin = peer(name).open(job)
    taken = time.perf_counter() - start
    twin.close()
    return taken


QUESTIONS: Mapping[str, Callable[..., Any]] = {
    "run": run_once,
    "facts": facts,
    "allocations": allocations,
    "reopen": reopen,
}


def in_process(target: str, *arguments: Any, settings: Mapping[str, str] | None = None) -> Any:
    """The result of a function that runs in a process of its own, such as one whose threads are set by its environment.

    Args:
        target: `module:function`.
        arguments: of the function.
        settings: environment of the process.

    Raises:
        T2VError: it failed; says why.
    """
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=_call, args=(theirs, target, arguments, dict(settings or {})), daemon=True
    )
    process.start()
    theirs.close()
    try:
        good, answer = ours.recv()
    except EOFError:
        process.join()
        raise T2VError(f"{target}: its process ended with exit code {process.exitcode}") from None
    process.join(END_SECONDS)
    if not good:
        raise T2VError(str(answer))
    return answer


def _call(connection: Connection, target: str, arguments: tuple[Any, ...], settings: Mapping[str, str]) -> None:
    os.environ.update(settings)
    module, _, name = target.partition(":")
    _answer(connection, lambda: getattr(importlib.import_module(module), name)(*arguments))


def result_file(folder: Path, name: str) -> str:
    """Where a peer's result is kept for comparison."""
    return str(folder / f"{name.replace('.', '-')}.npy")
