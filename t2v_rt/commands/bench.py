"""The bench command: a bundle measured stage by stage and beside peers, and two results judged."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from t2v_rt.benchmarks.bench import bench
from t2v_rt.benchmarks.compare import compare
from t2v_rt.benchmarks.compare import describe as describe_verdicts
from t2v_rt.benchmarks.options import BenchOptions
from t2v_rt.benchmarks.page import check_folder, lines, write_page
from t2v_rt.benchmarks.results import read
from t2v_rt.commands.bars import Bars
from t2v_rt.commands.parsing import declare_options, given_options
from t2v_rt.errors import RegressionError, RequestError

COMPARE = "compare"
EXAMPLE = "example: t2v-rt bench build/demo --runs 5 --output build/bench; t2v-rt bench compare A.json B.json"


def declare(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.epilog = EXAMPLE
    declare_options(parser, BenchOptions)
    parser.add_argument(
        "results", nargs="*", metavar="JSON", help="two results of t2v-rt bench, after the word compare: old and new"
    )


def run(parsed: argparse.Namespace) -> dict[str, Any]:
    """Measures, or compares; returns the report."""
    if parsed.bundle == COMPARE:
        return _compare(parsed)
    if parsed.results:
        raise RequestError(f"{parsed.results[0]!r} is one word too many; give one BUNDLE, or compare A.json B.json")
    options = BenchOptions(**given_options(BenchOptions, parsed))
    if options.output is not None:
        check_folder(options.output)
    with Bars() as bars:
        report = bench(options, bars.update)
    if options.output is not None:
        report["written"] = [str(path) for path in write_page(report, options.output)]
    return report


def _compare(parsed: argparse.Namespace) -> dict[str, Any]:
    """Judges the second result; raises RegressionError, with the verdicts, where something became worse."""
    given = given_options(BenchOptions, parsed).keys() - {"bundle"}
    if given:
        raise RequestError(f"compare takes no option --{min(given).replace('_', '-')}; leave it out")
    if len(parsed.results) != 2:
        raise RequestError(f"compare was given {len(parsed.results)} results; give two, the old one first")
    before, after = (read(path) for path in parsed.results)
    report = compare(before, after)
    if report["worse"]:
        worst = max(report["worse"], key=lambda row: float(row["ratio"]))
        raise RegressionError(
            f"{parsed.results[1]} is worse in {len(report['worse'])} of {len(report['rows'])} rows, most in "
            f"{worst['workload']}, {worst['stage']}: {worst['ratio']:.2f} times as much; see the table",
            report,
        )
    return report


def describe(report: Mapping[str, Any]) -> list[str]:
    """The figures, or the verdicts, for a person."""
    return describe_verdicts(report) if "rows" in report else lines(report)
