"""Progress bars on standard error; nothing where that is not a terminal."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Self

from t2v_rt.system.files import is_terminal

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


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
