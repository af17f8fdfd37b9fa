"""What `plan` says of the sizes that plans were built for, and of what stays loaded."""

from __future__ import annotations

from typing import Any

import pytest

from t2v_rt.build.dry_run import dry_run
from t2v_rt.build.options import BuildOptions
from t2v_rt.commands.plan import describe, plan
from t2v_rt.engines.bundle.store import open_bundle
from t2v_rt.runtime.memory.plan import make_plan
from tests.conftest import Tiny


def planned(narrow: Tiny, **sizes: Any) -> dict[str, Any]:
    """The plan of a bundle for a card, as it would be built."""
    pytest.importorskip("tensorrt_rtx", reason="needs t2v-rt[tensorrt-rtx]")
    return dry_run(BuildOptions(narrow.checkpoint, backend="tensorrt-rtx", **sizes))


def test_a_range_is_planned_with_its_largest_video_and_a_list_with_each(narrow: Tiny) -> None:
    several = planned(narrow, height="32,64", width=64, num_frames=9)["profiles"]
    assert [row["video"] for row in several] == ["64x32, 9 frames", "64x64, 9 frames"]
    assert [row["ranged"] for row in several] == [False, False]
    (ranged,) = planned(narrow, height="32:64", width=64, num_frames=9)["profiles"]
    assert (ranged["video"], ranged["ranged"]) == ("64x32 to 64, 9 frames", True)
    small, large = (row["context_bytes"] for row in several)
    for stage in ("denoise", "decode"):
        assert small[stage] < large[stage] == ranged["context_bytes"][stage]


def test_the_profile_of_the_request_is_the_one_that_the_stages_are_of(narrow: Tiny) -> None:
    report = planned(narrow, height="32,64", width="32,64", num_frames="5,9")
    used = [row["used"] for row in report["profiles"]]
    assert used.count(True) == 1
    assert used == [row["video"] == f"{report['width']}x{report['height']}, 5 frames" for row in report["profiles"]]
    stages = {stage["name"]: stage["context_bytes"] for stage in report["stages"]}
    for row in report["profiles"]:
        if row["used"]:
            assert row["context_bytes"] == {name: stages[name] for name in ("denoise", "decode")}


def test_people_are_told_where_there_is_more_than_one_size(narrow: Tiny) -> None:
    one = planned(narrow, height=64, width=64, num_frames=9)
    assert not [line for line in describe(one) if line.startswith("profile")]
    (line,) = [
        line for line in describe(planned(narrow, height="32:64", width=64, num_frames=9)) if line.startswith("profile")
    ]
    assert line.startswith("profile 64x32 to 64, 9 frames: context ")
    assert ", for any video of the range" in line
    lines = describe(planned(narrow, height="32,64", width=64, num_frames=9))
    assert len([line for line in lines if line.startswith("profile")]) == 2


def test_engines_of_any_size_have_no_profiles(narrow: Tiny) -> None:
    assert plan(narrow.bundle)["profiles"] == []


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        (["text_encoder", "transformer", "vae_decoder"], "all weights stay loaded"),
        (["transformer", "vae_decoder"], "transformer and vae_decoder stay loaded, the text encoder's engines are"),
        (["vae_decoder"], "vae_decoder stays loaded, the text encoder's engines are loaded one by one"),
    ],
)
def test_what_stays_loaded_is_named(narrow: Tiny, kept: list[str], words: str) -> None:
    manifest = open_bundle(narrow.bundle).manifest
    size = manifest.defaults.height, manifest.defaults.width, manifest.defaults.num_frames
    budget = make_plan(manifest, manifest.model.latent_shape(1, *size)).keeping(kept).peak_bytes
    report = plan(narrow.bundle, vram_budget=budget)
    assert (report["kept"], report["fits"]) == (kept, True)
    assert report["resident"] == (len(kept) == 3)
    assert any(words in line for line in describe(report))
