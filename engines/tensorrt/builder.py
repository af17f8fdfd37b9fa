"""Builds the plans of a component from its ONNX graphs, each in a process of its own."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

from t2v_rt.engines.bundle.manifest import ComponentSpec, GraphSpec, from_plain
from t2v_rt.engines.bundle.profiles import Accumulation, AttentionSpec, PlanProfile, PlanSpec, Range
from t2v_rt.engines.specs import TensorSpec
from t2v_rt.errors import BackendError, EngineError

logger = logging.getLogger(__name__)
Ranges = Mapping[str, Range]
Report = Callable[[float], None]
SUFFIX = ".plan"


@dataclass(frozen=True)
class PlanBuilder:
    """Builds plans with one library for one set of GPUs.

    Args:
        backend: `tensorrt-rtx` or `tensorrt`.
        targets: names of GPUs; none where the library builds for the one it runs on.
    """

    backend: str
    targets: tuple[str, ...]

    def build_component(
        self,
        graphs: Path,
        folder: Path,
        spec: ComponentSpec,
        profiles: Mapping[str, Sequence[Ranges]],
        nodes: Mapping[str, Mapping[str, int]],
        sums: Mapping[str, Accumulation | None],
        report: Report,
    ) -> ComponentSpec:
        """Builds all plans of a component.

        Args:
            graphs: folder that the component's graphs were exported to.
            folder: of the bundle; plans get the graphs' paths in it, with another suffix.
            spec: of the graphs.
            profiles: role -> symbol -> range, for each shape profile.
            nodes: role -> operator -> number of nodes of the graph.
            sums: role -> what its attention is to add up in: `fp32`, or anything where it is `fp16` or None.
            report: called with the fraction done.

        Returns:
            What the manifest says of the component with its plans.

        Raises:
            BackendError: the library is missing.
            EngineError: a graph cannot be built.
        """
        built: dict[str, GraphSpec] = {}
        for i, (role, graph) in enumerate(spec.graphs.items()):
            path = str(Path(graph.path).with_suffix(SUFFIX).as_posix())
            (folder / path).parent.mkdir(exist_ok=True)
            part = partial(report_part, report, i, len(spec.graphs))
            result = self.build(graph, graphs / graph.path, folder / path, profiles[role], sums[role], part)
            told = zip(profiles[role], result["context_bytes"], strict=True)
            plan = PlanSpec(
                tuple(PlanProfile(dict(ranges), int(size)) for ranges, size in told),
                int(result["weights_bytes"]),
                found_attention(result),
                nodes[role],
            )
            built[role] = replace(graph, path=path, plan=plan, weights_bytes=plan.weights_bytes)
        return replace(spec, graphs=built, weights_bytes=sum(graph.weights_bytes for graph in built.values()))

    def build(
        self,
        spec: GraphSpec,
        graph: Path,
        plan: Path,
        profiles: Sequence[Ranges],
        sums: Accumulation | None,
        report: Report,
    ) -> Mapping[str, Any]:
        """Builds one plan and returns what `worker.build` does; raises as `build_component`."""
        shapes = [profile_shapes(spec, ranges) for ranges in profiles]
        job = {
            "backend": self.backend,
            "targets": self.targets,
            "graph": str(graph.absolute()),
            "plan": str(plan.absolute()),
            "profiles": shapes,
            "accumulation": sums,
        }
        result = run_worker(job, plan.stem, report)
        logger.info(
            "%s: %.0f s, %.1f GB of memory to build, %.2f GB of weights, %s GB of context",
            plan,
            result["seconds"],
            result["peak_rss_bytes"] / 1e9,
            result["weights_bytes"] / 1e9,
            [round(size / 1e9, 2) for size in result["context_bytes"]],
        )
        attention = found_attention(result)
        if attention is not None and not attention.told:
            logger.warning("%s: attention is %s; whether that is as it was asked was not checked", plan, attention)
        return result


def found_attention(result: Mapping[str, Any]) -> AttentionSpec | None:
    """What a worker's result says of attention; None where the graph has none."""
    return None if result["attention"] is None else from_plain(result["attention"], AttentionSpec)


def report_part(report: Report, index: int, count: int, fraction: float) -> None:
    """Reports what is done of one of several equal parts."""
    report((index + fraction) / count)


def profile_shapes(spec: GraphSpec, ranges: Ranges) -> dict[str, list[tuple[int, ...]]]:
    """Min, opt and max shape of every input of a graph, its states' included."""
    states = [
        TensorSpec(state.input, state.tensor.dtype, state.tensor.shape)
        for state in spec.states
        if state.input is not None
    ]
    return {
        tensor.name: [
            tensor.resolve({symbol: getattr(sizes, bound) for symbol, sizes in ranges.items()})
            for bound in ("min", "opt", "max")
        ]
        for tensor in (*spec.inputs, *states)
    }


def run_worker(job: Mapping[str, Any], name: str, report: Report) -> Mapping[str, Any]:
    """Runs a job of `worker` to its end; whatever ends it early ends the worker too.

    Args:
        job: as `worker.build` takes it.
        name: of what is built, for errors.
        report: called with the fraction done, in this thread.

    Returns:
        The worker's result.

    Raises:
        BackendError: the library is missing.
        EngineError: the graph cannot be built, or the worker died.
        OSError: the plan cannot be written: the disk is full.
    """
    command = [sys.executable, "-P", "-m", "t2v_rt.engines.tensorrt.worker"]
    with tempfile.TemporaryFile() as printed:
        worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=printed)
        try:
            assert worker.stdin is not None
            assert worker.stdout is not None
            worker.stdin.write(json.dumps(job).encode() + b"\n")
            worker.stdin.flush()
            answer: dict[str, Any] = {}
            for line in worker.stdout:
                answer = json.loads(line)
                if "fraction" in answer:
                    report(answer["fraction"])
        except BrokenPipeError:
            answer = {}
        finally:
            worker.kill()
            code = worker.wait()
            _close(worker.stdin, worker.stdout)
        if "result" in answer:
            result: Mapping[str, Any] = answer["result"]
            return result
        if answer.get("kind") == "OSError":
            raise OSError(answer["errno"], answer["error"])
        if "error" in answer:
            raise (BackendError if answer["kind"] == "BackendError" else EngineError)(answer["error"])
        raise EngineError(f"building {name} ended without a result, exit code {code}{_reason(code, printed)}")


def _close(*streams: IO[bytes] | None) -> None:
    for stream in streams:
        if stream is not None:
            with suppress(BrokenPipeError):  # what a dead worker did not read
                stream.close()


def _reason(code: int, printed: IO[bytes]) -> str:
    if code == -9:
        return ": the system ended it, most likely for want of memory; it takes about three times the weights"
    printed.seek(0)
    lines = printed.read().decode(errors="replace").strip().splitlines()
    return f": {lines[-1][:300]}" if lines else ""
