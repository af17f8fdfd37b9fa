"""The one place that times: calls in turn, what of them is reported, and how far two sets of times are apart."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

MAD_TO_SIGMA = 1.4826  # of a normal distribution: standard deviation over the median absolute deviation
MEDIAN_ERROR = 1.2533  # of a normal distribution: standard error of the median over that of the mean


@dataclass(frozen=True)
class Summary:
    """What is reported of a stage's times.

    Args:
        count: measured times.
        min: the least, in seconds like all that follow but `spread`.
        mean: the arithmetic mean.
        p50: the least measured time that half of them do not exceed; no value between two measured ones is made up.
        p90: the least measured time that 90 % of them do not exceed.
        p99: the least measured time that 99 % of them do not exceed; the longest where there are fewer than 100.
        max: the longest.
        spread: standard deviation over the median, estimated from the median absolute deviation, so that one outlier
            does not count.
    """

    count: int
    min: float
    mean: float
    p50: float
    p90: float
    p99: float
    max: float
    spread: float


def summarize(times: Sequence[float]) -> Summary:
    """Summarizes times in seconds; at least one."""
    ordered = sorted(times)
    p50, p90, p99 = (ordered[max(0, math.ceil(share * len(ordered)) - 1)] for share in (0.5, 0.9, 0.99))
    mean = statistics.fmean(ordered)
    return Summary(len(ordered), ordered[0], mean, p50, p90, p99, ordered[-1], spread(ordered))


def spread(values: Sequence[float]) -> float:
    """The standard deviation over the median, from the median absolute deviation; 0 of a single value."""
    middle = statistics.median(values)
    deviation = statistics.median(abs(value - middle) for value in values)
    return MAD_TO_SIGMA * deviation / middle if middle else 0.0


def median_error(values: Sequence[float]) -> float:
    """How uncertain the median is: its standard error over the median."""
    return MEDIAN_ERROR * spread(values) / math.sqrt(len(values))


def seconds(call: Callable[[], object]) -> float:
    """Wall time of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def alternate(
    ways: Mapping[str, Callable[[], object]], rounds: int, warmups: int = 1, timed: Callable[..., float] = seconds
) -> dict[str, list[float]]:
    """Runs several ways in turn, so that whatever slows the machine for a while slows all of them.

    Args:
        ways: name -> call.
        rounds: measured calls of each.
        warmups: calls of each before, in turn too, that are not counted.
        timed: gives the seconds of a call.

    Returns:
        Name -> seconds, in the order of the rounds: those of one round belong together.
    """
    for _ in range(warmups):
        for call in ways.values():
            timed(call)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, call in ways.items():
            times[name].append(timed(call))
    return times


def ratio(times: Sequence[float], of: Sequence[float]) -> dict[str, float]:
    """How many times as long one way takes as another that was measured in turn with it.

    Args:
        times: of the one.
        of: times of the other, in the same rounds.

    Returns:
        `median` of the rounds' ratios, and `low` and `high`, from which on it would be off by two standard errors.
    """
    ratios = [one / other for one, other in zip(times, of, strict=True)]
    middle, error = statistics.median(ratios), median_error(ratios)
    return {"median": middle, "low": middle / (1 + 2 * error), "high": middle * (1 + 2 * error)}


def as_json(summary: Summary) -> dict[str, float]:
    """A summary as plain JSON values."""
    return asdict(summary)
