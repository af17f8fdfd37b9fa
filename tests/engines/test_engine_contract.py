"""The engine contract, one test over every backend: ONNX Runtime, and TensorRT on the card in host memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from t2v_rt import EngineError
from t2v_rt.engines.backends import Backend, get_backend, load_shards
from t2v_rt.engines.bundle.store import Bundle, open_bundle
from t2v_rt.engines.contract import Component, DeviceArray, Engine
from t2v_rt.engines.tensorrt.backend import TensorRTBackend
from t2v_rt.runtime import self_test
from tests.conftest import Tiny
from tests.support.card_slot import card_slot
from tests.support.host_card import HostLibrary, export_graphs, plans_by_hash
from tests.support.host_cuda import HostCuda

RTX = "tensorrt-rtx"
ROOM = 10**9  # bytes of the card
HEIGHT, WIDTH = 4, 6  # of latents, those that the plans are built for
TAIL = 2 * HEIGHT, 2 * WIDTH  # of what the tail of the decoder is fed
SIZES = {"batch": 1, "frames": 2, "height": HEIGHT, "width": WIDTH, "text": 5, "length": 5}
BACKENDS = ("onnxruntime", pytest.param(RTX, marks=pytest.mark.slow))


@pytest.fixture(scope="session")
def library(plans: Bundle, narrow: Tiny, tmp_path_factory: pytest.TempPathFactory) -> HostLibrary:
    """The library that reads them, on a card that holds nothing yet."""
    graphs = export_graphs(narrow.checkpoint, (None, None, None), tmp_path_factory.mktemp("graphs"))
    return HostLibrary(HostCuda(ROOM), plans.manifest.builder[RTX], plans_by_hash(plans, graphs))


@pytest.fixture(params=BACKENDS)
def bundle(request: pytest.FixtureRequest, narrow: Tiny) -> Bundle:
    return open_bundle(narrow.bundle) if request.param == "onnxruntime" else request.getfixturevalue("plans")


@pytest.fixture
def backend(
    bundle: Bundle, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[Backend]:
    """A backend that has the bundle's engines; a card gets all of its memory back in the end."""
    if bundle.manifest.backend == "onnxruntime":
        yield get_backend("onnxruntime")
        return
    library: HostLibrary = request.getfixturevalue("library")
    with card_slot(monkeypatch, tmp_path) as slot:
        slot.put(library)
        yield TensorRTBackend(bundle, trust=True)


def load(backend: Backend, bundle: Bundle, name: str) -> Component:
    return backend.load(bundle.folder, name, bundle.manifest.components[name])


@pytest.fixture
def vae(backend: Backend, bundle: Bundle) -> Iterator[Component]:
    with load(backend, bundle, "vae_decoder") as component:
        yield component


def random_feeds(engine: Engine, seed: int = 0, **sizes: int) -> dict[str, NDArray[Any]]:
    """What an engine may be fed, of its own dtypes."""
    rng = np.random.default_rng(seed)
    feeds = {}
    for spec in engine.inputs:
        values = rng.standard_normal(spec.resolve({**SIZES, **sizes}))
        feeds[spec.name] = (np.abs(values) if spec.dtype == "int64" else values).astype(spec.numpy_dtype)
    return feeds


def test_state_belongs_to_the_caller(vae: Component) -> None:
    one, two = (vae.new_state(height=HEIGHT, width=WIDTH, role_prefix="head") for _ in range(2))
    assert one.nbytes > 0
    assert not any(value.any() for value in one.to_host().values())
    first, later = vae["head_first"], vae["head_next"]
    features = first.infer(random_feeds(first), one)["features"]
    assert features.shape == (1, 16, *TAIL)
    assert np.array_equal(first.infer(random_feeds(first), two)["features"], features)
    found, same = (later.infer(random_feeds(later, 1), state)["features"] for state in (one, two))
    assert found.shape == (4, 16, *TAIL)
    assert np.array_equal(found, same)
    kept = one.to_host()
    later.infer(random_feeds(later, 2), one)
    assert any(not np.array_equal(kept[name], value) for name, value in one.to_host().items())


