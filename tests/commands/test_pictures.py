"""Pictures: what they tell, the same bytes each time, and what is said without the package that draws them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.dom.minidom
from pathlib import Path
from typing import Any

import pytest

from t2v_rt.benchmarks.step_cache import plot
from t2v_rt.cli import main
from t2v_rt.commands.plan import PARTS, picture, plan
from tests.conftest import Tiny

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
AGAIN = """
import json, sys
from t2v_rt.commands.plan import picture
sys.stdout.buffer.write(picture(json.load(sys.stdin)))
"""


def texts(svg: bytes) -> list[str]:
    """The texts of a picture."""
    return [
        "".join(child.data for child in item.childNodes if isinstance(child, xml.dom.minidom.Text))
        for item in xml.dom.minidom.parseString(svg).getElementsByTagName("text")
    ]


def lengths(svg: bytes, report: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Stage -> part -> the length of its bar, in the picture's units."""
    items = {item.getAttribute("id"): item for item in xml.dom.minidom.parseString(svg).getElementsByTagName("g")}
    found: dict[str, dict[str, float]] = {}
    for stage in report["stages"]:
        for part in PARTS:
            (path,) = items[f"{stage['name']}.{part}"].getElementsByTagName("path")
            across = [float(x) for x in re.findall(r"[ML] (\S+)", path.getAttribute("d"))]
            found.setdefault(stage["name"], {})[part] = max(across) - min(across)
    return found


def test_the_picture_of_a_plan_tells_every_stage_part_and_the_budget(narrow: Tiny) -> None:
    report = plan(narrow.bundle, vram_budget="1GB")
    svg = picture(report)
    told = texts(svg)
    assert {"encode", "denoise", "decode", "GB", "1.00 GB"} <= set(told)
    assert {part.removesuffix("_bytes") for part in PARTS} <= set(told)
    for stage in report["stages"]:
        assert f"{stage['total_bytes'] / 1e9:.2f} GB" in told
    assert b'id="budget"' in svg
    assert b'id="budget"' not in picture(plan(narrow.bundle))


def test_bars_are_as_long_as_what_they_stand_for(narrow: Tiny) -> None:
    report = plan(narrow.bundle)
    found, scales = lengths(picture(report), report), set()
    for stage in report["stages"]:
        for part in PARTS:
            if stage[part] > report["peak_bytes"] / 100:
                scales.add(round(found[stage["name"]][part] / stage[part] * report["peak_bytes"]))
            assert (found[stage["name"]][part] > 0) == (stage[part] > 0)
    assert max(scales) - min(scales) <= max(scales) / 100


def test_the_same_plan_gives_the_same_bytes_in_every_process(narrow: Tiny) -> None:
    report = plan(narrow.bundle, vram_budget="8GiB")
    done = subprocess.run(
        [sys.executable, "-c", AGAIN], input=json.dumps(report).encode(), capture_output=True, check=True
    )
    assert picture(report) == picture(report) == done.stdout
    assert not re.search(rb"\d{4}-\d{2}-\d{2}", done.stdout)


def test_the_plot_of_the_step_cache_tells_each_threshold() -> None:
    report = json.loads((RESULTS / "step_cache.json").read_text(encoding="utf-8"))
    told = texts(plot(report))
    assert {f"{row['threshold']:g}" for row in report["rows"]} <= set(told)
    assert {f"Step cache, {report['steps']} steps: thresholds", "speed-up of denoising"} <= set(told)


def test_without_the_package_the_extra_is_named_before_any_work(
    narrow: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    command = ["plan", str(narrow.bundle), "--picture", str(tmp_path / "plan.svg")]
    monkeypatch.setattr("t2v_rt.commands.plan.plan", lambda *_, **__: pytest.fail("planned all the same"))
    assert main(command) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert "install t2v-rt[plots]" in printed.err
    assert not list(tmp_path.iterdir())
