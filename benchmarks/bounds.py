"""What this machine can do at most, measured: matrix products and copies; and how near to it each engine call comes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from t2v_rt.benchmarks.work import Work, count
from t2v_rt.benchmarks.worker import in_process
from t2v_rt.engines.bundle.store import Bundle
from t2v_rt.errors import InputError

Matrix = tuple[int, int, int]  # rows, inner, columns
MATRICES: tuple[Matrix, ...] = ((768, 1536, 1536), (768, 1536, 8960), (1920, 1536, 1536))  # where no graph says better
MOST_ROWS = 2048  # of a product that is measured: from there on the rate stays
# of each shape, after one that warms up; the best counts: a limit is what the machine can do when left alone
TIMED = 9
LEAST_SECONDS = 0.01  # of a timed piece: products that are shorter are repeated
COPIED = 128 << 20  # bytes, more than a processor's caches hold
THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")  # of NumPy's products
GIGA = 1e9


def measure_rates(matrices: Sequence[Matrix] = MATRICES, threads: int | None = None) -> dict[str, Any]:
    """The rates of this machine, in a process of its own.

    Args:
        matrices: (rows, inner, columns) of the products.
        threads: of NumPy; None for as many as it takes.

    Returns:
        `matmul_gflops`, that of the best shape; `copy_gbytes`, bytes read and written a second, in 1e9;
        `shapes`: each one's rate.
    """
    settings = {} if threads is None else dict.fromkeys(THREADS, str(threads))
    found: dict[str, Any] = in_process("t2v_rt.benchmarks.bounds:rates_here", list(matrices), settings=settings)
    return found


def rates_here(matrices: Sequence[Matrix]) -> dict[str, Any]:
    """What `measure_rates` does in that process."""
    shapes = {}
    for rows, inner, columns in dict.fromkeys((min(rows, MOST_ROWS), *rest) for rows, *rest in matrices):
        shapes[f"{rows}x{inner}x{columns}"] = _matmul(rows, inner, columns) / GIGA
    return {"matmul_gflops": max(shapes.values()), "copy_gbytes": _copy() / GIGA, "shapes": shapes}


def _matmul(rows: int, inner: int, columns: int) -> float:
    """Operations a second of float32 products of one shape."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((rows, inner), np.float32), rng.standard_normal((inner, columns), np.float32)
    out = np.empty((rows, columns), np.float32)
    start = time.perf_counter()
    np.matmul(a, b, out=out)
    repeats = max(1, round(LEAST_SECONDS / max(time.perf_counter() - start, 1e-9)))
    times = []
    for _ in range(TIMED):
        start = time.perf_counter()
        for _ in range(repeats):
            np.matmul(a, b, out=out)
        times.append((time.perf_counter() - start) / repeats)
    return 2 * rows * inner * columns / min(times)


def _copy() -> float:
    """Bytes a second, those read and those written, of copies by one thread."""
    source, target = np.ones(COPIED, np.uint8), np.zeros(COPIED, np.uint8)
    times = []
    for _ in range(TIMED):
        start = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - start)
    return 2 * COPIED / min(times)


def better(*rates: Mapping[str, Any]) -> dict[str, Any]:
    """Of rates that were measured before and after, the higher ones: others may have had the machine meanwhile."""
    return {name: max(item[name] for item in rates) for name in ("matmul_gflops", "copy_gbytes")}


def works(bundle: Bundle, calls: Iterable[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], Work]]:
    """The engine calls of a run, as `PipelineRunner.facts` tells them, each with its work.

    Raises:
        InputError: onnx is missing, or the bundle holds no graphs.
    """
    components = bundle.manifest.components
    found = []
    for call in calls:
        graph = components[call["component"]].graphs[call["role"]]
        if graph.plan is not None:
            raise InputError("the bundle holds plans, whose work cannot be counted; measure one of graphs")
        found.append((call, count(Path(bundle.folder) / graph.path, graph, call["sizes"])))
    return found


def largest_matrices(counted: Iterable[tuple[Mapping[str, Any], Work]], most: int = 3) -> list[Matrix]:
    """The shapes of products that most operations are in; those of a machine's rate."""
    sums: dict[Matrix, int] = {}
    for call, work in counted:
        for matrix, operations in work.matrices.items():
            sums[matrix] = sums.get(matrix, 0) + operations * call["calls"]
    return sorted(sums, key=lambda matrix: -sums[matrix])[:most]


def shares(counted: Iterable[tuple[Mapping[str, Any], Work]], rates: Mapping[str, Any]) -> list[dict[str, Any]]:
    """How near to the machine's limit each component comes.

    Args:
        counted: of `works`.
        rates: of `measure_rates`.

    Returns:
        A row for each component: operations, bytes, seconds, and the `limit_seconds` that the same work takes where
        either all operations run at the measured rate of products or all bytes move at that of copies, whichever is
        longer; `share` is that limit over the seconds.
    """
    rows: dict[str, dict[str, Any]] = {}
    for call, work in counted:
        names = ("products", "attention", "convolutions", "bytes")
        row = rows.setdefault(call["component"], dict.fromkeys((*names, "seconds", "limit_seconds"), 0))
        for name in names:
            row[name] += getattr(work, name) * call["calls"]
        row["seconds"] += call["seconds"]
        compute = work.flops / (rates["matmul_gflops"] * GIGA)
        row["limit_seconds"] += call["calls"] * max(compute, work.bytes / (rates["copy_gbytes"] * GIGA))
    for row in rows.values():
        row["gflops"] = (row["products"] + row["attention"] + row["convolutions"]) / row["seconds"] / GIGA
        row["share"] = row["limit_seconds"] / row["seconds"]
    return [{"component": name, **row} for name, row in rows.items()]
