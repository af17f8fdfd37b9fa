"""A bundle that is replaced, edited, removed or moved away from under an open pipeline."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from t2v_rt import BundleError, TextToVideoPipeline, build_engines
from t2v_rt.benchmarks.recorder import ForwardedBackend
from t2v_rt.engines.backends import get_backend
from t2v_rt.engines.bundle.manifest import ComponentSpec
from t2v_rt.engines.bundle.store import check_manifest, open_bundle
from t2v_rt.engines.contract import Component
from t2v_rt.runtime.stages import Stages
from tests.support.demo_bundle import CHECKPOINT, build_demo, other_checkpoint

REPLACED = "was replaced or removed since it was opened; open it again"
BUDGET = 26_000_000  # engines are released after each stage


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_demo(tmp_path_factory.mktemp("original"))


@pytest.fixture(scope="module")
def another(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of another checkpoint, with files of the same names and sizes."""
    folder = tmp_path_factory.mktemp("another")
    build_engines(other_checkpoint(folder / "checkpoint"), folder / "bundle")
    return folder / "bundle"


@pytest.fixture
def bundle(original: Path, tmp_path: Path) -> Path:
    """A copy that the test may do anything to."""
    return Path(shutil.copytree(original, tmp_path / "bundle"))


def open_pipe(bundle: Path, budget: int | None = None, prompt_cache: bool = False) -> TextToVideoPipeline:
    return TextToVideoPipeline.from_pretrained(bundle, vram_budget=budget, prompt_cache=prompt_cache)


def make(pipe: TextToVideoPipeline, prompt: str = "a red ball") -> np.ndarray:
    return np.asarray(pipe(prompt, seed=7, num_inference_steps=1, num_frames=5).frames)


def replace(bundle: Path, other: Path) -> None:
    """As `build-engines --force` does: a whole folder in the place of the old one."""
    aside = bundle.with_name("aside")
    shutil.copytree(other, bundle.with_name("new"))
    bundle.rename(aside)
    bundle.with_name("new").rename(bundle)
    shutil.rmtree(aside)


def edit(file: Path) -> None:
    """Changes bytes in the middle, in place; the size stays."""
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 400] = bytes(byte ^ 0x55 for byte in content[middle : middle + 400])
    with file.open("r+b") as stream:
        stream.write(content)


def test_a_bundle_of_another_checkpoint_is_not_used_under_the_old_identity(bundle: Path, another: Path) -> None:
    pipe = open_pipe(bundle)
    replace(bundle, another)
    with pytest.raises(BundleError, match=REPLACED):
        make(pipe)
    assert open_pipe(bundle).manifest.bundle_id != pipe.manifest.bundle_id


def test_the_answers_of_a_running_service_with_a_budget_do_not_change(bundle: Path, another: Path) -> None:
    pipe = open_pipe(bundle, BUDGET)
    make(pipe)
    replace(bundle, another)
    with pytest.raises(BundleError, match=REPLACED):
        make(pipe)


def test_engines_that_are_loaded_go_on_when_the_bundle_is_replaced_as_a_whole(bundle: Path, another: Path) -> None:
    pipe = open_pipe(bundle)
    expected = make(pipe)
    replace(bundle, another)
    assert np.array_equal(make(pipe), expected)
    with pytest.raises(BundleError, match=REPLACED):  # a new prompt needs the embedding's file
        make(pipe, "a blue square")


