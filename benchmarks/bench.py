"""A measurement: each workload by t2v-rt and its peers in turn, results first, then times, memory and bounds."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from t2v_rt.benchmarks import bounds
from t2v_rt.benchmarks.cards import CardMemory
from t2v_rt.benchmarks.machine import describe_machine
from t2v_rt.benchmarks.options import BenchOptions
from t2v_rt.benchmarks.peers import OURS, YARDSTICK, peer
from t2v_rt.benchmarks.stage_times import COUNTED
from t2v_rt.benchmarks.timing import as_json, ratio, summarize
from t2v_rt.benchmarks.worker import Worker, result_file
from t2v_rt.benchmarks.workloads import CALL, WORKLOADS, Job, psnr, relative_error
from t2v_rt.engines.bundle.store import Bundle, open_bundle
from t2v_rt.errors import InputError, T2VError

logger = logging.getLogger(__name__)
KIND, SCHEMA = "t2v-rt bench", 1
OPENINGS = 5  # of the bundle, beside the one that runs
CONVENTIONS = (
    "Each peer runs in a process of its own, one at a time, in turn with the others, from the same noise.",
    "The first call is told apart: it loads engines and allocates. Then come runs that are not counted, then the "
    "measured ones. A percentile is the least measured value that so many per cent do not exceed.",
    "Latency is that of one video after another (MLPerf's SingleStream, whose figure is p90, and fixed latents, are "
    "followed; this is no MLPerf result). Throughput is runs over the time that they took.",
    "Results are compared before times: where they are further apart than the precision explains, no ratio is told.",
    "Beside each round a yardstick is taken, a few matrix products of one thread: it tells how much of the machine "
    "could be had, and compare takes it into account.",
    "Nothing that a call made is reused by the next one: prompt embeddings are forgotten before each run.",
)
Progress = Callable[[str, int, int], None]


def bench(options: BenchOptions, progress: Progress | None = None) -> dict[str, Any]:
    """Measures a bundle.

    Args:
        options: what is asked for.
        progress: called as `f(workload, done, total)` after each round.

    Returns:
        A report of plain JSON values: `machine`, `bundle`, `settings`, `conventions`, `counted` (stage -> what it
        is), `workloads` (name -> what was found).

    Raises:
        T2VError: the bundle cannot be used, or t2v-rt itself failed; a peer that does is told in the report.
    """
    bundle = open_bundle(options.bundle)
    manifest = bundle.manifest
    jobs = {name: options.job(manifest, WORKLOADS[name]) for name in options.workload}
    tell = progress or (lambda stage, done, total: None)
    found = {name: Measurement(bundle, name, job, options, tell).run() for name, job in jobs.items()}
    stages = {stage for item in found.values() for stage in item["runners"][OURS]["stages"]} | {"open"}
    return {
        "kind": KIND,
        "schema": SCHEMA,
        "machine": describe_machine(),
        "bundle": {
            "id": manifest.bundle_id,
            "family": manifest.model.family,
            "backend": manifest.backend,
            "precision": manifest.precision,
        },
        "settings": options.settings(),
        "conventions": list(CONVENTIONS),
        "counted": {stage: text for stage, text in COUNTED.items() if stage in stages},
        "workloads": found,
    }


class Measurement:
    """One workload.

    Args:
        bundle: that is measured.
        name: of the workload.
        job: its work.
        options: runs, warm-ups, peers.
        tell: of each round.
    """

    def __init__(self, bundle: Bundle, name: str, job: Job, options: BenchOptions, tell: Progress) -> None:
        self.bundle, self.name, self.job, self.options, self.tell = bundle, name, job, options, tell
        self.missing: dict[str, str] = {}
        self.first: dict[str, dict[str, Any]] = {}
        self.runs: dict[str, list[dict[str, Any]]] = {}
        self.measured: list[float] = []  # of the yardstick

    def run(self) -> dict[str, Any]:
        """Measures, and reports."""
        with ExitStack() as stack:
            card = stack.enter_context(CardMemory())
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            workers = self._open(stack)
            outputs = self._first_calls(workers, folder)
            facts = workers[OURS].ask("facts")
            counted, why = self._work(facts)
            before = self._rates(counted)
            taken = self._rounds(workers)
            rates = {"before": before, "after": self._rates(counted)}
            facts = {name: worker.ask("facts") for name, worker in workers.items()}
            runners = {name: self._runner(worker, facts[name]) for name, worker in workers.items()}
            runners[OURS]["allocations"] = workers[OURS].ask("allocations")
            openings = [workers[OURS].ask("reopen", OURS, self.job) for _ in range(OPENINGS)]
            runners[OURS]["stages"]["open"] = _stage([[taken] for taken in openings])
        ours = facts[OURS]
        counted, _ = self._work(ours)
        return {
            **self._what(ours),
            "runners": {**runners, **{name: {"missing": text} for name, text in self.missing.items()}},
            "outputs": outputs,
            "ratios": self._ratios(outputs),
            "throughput": self._throughput(taken),
            "card": None if card.peak_bytes is None else {"peak": card.peak_bytes, "before": card.before_bytes},
            "plan": ours.get("plan"),
            "yardstick": self.measured,
            "rates": rates,
            "bounds": {"missing": why}
            if counted is None
            else {"rows": bounds.shares(counted, bounds.better(*rates.values()))},
        }

    def _what(self, ours: Mapping[str, Any]) -> dict[str, Any]:
        job, known = self.job, WORKLOADS[self.name]
        return {
            "kind": job.kind,
            "text": known.text,
            "height": job.height,
            "width": job.width,
            "num_frames": job.num_frames,
            "tokens": job.tokens(self.bundle.manifest.model),
            **({"num_inference_steps": job.num_inference_steps, "guidance_scale": job.guidance_scale}
               if job.kind == CALL else {}),
            **{name: ours[name] for name in ("frames_sha256", "one_batch") if name in ours},
        }  # fmt: skip

    def _open(self, stack: ExitStack) -> dict[str, Worker]:
        """The processes, t2v-rt's first; peers that cannot be had are taken down with the reason."""
        workers = {}
        self.yardstick = stack.enter_context(Worker(YARDSTICK, self.job, dict.fromkeys(bounds.THREADS, "1")))
        settings = {} if self.job.threads is None else dict.fromkeys(bounds.THREADS, str(self.job.threads))
        for name in (OURS, *self.options.peer):
            try:
                why = peer(name).missing(self.job)
                if not why:
                    workers[name] = stack.enter_context(Worker(name, self.job, settings))
                    continue
            except T2VError as exc:
                if name == OURS:
                    raise
                why = str(exc)
            self.missing[name] = why
            logger.warning("%s is not measured: %s", name, why)
        return workers

    def _first_calls(self, workers: dict[str, Worker], folder: Path) -> dict[str, Any]:
        """The first call of each, and how far the results are from t2v-rt's; a peer that fails is left out."""
        outputs: dict[str, Any] = {}
        for name, worker in list(workers.items()):
            try:
                self.first[name] = worker.ask("run", result_file(folder, name))
            except T2VError as exc:
                if name == OURS:
                    raise
                self.missing[name] = str(exc)
                logger.warning("%s is not measured: %s", name, exc)
                del workers[name]
                continue
            if name != OURS:
                found, expected = (np.load(result_file(folder, item)) for item in (name, OURS))
                error, tolerance = relative_error(found, expected), peer(name).tolerance
                outputs[name] = {
                    "error": error if np.isfinite(error) else None,
                    "tolerance": tolerance if np.isfinite(tolerance) else None,
                    "same": bool(error <= tolerance),
                    "psnr_db": psnr(found, expected) if self.job.kind == CALL else None,
                }
        return outputs

    def _rounds(self, workers: Mapping[str, Worker]) -> float:
        """Warm-ups and measured runs, in turn; seconds of t2v-rt's measured runs together."""
        options = self.options
        self.runs = {name: [] for name in workers}
        for _ in range(options.warmup):
            for worker in (self.yardstick, *workers.values()):
                worker.ask("run")
        start, done = time.perf_counter(), 0
        while done < options.runs or time.perf_counter() - start < (options.duration or 0):
            self.measured.append(self.yardstick.ask("run")["seconds"])
            for name, worker in workers.items():
                self.runs[name].append(worker.ask("run"))
            done += 1
            self.tell(self.name, min(done, options.runs), options.runs)
        return float(sum(run["seconds"] for run in self.runs[OURS]))

    def _runner(self, worker: Worker, facts: Mapping[str, Any]) -> dict[str, Any]:
        name = worker.name
        runs, first = self.runs[name], self.first[name]
        stages: dict[str, list[list[float]]] = {"run": [[run["seconds"]] for run in runs]}
        for stage in runs[0]["stages"]:
            stages[stage] = [run["stages"].get(stage, []) for run in runs]
        return {
            "open_seconds": facts.get("open_seconds", worker.opened["seconds"]),
            "first": {"seconds": first["seconds"], "stages": {k: sum(v) for k, v in first["stages"].items()}},
            "stages": {stage: _stage(times) for stage, times in stages.items() if any(times)},
            "memory": {
                "before_bytes": worker.opened["rss_bytes_before"],
                "first_bytes": first["rss_bytes"],
                "last_bytes": runs[-1]["rss_bytes"],
                "growth": runs[-1]["rss_bytes"] / runs[0]["rss_bytes"] - 1,
                "peak_bytes": facts["peak_rss_bytes"],
            },
            "facts": {k: v for k, v in facts.items() if k not in ("plan", "peak_rss_bytes", "open_seconds")},
        }

    def _work(self, facts: Mapping[str, Any]) -> tuple[list[Any] | None, str]:
        """The work of t2v-rt's engine calls, or why it is not known."""
        try:
            return bounds.works(self.bundle, facts["engine_calls"]), ""
        except InputError as exc:
            return None, str(exc)

    def _rates(self, counted: list[Any] | None) -> dict[str, Any]:
        matrices = bounds.largest_matrices(counted) if counted else []
        return bounds.measure_rates(matrices or bounds.MATRICES, self.job.threads)

    def _ratios(self, outputs: Mapping[str, Any]) -> dict[str, Any]:
        """How many times as long as t2v-rt each peer takes, of those whose results are the same."""
        ours = [run["seconds"] for run in self.runs[OURS]]
        return {
            name: ratio([run["seconds"] for run in runs], ours)
            for name, runs in self.runs.items()
            if name != OURS and outputs[name]["same"]
        }

    def _throughput(self, taken: float) -> dict[str, float]:
        rate = len(self.runs[OURS]) / taken
        frames = {"frames_per_second": rate * self.job.num_frames} if self.job.kind == CALL else {}
        return {"runs_per_hour": 3600 * rate, **frames}


def _stage(runs: list[list[float]]) -> dict[str, Any]:
    """A stage's times: each run's, and what they come to."""
    return {"runs": runs, **as_json(summarize([value for run in runs for value in run]))}
