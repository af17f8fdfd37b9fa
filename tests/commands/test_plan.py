"""The memory plan: its sums, what it keeps loaded, and the command."""

from __future__ import annotations

import json
import xml.dom.minidom
from pathlib import Path

import pytest

from t2v_rt import RequestError, TextToVideoPipeline
from t2v_rt.cli import main
from t2v_rt.commands.plan import plan
from t2v_rt.runtime.memory.plan import make_plan, parse_bytes
from tests.conftest import Tiny

PARTS = ("weights_bytes", "context_bytes", "state_bytes", "io_bytes")


def test_stages_add_up(narrow: Tiny) -> None:
    report = plan(narrow.bundle, vram_budget="8GiB")
    assert [stage["name"] for stage in report["stages"]] == ["encode", "denoise", "decode"]
    for stage in report["stages"]:
        assert all(isinstance(stage[part], int) for part in PARTS)
        assert stage["total_bytes"] == sum(stage[part] for part in PARTS)
    assert report["budget_bytes"] == 8 * 2**30
    assert report["fits"]
    assert report["resident"]
    kept = sum(stage["weights_bytes"] + stage["io_bytes"] for stage in report["stages"])
    assert report["peak_bytes"] == kept + max(
        stage["context_bytes"] + stage["state_bytes"] for stage in report["stages"]
    )


def test_the_peak_is_that_of_the_largest_stage_where_not_all_fit(narrow: Tiny) -> None:
    whole = plan(narrow.bundle)
    most = max(stage["total_bytes"] for stage in whole["stages"])
    tight = plan(narrow.bundle, vram_budget=most)
    assert not tight["resident"]
    assert tight["peak_bytes"] == max(stage["total_bytes"] for stage in tight["stages"])


def test_what_does_not_fit_names_the_largest_that_would(narrow: Tiny) -> None:
    size = {"height": 480, "width": 832, "num_frames": 81}
    needed = plan(narrow.bundle, **size)  # type: ignore[arg-type]
    report = plan(narrow.bundle, **size, vram_budget=needed["stages"][1]["total_bytes"] // 4)  # type: ignore[arg-type]
    assert not report["fits"]
    best = report["largest_fitting"]
    assert (best["height"], best["width"]) == (480, 832)
    assert 1 <= best["num_frames"] < 81
    assert plan(narrow.bundle, **best, vram_budget=report["budget_bytes"])["fits"]
    tiny = plan(narrow.bundle, **size, vram_budget="3MB")  # type: ignore[arg-type]
    assert tiny["largest_fitting"]["height"] < 480
    assert plan(narrow.bundle, vram_budget=1)["largest_fitting"] is None


def test_the_pipeline_follows_the_plan(narrow: Tiny) -> None:
    pipe = TextToVideoPipeline.from_pretrained(narrow.bundle, vram_budget=1)
    with pytest.raises(RequestError, match=r"needs about 0\.0\d+ GB in decode, the budget is 1e-09 GB"):
        pipe("a red ball", seed=1)


def test_one_batch_takes_more(narrow: Tiny) -> None:
    manifest = TextToVideoPipeline.from_pretrained(narrow.bundle).manifest
    two, one = (make_plan(manifest, (1, 4, 3, 8, 8), batches=(flag,)).stages[1] for flag in (False, True))
    assert one.context_bytes == 2 * two.context_bytes


def test_the_command(narrow: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawing = tmp_path / "plan.svg"
    assert main(["plan", str(narrow.bundle), "--vram-budget", "1GB", "--picture", str(drawing)]) == 0
    assert "fits 1.000 GB" in capsys.readouterr().out
    named = [item.getAttribute("id") for item in xml.dom.minidom.parse(str(drawing)).getElementsByTagName("g")]
    assert {f"{stage}.{part}" for stage in ("encode", "denoise", "decode") for part in PARTS} | {"budget"} <= {*named}
    assert main(["plan", str(narrow.bundle), "--vram-budget", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["fits"] is False
    assert main(["plan", str(narrow.bundle), "--picture", str(tmp_path / "plan.png")]) == 2
    assert "ends in .svg" in capsys.readouterr().err
    assert main(["plan", str(narrow.bundle), "--height", "33"]) == 2


@pytest.mark.parametrize(("text", "size"), [("8GiB", 8 * 2**30), ("6 GB", 6 * 10**9), ("1.5kB", 1500), (77, 77)])
def test_sizes_are_read(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size