def test_nothing_of_a_replaced_bundle_is_put_into_the_prompt_cache(
    bundle: Path, original: Path, another: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pipe = open_pipe(bundle, prompt_cache=True)
    replace(bundle, another)
    with pytest.raises(BundleError, match=REPLACED):
        pipe.encode_prompt(["a green disc"])
    assert not list((tmp_path / "cache").rglob("prompts/*"))
    found = open_pipe(original, prompt_cache=True).encode_prompt(["a green disc"])
    assert np.array_equal(found, open_pipe(original).encode_prompt(["a green disc"]))
    assert list((tmp_path / "cache").rglob("prompts/*"))


@pytest.mark.parametrize(
    "file",
    [
        "text_encoder/embedding.data",
        "text_encoder/blocks_0.onnx",
        "text_encoder/blocks_0.data",
        "transformer/model.onnx",
        "transformer/weights.data",
        "vae_decoder/weights.data",
        "vae_decoder/tail.onnx",
    ],
)
@pytest.mark.parametrize("change", [edit, Path.unlink])
def test_a_file_that_was_edited_or_removed_after_the_opening_is_refused(
    bundle: Path, file: str, change: Callable[[Path], None]
) -> None:
    pipe = open_pipe(bundle)
    assert file in pipe.manifest.files
    change(bundle / file)
    with pytest.raises(BundleError, match=f"{file} is not the file that was opened; the bundle {REPLACED}"):
        make(pipe)


def test_weights_that_are_edited_under_loaded_engines_are_noticed_before_they_are_used(bundle: Path) -> None:
    pipe = open_pipe(bundle)
    make(pipe)
    edit(bundle / "transformer" / "weights.data")
    with pytest.raises(BundleError, match=REPLACED):
        make(pipe)


def test_a_tokenizer_that_was_edited_after_the_opening_is_not_read(bundle: Path) -> None:
    opened = open_bundle(bundle)
    tokenizer = bundle / "tokenizer" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text(encoding="utf-8") + " ", encoding="utf-8")
    with pytest.raises(BundleError, match=REPLACED):
        TextToVideoPipeline(opened, get_backend("onnxruntime"))


def test_a_manifest_that_is_another_by_now_is_noticed(bundle: Path, another: Path) -> None:
    opened = open_bundle(bundle)
    check_manifest(opened)
    shutil.copy(another / "bundle.json", bundle / "bundle.json")
    with pytest.raises(BundleError, match="was replaced since it was opened"):
        check_manifest(opened)


def test_a_folder_that_is_gone_is_called_so(bundle: Path) -> None:
    pipe = open_pipe(bundle)
    shutil.rmtree(bundle)
    with pytest.raises(BundleError, match=REPLACED):
        make(pipe)


def test_a_bundle_that_was_built_again_with_the_same_bytes_goes_on(bundle: Path, original: Path) -> None:
    pipe = open_pipe(bundle, BUDGET)
    expected = make(pipe)
    build_engines(CHECKPOINT, bundle, force=True)
    assert np.array_equal(make(pipe), expected)
    replace(bundle, original)
    assert np.array_equal(make(pipe), expected)


@dataclass(frozen=True)
class Interrupted(ForwardedBackend):
    """A backend during whose load something happens to the bundle."""

    before: Callable[[], None]
    after: Callable[[], None]

    def load(self, folder: Path, name: str, spec: ComponentSpec) -> Component:
        self.before()
        component = super().load(folder, name, spec)
        self.after()
        return component


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_bundle_that_is_replaced_while_an_engine_is_loaded_is_refused(bundle: Path, another: Path, when: str) -> None:
    events: dict[str, Callable[[], None]] = {"before": lambda: None, "after": lambda: None}
    events[when] = lambda: replace(bundle, another)
    opened = open_bundle(bundle)
    stages = Stages(opened, Interrupted(get_backend("onnxruntime"), **events))
    with pytest.raises(BundleError, match=REPLACED):
        stages.components.get("transformer")
    with pytest.raises(BundleError, match=REPLACED):  # nothing of it was kept
        stages.components.get("transformer")


def test_an_engine_that_cannot_be_loaded_because_its_file_was_replaced_says_so(bundle: Path) -> None:
    def spoil() -> None:
        (bundle / "transformer" / "model.onnx").write_bytes(b"no graph")

    stages = Stages(open_bundle(bundle), Interrupted(get_backend("onnxruntime"), spoil, lambda: None))
    with pytest.raises(BundleError, match=REPLACED):
        stages.components.get("transformer")


def test_a_relative_path_is_that_of_the_opening(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bundle.parent)
    pipe = open_pipe(Path(bundle.name))
    (tmp_path / "elsewhere").mkdir()
    os.chdir(tmp_path / "elsewhere")
    assert pipe.bundle.folder == bundle
    assert make(pipe).shape == (1, 5, 64, 64, 3)