@pytest.mark.parametrize("resident", [None, 1, 2])
def test_states_of_one_turn_share_what_is_written(vae: Component, resident: int | None) -> None:
    height, width = TAIL
    tail = vae["tail"]
    alone = vae.new_state(height=height, width=width, role_prefix="tail")
    states = vae.new_states(3, height=height, width=width, role_prefix="tail", resident=resident)
    feeds = [random_feeds(tail, seed, height=height, width=width) for seed in range(3)]
    for _ in range(2):
        frames = [tail.infer(fed, state)["frames"] for fed, state in zip(feeds, states, strict=True)]
        assert np.array_equal(tail.infer(feeds[1], alone)["frames"], frames[1])
    kept = alone.to_host()
    assert all(np.array_equal(kept[name], value) for name, value in states[1].to_host().items())


def test_threads_with_a_state_each_do_not_mix(vae: Component) -> None:
    first, later = vae["head_first"], vae["head_next"]

    def decode(seed: int) -> list[NDArray[Any]]:
        state = vae.new_state(height=HEIGHT, width=WIDTH, role_prefix="head")
        calls = [(first, seed), (later, seed + 10), (later, seed + 20)]
        return [engine.infer(random_feeds(engine, i), state)["features"] for engine, i in calls]

    expected = [decode(seed) for seed in range(3)]
    found: dict[int, list[NDArray[Any]]] = {}
    threads = [threading.Thread(target=lambda seed=seed: found.update({seed: decode(seed)})) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(3):
        assert all(np.array_equal(one, other) for one, other in zip(found[seed], expected[seed], strict=True))


def test_outputs_outlive_the_next_call_and_the_engine(vae: Component) -> None:
    state = vae.new_state(height=HEIGHT, width=WIDTH, role_prefix="head")
    engine = vae["head_first"]
    features = engine.infer(random_feeds(engine), state)["features"]
    kept = features.copy()
    vae["head_next"].infer(random_feeds(engine, 1), state)
    assert np.array_equal(features, kept)
    features += 1  # they are the caller's
    vae.close()
    vae.close()
    assert np.array_equal(features, kept + 1)
    with pytest.raises(EngineError, match="the engine is closed; open the component again"):
        engine.infer(random_feeds(engine), state)


def test_kept_outputs_are_fed_where_they_lie(vae: Component) -> None:
    """Whole frames and windows of them, after other calls and in several threads, as what a caller would bring back."""
    height, width = TAIL
    first, later, tail = vae["head_first"], vae["head_next"], vae["tail"]

    def decode(seed: int, keep: bool) -> list[NDArray[Any]]:
        head = vae.new_state(height=HEIGHT, width=WIDTH, role_prefix="head")
        whole = vae.new_state(height=height, width=width, role_prefix="tail")
        frames = []
        for i, engine in enumerate((first, later, later)):
            feeds = random_feeds(engine, seed + i)
            given = engine.infer(feeds, head, keep=("features",) if keep else ())["features"]
            assert isinstance(given, np.ndarray) or isinstance(given, DeviceArray) == keep
            assert given.dtype == tail.inputs[0].numpy_dtype
            other = vae.new_state(height=HEIGHT, width=WIDTH, role_prefix="head")
            first.infer(random_feeds(first, 99), other, keep=("features",))  # which takes nothing that is kept
            frames += [tail.infer({"features": given[k : k + 1]}, whole)["frames"] for k in range(len(given))]
            assert np.array_equal(given.to_host() if isinstance(given, DeviceArray) else given, given_again(given))
        return frames

    def given_again(given: Any) -> NDArray[Any]:
        parts = [given[k : k + 1, :, :, 0:width] for k in range(len(given))]
        return np.concatenate([part.to_host() if isinstance(part, DeviceArray) else part for part in parts])

    expected = [decode(seed, keep=False) for seed in (0, 10)]
    found: dict[int, list[NDArray[Any]]] = {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: decode(10 * i, keep=True)})) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert all(np.array_equal(one, other) for one, other in zip(found[i], expected[i], strict=True))
    with pytest.raises(EngineError, match=r"\['colours'\] are to be kept"):
        first.infer(
            random_feeds(first), vae.new_state(height=HEIGHT, width=WIDTH, role_prefix="head"), keep=["colours"]
        )


