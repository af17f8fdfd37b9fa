"""Shape profiles: how sizes are read, which one fits, and what the manifest keeps of them."""

from __future__ import annotations

import json

import pytest

from t2v_rt.engines.bundle.manifest import from_plain, to_plain
from t2v_rt.engines.bundle.profiles import PlanProfile, PlanSpec, Range, VideoProfile, nearest_profile, parse_profiles
from t2v_rt.errors import RequestError

DEFAULTS = (480, 832, 81)


def test_sizes_are_single_values_ranges_or_several() -> None:
    (one,) = parse_profiles(None, 640, None, DEFAULTS)
    assert one == VideoProfile(Range.of(480), Range.of(640), Range.of(81))
    assert str(one) == "640x480, 81 frames"
    (ranged,) = parse_profiles("480:720", "832:1280", "17:49:81", DEFAULTS)
    assert ranged == VideoProfile(Range(480, 720, 720), Range(832, 1280, 1280), Range(17, 49, 81))
    assert str(ranged) == "832 to 1280x480 to 720, 17 to 81 frames"
    several = parse_profiles("480, 832", "832,480", "81", DEFAULTS)
    assert [str(profile) for profile in several] == ["832x480, 81 frames", "480x832, 81 frames"]


@pytest.mark.parametrize(
    ("height", "width", "message"),
    [
        ("tall", None, "height is 'tall'; expected a size"),
        ("1:2:3:4", None, "expected a size"),
        ("480:", None, "expected a size"),
        ("-16", None, "expected a size"),
        (0, None, "min <= opt <= max"),
        ("720:480", None, "min <= opt <= max"),
        ("480,720", "832,1280,16", "height names 2 sizes, another 3"),
    ],
)
def test_other_sizes_are_refused(height: int | str, width: str | None, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        parse_profiles(height, width, None, DEFAULTS)


def test_the_nearest_profile() -> None:
    wide = {"height": Range.of(60), "width": Range.of(104)}
    tall = {"height": Range.of(104), "width": Range(60, 60, 80)}
    assert nearest_profile([wide, tall], {"height": 60, "width": 104}) == (0, {"height": 60, "width": 104})
    assert nearest_profile([wide, tall], {"height": 104, "width": 70}) == (1, {"height": 104, "width": 70})
    assert nearest_profile([wide, tall], {"height": 96, "width": 90}) == (1, {"height": 104, "width": 80})


def test_plans_survive_the_manifest() -> None:
    spec = PlanSpec((PlanProfile({"height": Range(1, 2, 3)}, 5), PlanProfile({"height": Range.of(9)}, 6)), 7)
    assert from_plain(json.loads(json.dumps(to_plain(spec))), PlanSpec) == spec
    profile = parse_profiles("480:720", None, None, DEFAULTS)[0]
    assert from_plain(json.loads(json.dumps(to_plain(profile))), VideoProfile) == profile
    assert 2 in Range(1, 2, 3)
    assert 4 not in Range(1, 2, 3)
    assert "2" not in Range(1, 2, 3)
