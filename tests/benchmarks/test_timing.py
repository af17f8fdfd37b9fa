"""How times are summarized, and how calls take turns."""

from __future__ import annotations

import pytest

from t2v_rt.benchmarks.cards import read_cards
from t2v_rt.benchmarks.recorder import ENGINE, MARK, SCHEDULER, Event
from t2v_rt.benchmarks.stage_times import stage_times
from t2v_rt.benchmarks.timing import alternate, ratio, spread, summarize


def test_percentiles_are_measured_values_and_never_between_two() -> None:
    times = [float(value) for value in range(1, 11)]
    found = summarize(times)
    assert (found.count, found.min, found.max, found.mean) == (10, 1.0, 10.0, 5.5)
    assert (found.p50, found.p90, found.p99) == (5.0, 9.0, 10.0)
    one = summarize([2.5])
    assert (one.p50, one.p99, one.spread) == (2.5, 2.5, 0.0)


def test_one_outlier_does_not_widen_the_spread() -> None:
    calm = [1.0, 1.01, 0.99, 1.02, 0.98]
    assert spread([*calm, 50.0]) < 3 * spread(calm)


def test_ways_take_turns_after_warming_up() -> None:
    log: list[str] = []
    taken = iter(range(100))

    def timed(call: object) -> float:
        assert callable(call)
        call()
        return float(next(taken))

    times = alternate({name: lambda name=name: log.append(name) for name in "ab"}, 3, 2, timed)  # type: ignore[misc]
    assert log == ["a", "b"] * 5
    assert times == {"a": [4.0, 6.0, 8.0], "b": [5.0, 7.0, 9.0]}


def test_a_ratio_is_the_median_of_the_rounds_so_that_a_slow_minute_hits_both() -> None:
    found = ratio([2.0, 20.0, 2.2], [1.0, 10.0, 1.1])
    assert found["median"] == pytest.approx(2.0)
    assert found["low"] == found["high"] == pytest.approx(2.0)
    wide = ratio([1.0, 3.0, 2.0], [1.0, 1.0, 1.0])
    assert 0 < wide["low"] < wide["median"] < wide["high"]


def test_a_step_is_split_by_who_ran_in_it() -> None:
    def event(kind: str, name: str, start: float, end: float) -> Event:
        return Event(kind, name, start, end)

    events = [
        event(MARK, "encode", 1.0, 1.0),
        event(ENGINE, "text_encoder", 1.5, 2.5),
        event(MARK, "encode", 3.0, 3.0),
        event(ENGINE, "transformer", 4.0, 6.0),
        event(ENGINE, "transformer", 6.0, 7.0),
        event(SCHEDULER, "Some", 7.5, 8.5),
        event(MARK, "denoise", 9.0, 9.0),
        event(SCHEDULER, "Some", 9.5, 10.0),  # a step that the step cache foretold
        event(MARK, "denoise", 10.0, 10.0),
        event(ENGINE, "vae_decoder", 10.5, 11.5),
        event(MARK, "decode", 12.0, 12.0),
        event(MARK, "decode", 14.0, 14.0),
    ]
    found = stage_times(events, 0.0, 15.0)
    assert found["call"] == [15.0]
    assert (found["encode"], found["encode engines"]) == ([2.0], [1.0])
    assert (found["step"], found["step engines"], found["step outside"]) == ([6.0, 1.0], [3.0, 0.0], [3.0, 1.0])
    assert (found["step guidance"], found["step scheduler"]) == ([0.5, 0.5], [1.0, 0.5])
    assert (found["decode first"], found["decode next"], found["decode"]) == ([2.0], [2.0], [4.0])
    assert found["outside"] == [15.0 - 5.0]


def test_cards_are_read_as_the_driver_prints_them() -> None:
    text = "NVIDIA GeForce RTX 4060, 570.86.15, 8188, 115.00, 1830, 3105, 8501, 8501, 44\nlost, line\n"
    (card,) = read_cards(text)
    assert card["name"] == "NVIDIA GeForce RTX 4060"
    assert (card["driver"], card["power_limit_watts"], card["most_sm_clock_mhz"]) == ("570.86.15", 115.0, 3105.0)
    (silent,) = read_cards("NVIDIA X, 570.1.2, 8188, [N/A], 1830, 3105, [Not Supported], 8501, 44\n")
    assert silent["power_limit_watts"] is None
    assert silent["memory_clock_mhz"] is None
