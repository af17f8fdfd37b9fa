"""Plans built ahead of time, without a GPU: what is in the bundle, what is reused, and what an interruption leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from t2v_rt import BackendError, EngineError, RequestError, build_engines
from t2v_rt.build.work_folder import CONTINUES
from t2v_rt.cli import main
from t2v_rt.commands.plan import plan
from t2v_rt.engines.bundle.profiles import AttentionSpec, Range
from t2v_rt.engines.bundle.store import Bundle, open_bundle
from t2v_rt.engines.tensorrt.builder import run_worker
from t2v_rt.engines.tensorrt.libraries import check_targets, load_library
from tests.conftest import Tiny
from tests.export.test_graph_forms import FORBIDDEN
from tests.support.processes import start_and_meet

pytestmark = pytest.mark.slow  # builds plans

RTX = "tensorrt-rtx"


@pytest.fixture(scope="module", autouse=True)
def library() -> str:
    return str(pytest.importorskip("tensorrt_rtx", reason="needs t2v-rt[tensorrt-rtx]").__version__)


def build_again(narrow: Tiny, bundle: Bundle) -> bool:
    """Whether the same build makes something new."""
    before = (bundle.folder / "bundle.json").stat().st_mtime_ns
    build_engines(narrow.checkpoint, bundle.folder, backend=RTX)
    return (bundle.folder / "bundle.json").stat().st_mtime_ns != before


def test_a_bundle_of_plans(plans: Bundle, library: str) -> None:
    manifest = plans.manifest
    assert (manifest.backend, manifest.precision, manifest.targets) == (RTX, "fp16", check_targets(RTX, None))
    assert manifest.builder[RTX] == library
    assert [str(profile) for profile in manifest.profiles] == ["48x32, 5 frames"]
    files = sorted(path.relative_to(plans.folder).as_posix() for path in plans.folder.rglob("*") if path.is_file())
    graphs = {graph.path: graph for spec in manifest.components.values() for graph in spec.graphs.values()}
    others = [f"self_test/{name}.npz" for name in manifest.components]
    others += ["bundle.json", "tokenizer/tokenizer.json", "text_encoder/embedding.data"]
    assert files == sorted([*graphs, *others])
    for path, graph in graphs.items():
        assert graph.plan is not None
        assert path in manifest.files
        assert all(profile.context_bytes > 0 for profile in graph.plan.profiles)
        assert graph.plan.weights_bytes > 0
        assert {spec.dtype for spec in (*graph.inputs, *graph.outputs)} <= {"float32", "float16", "int64"}
        assert {state.tensor.dtype for state in graph.states} <= {"float16"}
        assert not FORBIDDEN & set(graph.plan.nodes)
        if os.name == "posix":
            assert stat.S_IMODE((plans.folder / path).stat().st_mode) == 0o600
    nodes = {path: graph.plan.nodes.get("Attention", 0) for path, graph in graphs.items() if graph.plan is not None}
    assert nodes == {
        "text_encoder/blocks_0.plan": 2,
        "transformer/model.plan": 4,
        "vae_decoder/head_first.plan": 1,
        "vae_decoder/head_next.plan": 1,
        "vae_decoder/tail.plan": 0,
    }
    denoiser = manifest.components["transformer"].graphs["model"]
    assert denoiser.plan is not None
    assert denoiser.plan.attention == AttentionSpec(4, 4, "fp32")
    assert denoiser.plan.profiles[0].sizes == {
        "batch": Range.of(1),
        "frames": Range.of(2),
        "height": Range.of(4),
        "width": Range.of(6),
    }
    text = manifest.components["text_encoder"].graphs["blocks_0"].plan
    assert text is not None
    assert text.profiles[0].sizes["length"] == Range(1, 64, 512)
    assert text.attention == AttentionSpec(2, 0, None)  # heads of 8, for which there is no kernel


def test_an_unchanged_build_is_reused(narrow: Tiny, plans: Bundle) -> None:
    def written() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in plans.folder.rglob("*") if path.is_file()}

    before, seen = written(), []
    again = build_engines(narrow.checkpoint, plans.folder, backend=RTX, progress=lambda *told: seen.append(told))
    assert again.manifest == plans.manifest
    assert written() == before
    assert not seen  # not a step was begun


def test_other_gpus_versions_and_sizes_are_another_build(
    narrow: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [
        build_engines(
            narrow.checkpoint, tmp_path / "one", backend=RTX, gpus="SM89, sm86", height="32,48", width="48,32"
        ),
        build_engines(narrow.checkpoint, tmp_path / "one", backend=RTX, gpus=["sm75"]),
        build_engines(
            narrow.checkpoint, tmp_path / "one", backend=RTX, gpus=["sm75"], height="16:32", num_frames="5:9"
        ),
    ]
    assert len({bundle.manifest.fingerprint for bundle in found}) == 3
    assert [bundle.manifest.targets for bundle in found] == [("sm86", "sm89"), ("sm75",), ("sm75",)]
    several = found[0].manifest.components["transformer"].graphs["model"].plan
    assert several is not None
    shapes = [(p.sizes["height"].opt, p.sizes["width"].opt, p.context_bytes > 0) for p in several.profiles]
    assert shapes == [(4, 6, True), (6, 4, True)]
    ranged = found[2].manifest.components["transformer"].graphs["model"].plan
    assert ranged is not None
    assert (ranged.profiles[0].sizes["height"], ranged.profiles[0].sizes["frames"]) == (Range(2, 4, 4), Range(2, 3, 3))
    assert found[2].manifest.defaults.num_frames == 9
    monkeypatch.setattr("tensorrt_rtx.__version__", "99.0.0")
    with pytest.raises(RequestError, match="progress reached"):
        build_engines(narrow.checkpoint, tmp_path / "one", backend=RTX, gpus="sm75", progress=_stop)


def test_the_text_encoder_in_several_plans(narrow: Tiny, tmp_path: Path) -> None:
    found = {}
    for gpu in ("sm75", "sm89"):
        bundle = build_engines(narrow.checkpoint, tmp_path / gpu, backend=RTX, gpus=gpu, vram_budget="1MB")
        spec = found[gpu] = bundle.manifest.components["text_encoder"]
        assert list(spec.graphs) == ["blocks_0", "blocks_1"]
        assert all(graph.plan is not None and graph.plan.nodes["Attention"] == 1 for graph in spec.graphs.values())
        assert spec.weights_bytes == sum(graph.weights_bytes for graph in spec.graphs.values())
        assert not (bundle.folder / "graphs").exists()
        tight = plan(bundle.folder, vram_budget=1)["stages"][0]
        assert tight["weights_bytes"] == max(graph.weights_bytes for graph in spec.graphs.values())
        assert tight["context_bytes"] == max(
            graph.plan.profiles[0].context_bytes for graph in spec.graphs.values() if graph.plan is not None
        )
    assert (found["sm75"].precision, found["sm89"].precision) == ("fp16", "bf16")  # Turing has no bfloat16


def _stop(step: str, done: int, total: int) -> None:
    raise RequestError("progress reached")


def test_a_bundle_from_elsewhere_is_not_reused(
    narrow: Tiny, plans: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Bundle(tmp_path / "copy", plans.manifest)
    shutil.copytree(plans.folder, copy.folder)
    assert not build_again(narrow, copy)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "of another user"))
    assert build_again(narrow, copy)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"backend": RTX, "gpus": "sm89,sm90"}, BackendError, "unknown GPU 'sm90'; expected one or more of sm75"),
        ({"backend": RTX, "gpus": []}, BackendError, "expected one or more of sm75"),
        ({"backend": "tensorrt", "gpus": "sm89"}, BackendError, "does not build for named GPUs"),
        ({"gpus": "sm89"}, BackendError, "does not build for named GPUs"),
        ({"backend": RTX, "precision": "fp32"}, RequestError, "takes fp16 or bf16"),
        ({"backend": RTX, "height": "24:32"}, RequestError, "height is 24; expected a multiple of 16"),
        ({"backend": RTX, "num_frames": "5:8"}, RequestError, "num_frames is 8; expected"),
        ({"height": "32:48"}, RequestError, "take any size"),
    ],
)
def test_bad_settings(
    narrow: Tiny, tmp_path: Path, settings: dict[str, str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        build_engines(narrow.checkpoint, tmp_path / "x", **settings)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_missing_library_names_the_extra(narrow: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(BackendError, match=r"install t2v-rt\[tensorrt\]"):
        build_engines(narrow.checkpoint, tmp_path / "x", backend="tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(BackendError, match=r"install t2v-rt\[tensorrt-rtx\]"):
        build_engines(narrow.checkpoint, tmp_path / "x", backend=RTX)
    assert check_targets(RTX, "sm120,sm75") == ("sm75", "sm120")


def test_a_worker_that_fails(narrow: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = tmp_path / "bad.onnx"
    graph.write_bytes(b"not a graph")
    job = {"backend": RTX, "graph": str(graph), "plan": str(tmp_path / "x.plan"), "targets": ["sm89"], "profiles": []}
    with pytest.raises(EngineError, match="cannot read"):
        run_worker(job, "x", lambda fraction: None)
    with pytest.raises(EngineError, match="KeyError: 'backend'"):
        run_worker({}, "x", lambda fraction: None)
    monkeypatch.setattr("sys.executable", shutil.which("false"))
    with pytest.raises(EngineError, match="building x ended without a result, exit code 1"):
        run_worker(job, "x", lambda fraction: None)
    monkeypatch.undo()
    plan = narrow.bundle / "transformer/model.onnx"
    wrong = {**job, "graph": str(plan), "profiles": [{"timestep": [[1], [1], [1]]}]}
    with pytest.raises(EngineError, match="cannot build"):
        run_worker(wrong, "x", lambda fraction: None)


@pytest.mark.skipif(os.name != "posix", reason="stops a process")
def test_a_worker_is_ended_and_not_waited_for(narrow: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Watched(subprocess.Popen[bytes]):
        def __init__(self, command: list[str], **settings: Any) -> None:
            super().__init__(command, **settings)
            started.append(self)

    def interrupt(stage: str, done: int, total: int) -> None:
        if started:
            started[0].send_signal(signal.SIGSTOP)  # from here on it never comes to an end by itself
            raise KeyboardInterrupt

    monkeypatch.setattr("t2v_rt.engines.tensorrt.builder.subprocess.Popen", Watched)
    with pytest.raises(KeyboardInterrupt):
        build_engines(narrow.checkpoint, tmp_path / "b", backend=RTX, gpus="sm89", progress=interrupt)
    assert [worker.returncode for worker in started] == [-signal.SIGKILL]


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT as a terminal does")
def test_an_interruption_leaves_what_is_finished(narrow: Tiny, tmp_path: Path) -> None:
    command = ["build-engines", str(narrow.checkpoint), "--output", str(tmp_path / "b"), "--backend", RTX]
    with start_and_meet(*command, at="transformer", call=2, start_new_session=True) as process:  # it compiles
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate()
    assert process.returncode == 130
    assert said.strip() == f"t2v-rt: interrupted; {CONTINUES}"
    with pytest.raises(ProcessLookupError):  # the worker is gone as well
        os.killpg(process.pid, 0)
    (work,) = tmp_path.iterdir()
    finished = work / "bundle" / "text_encoder" / "blocks_0.plan"
    before = finished.stat().st_mtime_ns
    assert [path.name for path in work.rglob("*.plan")] == [finished.name]
    bundle = build_engines(narrow.checkpoint, tmp_path / "b", backend=RTX)
    assert (bundle.folder / "text_encoder" / "blocks_0.plan").stat().st_mtime_ns == before
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_progress_is_told(narrow: Tiny, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    build_engines(
        narrow.checkpoint,
        tmp_path / "b",
        backend=RTX,
        gpus="sm89",
        progress=lambda step, done, total: seen.append((step, done, total)),
    )
    assert [step for i, (step, *_) in enumerate(seen) if not i or seen[i - 1][0] != step] == [
        *("text_encoder", "self_test", "transformer", "self_test", "vae_decoder", "self_test"),
        "hash",
        "done",
    ]
    counts = [done for _, done, _ in seen]
    assert counts == sorted(counts)
    assert len(counts) > 20
    assert seen[-1][1] == seen[-1][2]


def test_the_command_and_inspect(narrow: Tiny, plans: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["build-engines", str(narrow.checkpoint), "--output", str(plans.folder), "--backend", RTX, "--json"]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["bundle_id"] == plans.manifest.bundle_id
    assert main(["inspect", str(plans.folder), "--json"]) == 0
    nodes = json.loads(capsys.readouterr().out)["nodes"]
    assert nodes["transformer/model.plan"]["Attention"] == 4
    assert main(["inspect", str(plans.folder)]) == 0
    text = capsys.readouterr().out
    targets = ", ".join(check_targets(RTX, None))
    for part in (targets, load_library(RTX).version, "48x32, 5 frames", "4 Attention", "not fused"):
        assert part in text
    assert main(["build-engines", str(narrow.checkpoint), "--output", str(plans.folder), "--gpu", "sm1"]) == 2
    assert open_bundle(plans.folder).manifest.bundle_id == plans.manifest.bundle_id
