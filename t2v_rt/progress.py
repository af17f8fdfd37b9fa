"""Progress bars on standard error; nothing where that is not a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Self

from t2v_rt.system.files import is_terminal

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

Tell = Callable[[str, int, int], None]
UNITS = 1000  # that a build is told in
TESTED, HASHED = 0.1, 0.02  # of the time that parts take: their self-test, and what comes last


class Shares:
    """Tells how much of a build is done: parts count by their bytes.

    Args:
        tell: called as `f(step, done, total)`, or None.
        sizes: name and bytes of each part, in the order they are made; after a component's, its self-test comes.
    """

    def __init__(self, tell: Tell | None, sizes: Sequence[tuple[str, int]]) -> None:
        self._tell = tell
        total = sum(size for _, size in sizes) or 1
        self._shares: dict[str, float] = {}
        for component in dict.fromkeys(name.partition(".")[0] for name, _ in sizes):
            own = {name: size / total for name, size in sizes if name.partition(".")[0] == component}
            self._shares |= {**own, f"self_test.{component}": TESTED * sum(own.values())}
        self._shares |= {"hash": HASHED, "done": 0.0}

    def __call__(self, name: str, fraction: float = 0.0) -> None:
        """Tells that a fraction of a part or step is done, and everything before it."""
        if self._tell is None:
            return
        names = list(self._shares)
        before = sum(self._shares[other] for other in names[: names.index(name)])
        done = (before + fraction * self._shares[name]) / sum(self._shares.values())
        self._tell(name.partition(".")[0], round(UNITS * done), UNITS)


class Bars:
    """One bar per stage, made when the stage begins."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        if is_terminal(sys.stderr):
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (TextColumn("{task.description:20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._progress = Progress(*columns, console=Console(stderr=True))
            self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._progress is not None:
            with suppress(OSError, ValueError):  # the terminal is gone
                self._progress.stop()

    def update(self, stage: str, done: int, total: int, *, detail: str = "") -> None:
        """Moves a stage's bar."""
        if self._progress is None:
            return
        label = f"{stage} {detail}".strip()
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(label, total=total)
        self._progress.update(self._tasks[stage], completed=done, total=total, description=label)
