"""A bundle in huggingface_hub's cache: a snapshot whose files are links into blobs; links elsewhere stay refused."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from t2v_rt import BundleError, EngineError, TextToVideoPipeline
from t2v_rt.cli import main
from t2v_rt.commands.verify import verify
from t2v_rt.engines.bundle.store import open_bundle
from t2v_rt.engines.onnxruntime.linked_graph import real_graph
from tests.conftest import Tiny

COMMIT = "1234567890abcdef1234567890abcdef12345678"
pytestmark = pytest.mark.skipif(os.name != "posix", reason="the cache has copies where links need rights of their own")


def cached(bundle: Path, cache: Path, inside: str = "", *, shared: bool = False) -> Path:
    """Puts a bundle into a cache, as the client lays it out; returns its folder there.

    Args:
        bundle: to copy.
        cache: to make.
        inside: folder of the repository that it is in.
        shared: whether blobs are themselves links, into the store that the repositories of a cache share.
    """
    repository = cache / "models--owner--name"
    snapshot = repository / "snapshots" / COMMIT / inside
    (repository / "blobs").mkdir(parents=True)
    for file in bundle.rglob("*"):
        if file.is_file():
            name = hashlib.sha256(file.read_bytes()).hexdigest()
            blob = repository / "blobs" / name
            if shared:
                store = cache / "blobs" / name[:2] / name
                store.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, store)
                blob.unlink(missing_ok=True)
                blob.symlink_to(os.path.relpath(store, blob.parent))
            else:
                shutil.copy(file, blob)
            link = snapshot / file.relative_to(bundle)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


@pytest.mark.parametrize("layout", ["plain", "in a folder of the repository", "shared blobs", "cache behind a link"])
def test_it_opens_verifies_and_makes_the_same_video(narrow: Tiny, tmp_path: Path, layout: str) -> None:
    inside = "onnx/small" if layout == "in a folder of the repository" else ""
    folder = cached(narrow.bundle, tmp_path / "cache", inside, shared=layout == "shared blobs")
    if layout == "cache behind a link":
        (tmp_path / "link").symlink_to("cache")
        folder = tmp_path / "link" / folder.relative_to(tmp_path / "cache")
    assert open_bundle(folder).manifest == open_bundle(narrow.bundle).manifest
    assert verify(folder)["passed"]
    made, known = (
        TextToVideoPipeline.from_pretrained(place)("a red ball", seed=3).frames for place in (folder, narrow.bundle)
    )
    np.testing.assert_array_equal(made, known)


def test_the_commands_take_it(narrow: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(cached(narrow.bundle, tmp_path / "cache"))
    output = str(tmp_path / "video.npy")
    assert main(["inspect", folder]) == 0
    assert "all files as built" in capsys.readouterr().out
    assert main(["generate", "a ball", "--engines", folder, "--seed", "1", "--output", output]) == 0


def test_a_damaged_blob_is_found(narrow: Tiny, tmp_path: Path) -> None:
    folder = cached(narrow.bundle, tmp_path / "cache")
    blob = (folder / "transformer" / "weights.data").resolve()
    content = bytearray(blob.read_bytes())
    content[1000] ^= 1
    blob.write_bytes(content)
    with pytest.raises(BundleError, match=r"weights\.data is not the file that was built"):
        open_bundle(folder)


def test_links_elsewhere_stay_refused(narrow: Tiny, tmp_path: Path) -> None:
    for name, place in (
        ("outside", tmp_path / "elsewhere" / "weights.data"),
        ("other repository", tmp_path / "other repository" / "models--a--b" / "blobs" / "0123"),
        ("below blobs", tmp_path / "below blobs" / "models--owner--name" / "blobs" / "folder" / "0123"),
        ("beside blobs", tmp_path / "beside blobs" / "models--owner--name" / "refs" / "main"),
        ("shared, misnamed", tmp_path / "shared, misnamed" / "blobs" / "ab" / "0123"),
    ):
        folder = cached(narrow.bundle, tmp_path / name)
        link = folder / "transformer" / "weights.data"
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(link.resolve(), place)
        link.unlink()
        link.symlink_to(place)
        with pytest.raises(BundleError, match=r"weights\.data is a link that leaves the bundle"):
            open_bundle(folder)


def test_a_bundle_beside_a_folder_of_blobs_is_no_cache(narrow: Tiny, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(narrow.bundle, tmp_path / "place" / "bundle"))
    (tmp_path / "blobs").mkdir()
    file = folder / "transformer" / "weights.data"
    shutil.move(file, tmp_path / "blobs" / "0123")
    file.symlink_to(tmp_path / "blobs" / "0123")
    with pytest.raises(BundleError, match="a link that leaves the bundle"):
        open_bundle(folder)


def test_graphs_name_their_weights_as_they_are_called(narrow: Tiny, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    folder = cached(narrow.bundle, tmp_path / "cache")
    for graph in narrow.bundle.rglob("*.onnx"):
        assert real_graph(graph) is None  # an ordinary bundle is loaded from its files as they are
        linked = real_graph(folder / graph.relative_to(narrow.bundle))
        assert linked is not None
        content, place = linked
        found, known = onnx.load_from_string(content), onnx.load(str(graph), load_external_data=False)
        for tensor in found.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    assert (place / entry.value).is_file()
                    weights = graph.parent / ("weights.data" if graph.parent.name != "text_encoder" else graph.stem)
                    entry.value = weights.with_suffix(".data").name
        assert found == known


def test_a_file_that_is_no_graph_is_refused(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"\xff" * 40)
    for name in ("model.onnx", "weights.data"):
        (tmp_path / name).symlink_to("real")
    with pytest.raises(EngineError, match=r"model\.onnx is no ONNX graph"):
        real_graph(tmp_path / "model.onnx")
