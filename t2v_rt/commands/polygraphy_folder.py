"""Self-test calls in the format of Polygraphy (https://github.com/NVIDIA/TensorRT/tree/main/tools/Polygraphy).

For each engine two files, `COMPONENT.ROLE.inputs.json` and `COMPONENT.ROLE.outputs.json`: what it was fed in each call,
states among it, and what it made of that here. Polygraphy runs the same graph, or plan, by its own code and compares.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t2v_rt.engines.backend_info import backend_info
from t2v_rt.engines.bundle.manifest import GraphSpec
from t2v_rt.engines.bundle.store import Bundle
from t2v_rt.errors import InputError, RequestError
from t2v_rt.runtime.self_test import Made
from t2v_rt.system.outputs import check_apart

RUNNER = "t2v-rt"  # whose outputs they are
# module of a library -> what tells Polygraphy that it runs a plan; without one TensorRT does
VARIABLES: Mapping[str, str] = {"tensorrt_rtx": "POLYGRAPHY_USE_TENSORRT_RTX=1"}
Tensors = dict[str, NDArray[Any]]


class PolygraphyFolder:
    """Takes the calls of a component, and writes them.

    Args:
        folder: that is made; it must not be there, or be empty.
        bundle: whose engines are called.

    Raises:
        InputError: Polygraphy is not installed.
        RequestError: the folder has something in it, lies in the bundle or cannot be made.
    """

    def __init__(self, folder: str | Path, bundle: Bundle) -> None:
        try:
            import polygraphy  # noqa: F401
        except ImportError as exc:
            raise InputError(
                "--polygraphy writes files by the package polygraphy, which is not installed; install "
                "t2v-rt[polygraphy]"
            ) from exc
        self._folder, self._bundle = Path(folder), bundle
        check_apart({"--polygraphy": self._folder.absolute()}, {"BUNDLE": str(bundle.folder)})
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            used = next(self._folder.iterdir(), None)
        except OSError as exc:
            raise RequestError(f"--polygraphy: {folder} cannot be a folder ({exc}); choose another place") from exc
        if used is not None:
            raise RequestError(f"--polygraphy: {folder} has {used.name} in it; give a new folder, or an empty one")
        self._calls: dict[str, list[tuple[Tensors, Tensors]]] = {}

    def add(self, component: str, made: Made) -> None:
        """Takes a call, to be written by `write`."""
        graph = self._bundle.manifest.components[component].graphs[made.call.role]
        read = {item.input: made.before[item.tensor.name] for item in graph.states if item.input is not None}
        written = {item.output: made.after[item.tensor.name] for item in graph.states if item.output is not None}
        call = {**made.feeds, **read}, {**made.outputs, **written}
        self._calls.setdefault(made.call.role, []).append(call)

    def write(self, component: str, tolerance: float) -> list[str]:
        """Writes the calls of a component that were taken.

        Args:
            component: its name.
            tolerance: of an output, relative to its largest value.

        Returns:
            For each engine the command that compares it.
        """
        from polygraphy.comparator import RunResults
        from polygraphy.json import save_json
        from polygraphy.logger import G_LOGGER

        calls, self._calls = self._calls, {}
        commands = []
        for role, made in calls.items():
            inputs, outputs = (self._folder / f"{component}.{role}.{kind}.json" for kind in ("inputs", "outputs"))
            with G_LOGGER.verbosity(G_LOGGER.ERROR):  # it tells of each file
                save_json([fed for fed, _ in made], str(inputs))
                results = RunResults()
                results.add([given for _, given in made], runner_name=RUNNER)
                results.save(str(outputs))
            graph = self._bundle.manifest.components[component].graphs[role]
            bounds = _bounds([given for _, given in made], tolerance)
            commands.append(self._command(graph, inputs, outputs, bounds))
        return commands

    def _command(self, graph: GraphSpec, inputs: Path, outputs: Path, bounds: Sequence[str]) -> str:
        info = backend_info(self._bundle.manifest.backend)
        runner = ["--model-type", "engine", "--trt"] if info.ahead_of_time else ["--onnxrt"]
        path = str(self._bundle.folder / graph.path)
        words = ["polygraphy", "run", path, *runner, "--load-inputs", str(inputs), "--load-outputs", str(outputs)]
        words += ["--check-error-stat", "max", "--rtol", "0", "--atol", *bounds]
        variable = [VARIABLES[info.module]] if info.module in VARIABLES else []
        if os.name == "nt":
            return " && ".join([*(f"set {item}" for item in variable), subprocess.list2cmdline(words)])
        return " ".join([*variable, shlex.join(words)])


def _bounds(outputs: Sequence[Tensors], tolerance: float) -> list[str]:
    """Absolute bounds as Polygraphy takes them, each output's by its largest value in any call."""
    largest = {name: max(float(np.abs(given[name]).max(initial=0)) for given in outputs) for name in outputs[0]}
    return [f"{name}:{tolerance * (value or 1.0):.3g}" for name, value in largest.items()]
