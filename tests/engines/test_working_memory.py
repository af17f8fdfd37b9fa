"""What engines of a GPU work in, and outputs that stay there, on the card in host memory (see `host_card`)."""

from __future__ import annotations

import gc
import itertools
import sys
import threading

import numpy as np
import pytest

from t2v_rt.engines.specs import ALIGNMENT
from t2v_rt.engines.tensorrt.cuda import Cuda, DeviceBuffer
from t2v_rt.engines.tensorrt.device_array import GpuArray, Loan
from t2v_rt.engines.tensorrt.working_memory import StateBuffer, WorkingMemory
from t2v_rt.errors import EngineError, OutOfMemoryError
from tests.support.host_cuda import HostCuda

DENOISE, STATES, DECODE = 40 * ALIGNMENT, 30 * ALIGNMENT, 16 * ALIGNMENT  # bytes


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> HostCuda:
    card = HostCuda(10**6)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", card)
    return card


@pytest.fixture
def cuda(card: HostCuda) -> Cuda:
    return Cuda("tensorrt-rtx")


@pytest.fixture
def memory(cuda: Cuda) -> WorkingMemory:
    return WorkingMemory(cuda.allocate, threading.RLock())


def begin_decode(memory: WorkingMemory) -> list[StateBuffer]:
    """States of a head and of a tail, whose calls work in less and in more."""
    parts = [(STATES // 3, DECODE // 2), (STATES // 3, DECODE), (STATES // 3, DECODE)]
    states = [memory.state_buffer(nbytes, beside) for nbytes, beside in parts]
    assert all(state.address % ALIGNMENT == 0 for state in states)
    return states


def test_states_lie_where_the_denoiser_works(card: HostCuda, memory: WorkingMemory) -> None:
    memory.workspace(DENOISE)
    for video in range(3):
        states = begin_decode(memory)
        for work in (DECODE // 2, DECODE):
            address, room = memory.workspace(work)
            assert room >= work
            assert all(not address <= state.address < address + work for state in states)
        assert card.peak == max(DENOISE, STATES + DECODE)
        del states
        if video == 0:
            taken = card.taken
        memory.workspace(DENOISE)
    assert card.taken == taken
    memory.release()
    assert card.used() == 0


def test_states_do_not_overlap(card: HostCuda, memory: WorkingMemory) -> None:
    states = [memory.state_buffer(nbytes, 0) for nbytes in (1, ALIGNMENT, ALIGNMENT + 1, 7)]
    spans = sorted((state.address, state.address + state.nbytes) for state in states)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    assert card.used() == 5 * ALIGNMENT


def test_a_second_video_has_an_arena_while_it_lives(card: HostCuda, memory: WorkingMemory) -> None:
    first = begin_decode(memory)
    kept = [state.address for state in first]
    memory.workspace(DENOISE)  # of another video, which the states leave no room for
    assert card.used() == STATES + DECODE + DENOISE
    second = begin_decode(memory)
    assert card.used() == card.peak == 2 * (STATES + DECODE)
    assert [state.address for state in first] == kept
    del first
    memory.workspace(DECODE)
    assert card.used() == STATES + DECODE
    del second
    memory.workspace(DENOISE)
    assert card.used() == STATES + DECODE


def test_what_states_are_in_is_not_given_back(card: HostCuda, memory: WorkingMemory) -> None:
    states = begin_decode(memory)
    memory.release()
    assert card.used() == STATES + DECODE
    memory.workspace(DECODE)  # still before them
    memory.release()
    assert card.used() == card.peak == STATES + DECODE
    del states
    assert card.used() == 0


def test_states_that_find_no_room_are_an_error_of_their_first_use(card: HostCuda, memory: WorkingMemory) -> None:
    state = memory.state_buffer(card.capacity, 1)
    with pytest.raises(OutOfMemoryError, match="1 MB on the GPU"):
        _ = state.address
    assert card.used() == 0


def test_windows_are_those_of_an_array(card: HostCuda, cuda: Cuda) -> None:
    shape, shelf = (3, 4, 5, 6), list[DeviceBuffer]()
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    loan = Loan(cuda.allocate(values.nbytes), shelf)
    cuda.upload(_pinned(cuda, values), loan.buffer)
    whole = GpuArray(cuda, loan, values.dtype, shape)
    parts = [
        [slice(i, j) for i, j in itertools.combinations(range(size + 1), 2) if (i, j) in ((0, size), (1, 2), (1, size))]
        for size in shape
    ]
    target = cuda.allocate(values.nbytes)
    card.moved.clear()
    for window in itertools.product(*parts):
        expected, part = values[window], whole[window]
        assert (part.shape, part.dtype, part.nbytes) == (expected.shape, expected.dtype, expected.nbytes)
        assert np.array_equal(whole[window].to_host(), expected)
        card.moved.clear()
        part.copy_to(target)
        assert card.moved == {"dd": expected.nbytes}
        found = card.view("d", target.address, expected.nbytes).view(np.float32).reshape(expected.shape)
        assert np.array_equal(found, expected)
        address = part.address - whole.address
        assert part.can_be_fed == (expected.flags.c_contiguous and address % ALIGNMENT == 0)
        assert np.array_equal(part[:1, 0:1].to_host(), expected[:1, 0:1])
    with pytest.raises(EngineError, match="step 2"):
        _ = whole[::2]


def test_rows_of_a_channel_are_one_copy(card: HostCuda, cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    array = GpuArray(cuda, Loan(cuda.allocate(4 * 8 * 9 * 10), []), np.dtype(np.float32), (1, 8, 9, 10))
    calls: list[tuple[int, int]] = []
    copy = Cuda.copy_rows

    def counted(self: Cuda, source: int, pitch: int, target: int, width: int, rows: int) -> None:
        calls.append((width, rows))
        copy(self, source, pitch, target, width, rows)

    monkeypatch.setattr(Cuda, "copy_rows", counted)
    target = cuda.allocate(array.nbytes)
    for columns, expected in ((slice(2, 7), [(20, 5)] * 8), (slice(None), [(5 * 40, 8)])):
        calls.clear()
        array[:, :, 3:8, columns].copy_to(target)
        assert calls == expected


def test_a_buffer_is_free_once_no_window_of_it_is_left(cuda: Cuda) -> None:
    shelf: list[DeviceBuffer] = []
    array = GpuArray(cuda, Loan(cuda.allocate(96), shelf), np.dtype(np.float32), (4, 6))
    window = array[1:2]
    del array
    gc.collect()
    assert not shelf
    del window
    gc.collect()
    assert len(shelf) == 1


def _pinned(cuda: Cuda, values: np.ndarray) -> np.ndarray:
    array = cuda.host_array(values.shape, values.dtype)
    array[...] = values
    return array
