"""Self-test calls in Polygraphy's format: its own runner and comparator on every engine of a tiny bundle."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from t2v_rt.cli import main
from t2v_rt.commands.verify import verify
from t2v_rt.engines.bundle.store import open_bundle
from tests.conftest import Tiny

pytest.importorskip("polygraphy", reason="needs t2v-rt[polygraphy]")


def compared(command: str, outputs: Path | None = None) -> bool:
    """What Polygraphy says to a command, by its own code but without another process."""
    from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
    from polygraphy.comparator import Comparator, RunResults, SimpleCompareFunc
    from polygraphy.json import load_json
    from polygraphy.logger import G_LOGGER

    words = command.split()
    given = {word: words[words.index(word) + 1] for word in ("run", "--load-inputs", "--load-outputs", "--rtol")}
    bounds = dict(word.rsplit(":", 1) for word in words[words.index("--atol") + 1 :])
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        results = Comparator.run(
            [OnnxrtRunner(SessionFromOnnx(given["run"]))], data_loader=load_json(given["--load-inputs"])
        )
        known = RunResults.load(str(outputs or given["--load-outputs"]))
        assert [name for name, _ in known] == ["t2v-rt"]
        results.extend(known)
        compare = SimpleCompareFunc(
            check_error_stat="max",
            rtol=float(given["--rtol"]),
            atol={name: float(bound) for name, bound in bounds.items()},
            check_shapes=True,
        )
        return bool(Comparator.compare_accuracy(results, compare_func=compare))


def test_polygraphy_agrees_on_every_engine(tiny: Tiny, tmp_path: Path) -> None:
    report = verify(tiny.bundle, polygraphy=tmp_path / "calls")
    assert report["passed"]
    graphs = [
        (name, role, graph)
        for name, spec in open_bundle(tiny.bundle).manifest.components.items()
        for role, graph in spec.graphs.items()
    ]
    assert len(report["polygraphy"]) == len(graphs)
    for command, (name, role, graph) in zip(report["polygraphy"], graphs, strict=True):
        assert str(tiny.bundle / graph.path) in command
        assert f"{name}.{role}.inputs.json" in command
        written = [state.output for state in graph.states if state.output is not None]
        for output in (*(spec.name for spec in graph.outputs), *written):
            assert f" {output}:" in command  # has a bound of its own
        assert compared(command)


def test_polygraphy_sees_another_answer(narrow: Tiny, tmp_path: Path) -> None:
    from polygraphy.comparator import RunResults
    from polygraphy.logger import G_LOGGER

    command = verify(narrow.bundle, polygraphy=tmp_path / "calls")["polygraphy"][1]
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        known = RunResults.load(str(tmp_path / "calls" / "transformer.model.outputs.json"))
        ((_, calls),) = known
        wrong = RunResults()
        wrong.add([{"noise_pred": calls[0]["noise_pred"] * np.float32(1.01)}], runner_name="t2v-rt")
        wrong.save(str(tmp_path / "wrong.json"))
    assert compared(command)
    assert not compared(command, tmp_path / "wrong.json")


def test_the_command_prints_commands(narrow: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(narrow.bundle), "--polygraphy", str(tmp_path / "calls")]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("polygraphy run ") == len(list((tmp_path / "calls").glob("*.inputs.json"))) == 5
    assert printed.err == ""
    assert main(["verify", str(narrow.bundle), "--polygraphy", str(tmp_path / "more"), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["polygraphy"]) == 5


def test_what_is_refused(
    narrow: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    cases: list[tuple[Any, str]] = [
        (tmp_path / "full", "has file in it; give a new folder"),
        (tmp_path / "full" / "file", "cannot be a folder"),
        (narrow.bundle / "calls", "lies in the bundle"),
    ]
    for folder, message in cases:
        assert main(["verify", str(narrow.bundle), "--polygraphy", str(folder)]) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "polygraphy", None)
    assert main(["verify", str(narrow.bundle), "--polygraphy", str(tmp_path / "new")]) == 2
    assert "t2v-rt[polygraphy]" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
