"""How much of a build is done, told as it goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Progress = Callable[[str, int, int], None]
UNITS = 1000  # that a build is told in
TESTED, HASHED = 0.1, 0.02  # of the time that parts take: their self-test, and what comes last


class Shares:
    """Tells how much of a build is done: parts count by their bytes.

    Args:
        tell: called as `f(step, done, total)`, or None.
        sizes: name and bytes of each part, in the order they are made; after a component's, its self-test comes.
    """

    def __init__(self, tell: Progress | None, sizes: Sequence[tuple[str, int]]) -> None:
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
