"""The self-test of a VAE decoder's tail: large frames are compared in a corner, all that the reference makes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from t2v_rt.engines.backends import get_backend
from t2v_rt.engines.bundle.manifest import ComponentSpec
from t2v_rt.engines.bundle.profiles import PlanProfile, PlanSpec, Range
from t2v_rt.engines.bundle.store import open_bundle
from t2v_rt.runtime import self_test
from t2v_rt.runtime.families import wan
from tests.conftest import Tiny

HEADS = ((6, 9), (12, 18))  # of latents
TAILS = ((12, 18), (24, 36), (13, 36))  # of features: the last is a tile
SMALL = 10  # features of a corner
SAME = 1e-5  # the order of sums may differ with the size


def planned(spec: ComponentSpec) -> ComponentSpec:
    """The same graphs in the places of plans."""
    graphs = {}
    for role, graph in spec.graphs.items():
        sizes = TAILS if role == "tail" else HEADS
        profiles = [PlanProfile({"height": Range.of(rows), "width": Range.of(columns)}, 1) for rows, columns in sizes]
        graphs[role] = replace(graph, plan=PlanSpec(tuple(profiles), 1))
    return replace(spec, graphs=graphs)


def test_a_corner_of_the_whole_is_what_the_reference_makes_alone(narrow: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wan, "CORNER", SMALL)
    bundle = open_bundle(narrow.bundle)
    model, spec = bundle.manifest.model, bundle.manifest.components["vae_decoder"]
    assert spec.tiles is not None
    built, made = planned(spec), []
    for shown in (built, spec):
        with get_backend("onnxruntime").load(narrow.bundle, "vae_decoder", shown) as component:
            calls = list(self_test.make_calls("vae_decoder", component, model, built))
            made.append({call.call.label: call for call in calls})
    own, reference = made
    assert own.keys() == reference.keys()
    assert {f"tail.{rows}x{columns}.{i}" for rows, columns in TAILS for i in (0, 1)} < own.keys()
    for label, call in own.items():
        assert np.abs(call.result - reference[label].result).max() < SAME, label
        if label.startswith("tail"):
            rows, columns = call.feeds["features"].shape[-2:]
            assert f"{rows}x{columns}" in label
            assert call.result.shape[-2:] == (SMALL * spec.tiles.upscale,) * 2
            fed = reference[label].feeds["features"].shape[-2:]
            assert fed == (min(rows, SMALL + spec.tiles.halo), min(columns, SMALL + spec.tiles.halo))
            assert np.abs(call.result).max() > 0.1
