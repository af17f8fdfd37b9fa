"""The first use of engines on a device: what is tested, how often engines are loaded for it, and what is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from t2v_rt import EngineError, TextToVideoPipeline
from t2v_rt.engines.bundle.manifest import ComponentSpec, Manifest
from t2v_rt.engines.bundle.store import Bundle, open_bundle
from t2v_rt.engines.onnxruntime.backend import OnnxRuntimeBackend, OrtComponent
from t2v_rt.runtime import first_use, self_test
from t2v_rt.runtime.memory.plan import make_plan
from tests.conftest import Tiny


class Card(OnnxRuntimeBackend):
    """The CPU under another name, a device that has to prove itself; it counts what it loads."""

    device = "card of the first use"

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []

    def load(self, folder: Path, name: str, spec: ComponentSpec) -> OrtComponent:
        self.loads.append(f"{name} {' '.join(spec.graphs)}")
        return super().load(folder, name, spec)


@pytest.fixture(autouse=True)
def untested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No verdicts of other tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def plain(narrow: Tiny) -> Manifest:
    return open_bundle(narrow.bundle).manifest


def streaming(pipe: TextToVideoPipeline) -> Any:
    """A plan that loads the text encoder's engines one by one."""
    return make_plan(pipe.manifest, (1, pipe.manifest.model.latents.channels, 2, 4, 6)).releasing()


def test_a_first_prompt_shares_its_load_with_the_test_of_the_text_encoder(sharded: Bundle) -> None:
    roles = list(sharded.manifest.components["text_encoder"].graphs)
    pipe = TextToVideoPipeline(sharded, card := Card())
    expected = TextToVideoPipeline.from_pretrained(sharded.folder).encode_prompt(["a red ball"])
    assert np.array_equal(pipe.stages.encode_prompt(["a red ball"], streaming(pipe)), expected)
    assert card.loads == [f"text_encoder {role}" for role in roles]
    assert first_use.is_proven(sharded, "text_encoder", card.device)


def test_a_test_that_was_left_in_the_middle_is_made_again(sharded: Bundle) -> None:
    pipe = TextToVideoPipeline(sharded, card := Card())
    engines = pipe.stages.components.engines("text_encoder", streaming(pipe))
    next(engines)
    engines.close()
    assert not first_use.is_proven(sharded, "text_encoder", card.device)


def test_no_engine_works_before_it_has_passed(sharded: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = TextToVideoPipeline(sharded, card := Card())
    monkeypatch.setattr(self_test, "largest_error", lambda *_: 0.5)
    with pytest.raises(EngineError, match="text_encoder computes something else on card of the first use"):
        pipe.stages.encode_prompt(["a red ball"], streaming(pipe))
    assert len(card.loads) == 1


def test_answers_have_the_names_of_the_calls(sharded: Bundle) -> None:
    for name, spec in open_bundle(sharded.folder).manifest.components.items():
        with np.load(sharded.folder / self_test.FOLDER / f"{name}.npz") as stored:
            assert {label.partition(".")[0] for label in stored.files} == set(spec.graphs)


def test_what_to_do_can_be_followed(plain: Manifest) -> None:
    plans = replace(plain, backend="tensorrt-rtx", attention_accumulation="fp32")
    half = replace(plans, attention_accumulation="fp16")
    assert first_use.remedy(plain) == "update the driver and the library"
    assert first_use.remedy(plans) == "update the driver, or build it again with --precision bf16"
    assert first_use.remedy(half).endswith("build it again with --attention-accumulation fp32")
