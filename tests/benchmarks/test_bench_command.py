"""What the command refuses before any work, and that recording changes nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from t2v_rt import TextToVideoPipeline
from t2v_rt.benchmarks.families import MODULES
from t2v_rt.benchmarks.families import __name__ as families_name
from t2v_rt.benchmarks.peers import PEERS, peer
from t2v_rt.benchmarks.recorder import RecordedBackend, Recorder, recorded_scheduler
from t2v_rt.cli import main
from t2v_rt.engines.backends import get_backend
from t2v_rt.engines.bundle.store import open_bundle
from tests.conftest import Tiny


def test_a_report_replaces_a_report_and_nothing_else(tmp_path: Path, narrow: Tiny) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    assert main(["bench", str(narrow.bundle), "--output", str(tmp_path)]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--peer", "nobody"], "expected one of openvino"),
        (["--workload", "nothing"], "expected one of call"),
        (["--runs", "0"], "1 or more"),
        (["--duration", "-1"], "more than 0"),
        (["--num-frames", "8"], "nearest valid value"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    options: list[str], told: str, narrow: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(narrow.bundle), *options]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert told in printed


def test_recording_changes_no_frame(narrow: Tiny) -> None:
    plain = TextToVideoPipeline.from_pretrained(narrow.bundle)
    recorder = Recorder()
    recorded = TextToVideoPipeline(open_bundle(narrow.bundle), RecordedBackend(get_backend("onnxruntime"), recorder))
    recorded.scheduler = recorded_scheduler(recorded.scheduler, recorder)
    outs = [pipe("a red ball", seed=1, num_inference_steps=2, num_frames=5) for pipe in (plain, recorded)]
    assert (outs[0].frames == outs[1].frames).all()
    assert outs[0].settings == outs[1].settings
    kinds = {event.kind for event in recorder.take()}
    assert kinds == {"load", "engine", "scheduler"}
    assert recorder.take() == []


def test_registered_peers_and_families_are_there() -> None:
    for name in PEERS:
        assert callable(peer(name).missing)
    assert all(module.startswith(families_name) for module in MODULES.values())
