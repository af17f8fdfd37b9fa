"""What a bundle's fingerprint hashes of the code: what decides its bytes, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from t2v_rt.build.job import FINDERS, code_files
from t2v_rt.export import family

ROOT = Path(__file__).resolve().parents[2]
WAN = "t2v_rt.export.wan.family"
PLAN_CODE = ("attention", "builder", "libraries", "plan_text", "worker")


def names(makes_plans: bool) -> set[str]:
    return {file.resolve().relative_to(ROOT).as_posix() for file in code_files(makes_plans, WAN, "wan")}


def test_all_that_writes_is_in_it_in_whatever_folder() -> None:
    graphs = names(False)
    assert {"export/graph.py", "export/wan/vae.py", "export/text_encoders/t5.py", "export/weight_file.py"} <= graphs
    assert {"runtime/self_test.py", "runtime/families/wan.py"} <= graphs
    exporter = {file.relative_to(ROOT).as_posix() for file in (ROOT / "export").rglob("*.py")}
    assert exporter - graphs == {f"export/{name}" for name in FINDERS}
    assert names(True) - graphs == {f"engines/tensorrt/{name}.py" for name in PLAN_CODE}


def test_what_only_finds_is_there_and_not_in_it() -> None:
    assert all((ROOT / "export" / name).is_file() for name in FINDERS)
    assert not {name for name in names(True) if "hub" in name}


def test_another_family_is_not_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("t2v_rt.build.job.FAMILIES", {**family.FAMILIES, "Toy": "t2v_rt.export.text_encoders.toy"})
    assert "export/text_encoders/t5.py" not in names(False)  # as if that folder were another family's