@pytest.mark.parametrize("name", ["text_encoder", "transformer"])
def test_feeds_are_read_and_the_same_ones_give_the_same(backend: Backend, bundle: Bundle, name: str) -> None:
    """Also where a device keeps a copy of what can never change."""
    with load(backend, bundle, name) as component:
        (engine,) = component.engines.values()
        (output,) = (spec.name for spec in engine.outputs)
        feeds = random_feeds(engine)
        kept = {key: array.copy() for key, array in feeds.items()}
        expected = engine.infer(feeds)[output]
        assert all(np.array_equal(feeds[key], array) for key, array in kept.items())
        for array in feeds.values():
            array.flags.writeable = False
        for _ in range(2):
            assert np.array_equal(engine.infer(feeds)[output], expected)
            assert not np.array_equal(engine.infer(random_feeds(engine, 1))[output], expected)


@pytest.mark.parametrize("name", ["text_encoder", "transformer", "vae_decoder"])
def test_answers_are_those_that_the_bundle_was_built_with(backend: Backend, bundle: Bundle, name: str) -> None:
    parts = load_shards(backend, bundle.folder, name, bundle.manifest.components[name])
    assert self_test.check(name, parts, bundle.manifest, bundle.folder).passed


def test_what_crosses_the_boundary_is_declared(vae: Component) -> None:
    for engine in vae.engines.values():
        height, width = TAIL if engine is vae["tail"] else (HEIGHT, WIDTH)
        part = "tail" if engine is vae["tail"] else "head"
        state = vae.new_state(height=height, width=width, role_prefix=part)
        sizes = {"height": height, "width": width}
        outputs = engine.infer(random_feeds(engine, **sizes), state)
        assert list(outputs) == [spec.name for spec in engine.outputs]
        for spec in engine.outputs:
            assert spec.dtype in ("float32", "float16")
            assert outputs[spec.name].dtype == spec.numpy_dtype
            assert outputs[spec.name].shape == spec.resolve({**SIZES, **sizes})
            assert np.isfinite(outputs[spec.name]).all()


def test_feeds_are_checked(vae: Component) -> None:
    state = vae.new_state(height=HEIGHT, width=WIDTH, role_prefix="head")
    engine = vae["head_next"]
    fed = random_feeds(engine)
    latents = fed["latents"]
    for feeds, message in (
        ({}, "expected"),
        ({**fed, "more": np.zeros(1)}, "more"),
        ({"latents": latents.astype(np.float64)}, "float64"),
        ({"latents": np.zeros((1, 5, HEIGHT, WIDTH), latents.dtype)}, f"[1, 5, {HEIGHT}, {WIDTH}]"),
        ({"latents": np.zeros((HEIGHT, WIDTH), latents.dtype)}, f"expected {latents.dtype}"),
        ({"latents": np.zeros((1, 4, 2 * HEIGHT, WIDTH), latents.dtype)}, "make a new state"),
    ):
        with pytest.raises(EngineError) as error:
            engine.infer(feeds, state)
        assert message in str(error.value)
    with pytest.raises(EngineError, match="needs a state"):
        engine.infer(fed)
    with pytest.raises(EngineError, match="no engine 'third'"):
        vae["third"]
    assert np.isfinite(engine.infer(fed, state)["features"]).all()  # what was refused has spoilt nothing
