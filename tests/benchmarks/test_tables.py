"""The figures of the documentation are those of the results."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from t2v_rt.benchmarks.results import FOLDER
from t2v_rt.benchmarks.tables import BLOCK, FIGURES, PAGES, ROOT, rewritten
from t2v_rt.errors import RequestError


@pytest.mark.parametrize("page", PAGES)
def test_a_page_says_what_its_results_say(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert rewritten(text) == text, "run python -m t2v_rt.benchmarks.tables"


def test_all_figures_are_shown_once() -> None:
    shown = [name for page in PAGES for _, name, _ in BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))]
    assert sorted(shown) == sorted(FIGURES)


def test_another_result_makes_another_page(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    shutil.copytree(FOLDER, folder)
    report = json.loads((folder / "startup.json").read_text(encoding="utf-8"))
    video = "process start to finished demo video: t2v_rt, then diffusers"
    report[video]["medians"][0] = 1.25
    (folder / "startup.json").write_text(json.dumps(report), encoding="utf-8")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    changed = rewritten(text, folder)
    assert changed != text
    assert "| process start to finished demo video | 1.25 s |" in changed


def test_figures_that_nothing_makes_are_refused() -> None:
    with pytest.raises(RequestError, match="no function makes the figures 'made-up'"):
        rewritten("<!-- figures: made-up -->\n1.0\n<!-- end of figures -->\n")
