"""What the manifest says of a model: sizes it can make, and its types."""

from __future__ import annotations

from typing import Any

import pytest

from t2v_rt import BundleError, RequestError
from t2v_rt.engines.bundle.manifest import Manifest, from_plain, to_plain
from t2v_rt.engines.bundle.model import DecodeSchedule
from t2v_rt.engines.bundle.store import open_bundle
from t2v_rt.runtime.families import family_of
from tests.conftest import Tiny

CAUSAL = DecodeSchedule(first=((1, 1),), next=(1, 4))  # as Wan has it
SINGLE = DecodeSchedule(first=((1, 1),), next=(1, 1))  # a frame for each latent frame
PAIRED = DecodeSchedule(first=((1, 1), (2, 8), (3, 9)), next=(2, 8))  # as CogVideoX has it


@pytest.mark.parametrize(
    ("schedule", "latents", "chunks", "frames"),
    [
        (CAUSAL, 1, [1], 1),
        (CAUSAL, 21, [1] * 21, 81),
        (SINGLE, 16, [1] * 16, 16),
        (PAIRED, 1, [1], 1),
        (PAIRED, 2, [2], 8),
        (PAIRED, 4, [2, 2], 16),
        (PAIRED, 13, [3, 2, 2, 2, 2, 2], 49),
    ],
)
def test_chunks_and_frames(schedule: DecodeSchedule, latents: int, chunks: list[int], frames: int) -> None:
    assert schedule.chunks(latents) == chunks
    assert schedule.frames(latents) == frames
    assert schedule.latents(frames) == latents


@pytest.mark.parametrize(
    ("schedule", "frames", "message"),
    [
        (CAUSAL, 80, "num_frames is 80; expected a multiple of 4 plus 1: the nearest valid value is 77 or 81"),
        (CAUSAL, 0, "the nearest valid value is 1$"),
        (CAUSAL, -5, "the nearest valid value is 1$"),
        (SINGLE, 0, "the nearest valid value is 1$"),
        (PAIRED, 45, "expected a multiple of 8 plus 0 or 1: the nearest valid value is 41 or 48"),
    ],
)
def test_other_numbers_of_frames_name_the_nearest(schedule: DecodeSchedule, frames: int, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        schedule.latents(frames)


def test_every_number_of_latent_frames_comes_back() -> None:
    for schedule in (CAUSAL, SINGLE, PAIRED):
        for latents in range(1, 60):
            assert sum(schedule.chunks(latents)) == latents
            assert schedule.latents(schedule.frames(latents)) == latents
    with pytest.raises(RequestError, match="0 latent frames cannot be decoded"):
        CAUSAL.chunks(0)


def test_sizes_and_shapes_belong_together(narrow: Tiny) -> None:
    model = open_bundle(narrow.bundle).manifest.model
    shape = model.latent_shape(2, 32, 48, 9)
    assert shape == (2, 4, 3, 4, 6)
    assert model.video_size(shape) == (32, 48, 9)
    assert model.steps == (16, 16)
    for size, message in (((40, 48, 9), "height is 40.*32 or 48"), ((32, 16 * 1025, 9), "at most 16384")):
        with pytest.raises(RequestError, match=message):
            model.check_size(*size)


def test_a_manifest_is_read_strictly(narrow: Tiny) -> None:
    plain = open_bundle(narrow.bundle).manifest.to_json()
    assert Manifest.from_json(plain).to_json() == plain
    changes: list[tuple[tuple[Any, ...], Any, str]] = [
        (("model", "latents", "channels"), "16", r"Expected `int`, got `str` - at `\$.model.latents.channels`"),
        (("model", "patch"), [1, 2], r"\$.model.patch"),
        (("defaults", "height"), True, r"\$.defaults.height"),
        (("components", "transformer", "precision"), None, r"\$.components\[...\].precision"),
        (("builder",), [], r"\$.builder"),
    ]
    for keys, value, message in changes:
        changed = to_plain(plain)
        place = changed
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
        with pytest.raises(BundleError, match=f"bundle.json is damaged .*{message}"):
            Manifest.from_json(changed)
        del place[keys[-1]]
        with pytest.raises(BundleError, match=f"bundle.json is damaged .*missing required field `{keys[-1]}`"):
            Manifest.from_json(changed)


def test_what_a_class_refuses_is_told_in_its_own_words(narrow: Tiny) -> None:
    plain = open_bundle(narrow.bundle).manifest.to_json()
    plain["components"]["transformer"]["graphs"]["model"]["inputs"][0]["dtype"] = "bfloat16"
    with pytest.raises(BundleError, match=r"^tensor 'hidden_states' has dtype 'bfloat16'; expected one of float32"):
        Manifest.from_json(plain)


def test_an_unknown_family_is_refused(narrow: Tiny) -> None:
    model = open_bundle(narrow.bundle).manifest.model
    unknown = from_plain({**to_plain(model), "family": "sora"}, type(model))
    with pytest.raises(BundleError, match="of the family 'sora'; this version knows wan"):
        family_of(unknown)
