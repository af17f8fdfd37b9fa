"""Builds one plan in a process of its own: `python -m t2v_rt.engines.tensorrt.worker`.

Compiling is one long native call that nothing can interrupt, that takes several times the weights in memory, and whose
crash would be the caller's. So it runs in a child process: an interruption ends it at once, and its memory goes back.

The job comes as one line of JSON on standard input, which stays open: its end means that the parent is gone. Lines of
JSON go out: {"fraction"} now and then, and last {"result"} or {"error"}.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from t2v_rt.engines.tensorrt.attention import check_attention, prepare_attention
from t2v_rt.engines.tensorrt.libraries import Library, load_library
from t2v_rt.engines.tensorrt.plan_text import read_plan
from t2v_rt.errors import EngineError, T2VError
from t2v_rt.system.files import create_private
from t2v_rt.system.resources import peak_rss_bytes

CONTEXT = re.compile(r"Total Activation Memory: (\d+) bytes")  # said once for each shape profile
WEIGHTS = re.compile(r"Total Weights Memory: (\d+) bytes")
NOT_FUSED = "Attention operation was not supported by a dedicated kernel"  # so the library says
Report = Callable[[float], None]


def make_log(trt: Any) -> Any:
    """A logger that keeps errors and the memory that the builder tells."""

    class BuilderLog(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.context_bytes: list[int] = []
            self.weights_bytes = 0

        def log(self, severity: Any, msg: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(msg)
            elif found := CONTEXT.search(msg):
                self.context_bytes.append(int(found[1]))
            elif found := WEIGHTS.search(msg):
                self.weights_bytes = int(found[1])

    return BuilderLog()


def make_monitor(trt: Any, report: Report) -> Any:
    """A progress monitor that reports the fraction of all steps done, phases within phases counted as parts of one."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._phases: dict[str, list[int]] = {}  # name -> steps done, steps in all; outermost first
            self._most = 0.0

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._phases[phase_name] = [0, max(1, num_steps)]

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self._phases:
                self._phases[phase_name][0] = step + 1
                self._tell()
            return True

        def phase_finish(self, phase_name: str) -> None:
            self._phases.pop(phase_name, None)

        def _tell(self) -> None:
            fraction, share = 0.0, 1.0
            for done, steps in self._phases.values():
                share /= steps
                fraction += share * min(done, steps - 1)
            if fraction >= self._most + 0.01:
                self._most = fraction
                report(fraction)

    return Monitor()


def make_writer(trt: Any, path: Path) -> Any:
    """A stream writer into a new private file; a plan is written piece by piece, never held whole."""

    class PlanWriter(trt.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.file = create_private(path)
            self.error: OSError | None = None

        def write(self, data: bytes) -> int:
            try:
                return self.file.write(data)
            except OSError as exc:  # the library ends such a build as if it had gone well
                self.error = self.error or exc
                return 0

    return PlanWriter()


def build(job: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """Builds a plan.

    Args:
        job: `backend`, `graph` and `plan` (paths), `targets`, `profiles`: input -> min, opt and max shape of each, and
            `accumulation`: what attention is to add up in: `fp32`, or anything where it is `fp16` or None.
        report: called with the fraction done.

    Returns:
        `context_bytes` of each profile, `weights_bytes`, `attention`: the fields of `AttentionSpec` or None, `version`
        of the library, `seconds` and `peak_rss_bytes` of this process.

    Raises:
        BackendError: the library is missing.
        EngineError: it cannot read the graph, build it, or tell its memory; or attention is not what was wanted.
        OSError: the plan cannot be written.
    """
    start = time.perf_counter()
    library = load_library(job["backend"])
    trt = library.trt
    log = make_log(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(job["graph"]):
        raise EngineError(f"{_named(library)} cannot read {job['graph']}: {parser.get_error(0).desc()}")
    attentions = prepare_attention(trt, network)
    config = library.builder_config(builder, job["targets"])
    config.progress_monitor = make_monitor(trt, report)
    for shapes in job["profiles"]:
        profile = builder.create_optimization_profile()
        for name, (low, best, high) in shapes.items():
            profile.set_shape(name, low, best, high)
        config.add_optimization_profile(profile)
    plan = Path(job["plan"])
    if not _serialize(library, builder, network, config, plan):
        raise EngineError(f"{_named(library)} cannot build {job['graph']}: {_reason(log.errors)}")
    if len(log.context_bytes) != len(job["profiles"]):
        raise EngineError(
            f"{_named(library)} told the context memory of {len(log.context_bytes)} shape profiles; expected "
            f"{len(job['profiles'])}: its log has changed, install another version"
        )
    attention = None
    if attentions:
        with plan.open("rb") as stream:
            attention = asdict(check_attention(job["graph"], job["accumulation"], attentions, read_plan(stream)))
    return {
        "context_bytes": log.context_bytes,
        "weights_bytes": log.weights_bytes,
        "attention": attention,
        "version": library.version,
        "seconds": time.perf_counter() - start,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def _serialize(library: Library, builder: Any, network: Any, config: Any, path: Path) -> bool:
    path.unlink(missing_ok=True)
    writer = make_writer(library.trt, path)
    with writer.file:
        done = bool(builder.build_serialized_network_to_stream(network, config, writer))
    if writer.error is not None:
        raise writer.error
    return done


def _named(library: Library) -> str:
    return f"{library.backend} {library.version}"


def _reason(errors: Sequence[str]) -> str:
    if any(NOT_FUSED in error for error in errors):
        return "it has no kernel for one of the attentions as a whole; install the version that t2v-rt was tested with"
    return errors[0] if errors else "it gave no reason"


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


def main() -> None:
    """Reads a job, builds it, and answers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent gets it too, and ends this process
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what native code prints must not mix with the answers

    def answer(**content: object) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    job = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        answer(result=build(job, lambda fraction: answer(fraction=fraction)))
    except T2VError as exc:
        answer(error=str(exc), kind=type(exc).__name__)
    except OSError as exc:
        answer(error=exc.strerror or str(exc), kind="OSError", errno=exc.errno)
    except Exception as exc:  # anything else that is wrong with the graph or the library becomes the parent's error
        answer(error=f"{type(exc).__name__}: {exc}", kind="EngineError")
    answers.close()
    os._exit(0)  # the reading thread holds standard input; the plan is closed


if __name__ == "__main__":
    main()
