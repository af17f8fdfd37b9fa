"""The protocol for a card: on the stand-in each step as far as it goes, and on any machine what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from t2v_rt import RequestError
from t2v_rt.benchmarks import card, card_steps
from t2v_rt.benchmarks.card_steps import STEPS
from t2v_rt.engines.bundle.store import Bundle
from t2v_rt.engines.tensorrt.cuda import Cuda
from t2v_rt.errors import BackendError
from tests.conftest import Tiny
from tests.support.card_slot import Slot, readable_plans

ROOM = 3 * 10**9
ON_A_CARD = ("doctor", "tests")  # ask the driver, or start processes that do


@pytest.fixture
def a_card(
    plans: Bundle, narrow: Tiny, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Bundle:
    default = dict.fromkeys(("height", "width", "num_frames"))
    Slot(monkeypatch).insert(plans, readable_plans(plans, narrow.checkpoint, tmp_path_factory, default), ROOM)
    return plans


@pytest.mark.slow
@pytest.mark.parametrize("name", [step.name for step in STEPS if step.name not in ON_A_CARD])
def test_steps_on_the_card_in_host_memory(name: str, a_card: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card_steps, "BLOCK", 1 << 20)
    monkeypatch.setattr(card_steps, "LEFT_FREE", 1 << 30)
    result = card_steps.take(name, a_card.folder, [])
    assert result["verdict"] == "passed", result


def test_a_machine_without_a_card_leaves_the_steps_out(narrow: Tiny) -> None:
    try:
        Cuda("tensorrt-rtx")
    except BackendError:
        pass
    else:
        pytest.skip("there is a GPU")
    report = card.run(narrow.bundle, only=["memory"])
    assert report["gpus"] == []
    step = report["steps"]["memory"]
    assert step["verdict"] == "left out"
    assert step["why"]
    assert json.loads(json.dumps(report)) == report
    assert card.result_name(report["gpus"]) == "card-no-gpu.json"


def test_a_step_that_fails_says_why(tmp_path: Path) -> None:
    result = card_steps.take("memory", tmp_path, [])
    assert result["verdict"] == "failed"
    assert "BundleError" in result["why"]


def test_a_step_that_hangs_is_ended(narrow: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card, "GRACE", 0.0)
    result = card.take(STEPS[0], narrow.bundle, [], 0.01)
    assert result["verdict"] == "failed"
    assert "took more than" in result["why"]


def test_unknown_steps_are_refused(narrow: Tiny) -> None:
    with pytest.raises(RequestError, match="unknown step magic; expected one or more of doctor, memory"):
        card.run(narrow.bundle, only=["magic"])
