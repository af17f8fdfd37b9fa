"""State on a device with memory of its own: real engines on buffers that are parked and brought back."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from t2v_rt.engines.bundle.store import open_bundle
from t2v_rt.engines.contract import EngineState, Feeds
from t2v_rt.engines.onnxruntime.backend import OnnxRuntimeBackend, OrtComponent, OrtEngine
from t2v_rt.engines.tensorrt.device_state import DeviceState, StateGroup, new_states
from t2v_rt.runtime.decode.tile_decoder import FrameDecoder
from t2v_rt.runtime.noise import Generator
from tests.conftest import Tiny

HEIGHT, WIDTH, FRAMES = 11, 13, 3
Buffer = NDArray[np.uint8]


class HostMemory:
    """The host as a device: bytes that are counted, and never cleared by chance."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self.copied = 0

    def allocate(self, nbytes: int) -> Buffer:
        self.buffers.append(np.full(nbytes, 255, np.uint8))
        return self.buffers[-1]

    def host_array(self, shape: Sequence[int], dtype: np.dtype[Any]) -> NDArray[Any]:
        return np.full(tuple(shape), 7, dtype)

    def zero(self, buffer: Buffer) -> None:
        buffer[:] = 0

    def upload(self, array: NDArray[Any], buffer: Buffer) -> None:
        self.copied += array.nbytes
        buffer[:] = array.view(np.uint8).reshape(-1)

    def download(self, buffer: Buffer, array: NDArray[Any]) -> None:
        self.copied += array.nbytes
        array.view(np.uint8).reshape(-1)[:] = buffer

    def synchronize(self) -> None:
        pass

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers)


class Engine(OrtEngine):
    """ONNX Runtime on state that lies in such a device's buffers."""

    def _run(self, feeds: Feeds, state: EngineState | None, keep: Sequence[str]) -> dict[str, NDArray[Any]]:
        assert isinstance(state, DeviceState)
        assert self._session is not None
        current = state.group.activate(state)
        shapes = {spec.name: (spec.numpy_dtype, spec.resolve(state.sizes)) for spec in state.group.tensors}
        given = {
            item.input: current[item.tensor.name].view(shapes[item.tensor.name][0]).reshape(shapes[item.tensor.name][1])
            for item in self.states
            if item.input is not None
        }
        written = [item for item in self.states if item.output is not None]
        names = [spec.name for spec in self.outputs]
        values = self._session.run([*names, *(item.output for item in written)], {**feeds, **given})
        for item, value in zip(written, values[len(names) :], strict=True):
            state.group.spare[item.tensor.name][:] = np.ascontiguousarray(value).view(np.uint8).reshape(-1)
        state.rotate(self.states)
        return dict(zip(names, values, strict=False))


class Decoder(OrtComponent):
    memory: HostMemory

    def new_states(  # type: ignore[override]
        self, count: int, *, height: int, width: int, role_prefix: str = "", resident: int | None = None
    ) -> list[DeviceState[Buffer]]:
        sizes = {"height": height, "width": width}
        return new_states(
            StateGroup(self.memory, self.states(role_prefix), self.written(role_prefix), sizes, count, resident), count
        )


@pytest.fixture
def loaded(narrow: Tiny) -> OrtComponent:
    bundle = open_bundle(narrow.bundle)
    return OnnxRuntimeBackend().load(bundle.folder, "vae_decoder", bundle.manifest.components["vae_decoder"])


@pytest.fixture
def vae(loaded: OrtComponent) -> Decoder:
    engines = {}
    for role, engine in loaded.engines.items():
        assert isinstance(engine, OrtEngine)
        assert engine._session is not None
        engines[role] = Engine(engine.name, engine.spec, engine._session)
    result = Decoder(loaded.name, loaded.spec, engines)
    result.memory = HostMemory()
    return result


def decoded(vae: OrtComponent, grid: tuple[int, int], parks: bool) -> NDArray[np.float32]:
    latents = Generator(1).randn((FRAMES, 1, 4, 1, HEIGHT, WIDTH))
    decoder = FrameDecoder(vae, HEIGHT, WIDTH, grid, parks)
    return np.concatenate([decoder.decode(latent) for latent in latents])


@pytest.mark.parametrize(("grid", "parks"), [((1, 1), False), ((2, 2), False), ((2, 2), True), ((1, 3), True)])
def test_frames_do_not_depend_on_where_states_are(
    vae: Decoder, loaded: OrtComponent, grid: tuple[int, int], parks: bool
) -> None:
    assert np.array_equal(decoded(vae, grid, parks), decoded(loaded, grid, False))
    assert (vae.memory.copied > 0) == parks


def test_memory_is_what_was_planned(vae: Decoder) -> None:
    one, spare = (
        sum(spec.nbytes({"height": 4, "width": 6}) for spec in part("tail")) for part in (vae.states, vae.written)
    )
    states = vae.new_states(5, height=4, width=6, role_prefix="tail")
    assert vae.memory.nbytes == 5 * one + spare
    assert states[0].nbytes == one + spare
    vae.memory.buffers.clear()
    vae.new_states(5, height=4, width=6, role_prefix="tail", resident=2)
    assert vae.memory.nbytes == 2 * one + spare
    assert 0.4 * one < spare < 0.6 * one  # of two frames of each convolution's input, one is written


def test_the_one_used_longest_ago_is_parked(vae: Decoder) -> None:
    states = vae.new_states(3, height=4, width=6, role_prefix="tail", resident=2)
    for i in (0, 1, 0, 2):
        states[0].group.activate(states[i])
    assert [state.current is None for state in states] == [False, True, False]
    assert states[1].parked is not None
    assert not any(array.any() for array in states[1].parked.values())


def test_a_dropped_state_leaves_its_place(vae: Decoder) -> None:
    states = vae.new_states(3, height=4, width=6, role_prefix="tail", resident=1)
    group = states[0].group
    group.activate(states[0])
    del states[0]
    gc.collect()
    group.activate(states[0])
    assert states[0].current is not None
    assert vae.memory.copied == 0


def test_a_copy_is_the_callers(vae: Decoder) -> None:
    (state,) = vae.new_states(1, height=4, width=6, role_prefix="tail")
    copies = state.to_host()
    assert set(copies) == {spec.name for spec in vae.states("tail")}
    assert not any(array.any() for array in copies.values())
    features = Generator(0).randn((1, 16, 4, 6))
    vae["tail"].infer({"features": features}, state)
    assert not any(array.any() for array in copies.values())
    assert any(array.any() for array in state.to_host().values())
