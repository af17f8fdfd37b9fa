"""Engine state on a device with memory of its own: which states have their buffers there, and which are parked.

Knows nothing of CUDA: it works on whatever allocates, clears and copies buffers.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from t2v_rt.engines.contract import EngineState, rotate
from t2v_rt.engines.specs import StateSpec, TensorSpec

B = TypeVar("B")


class Memory(Protocol[B]):
    """Buffers of a device; all calls take effect in the order they are made."""

    def allocate(self, nbytes: int) -> B:
        """A buffer, not cleared; raises OutOfMemoryError."""
        ...

    def host_array(self, shape: Sequence[int], dtype: np.dtype[Any]) -> NDArray[Any]:
        """An array that buffers are copied from and to."""
        ...

    def zero(self, buffer: B) -> None:
        """Clears a buffer."""
        ...

    def upload(self, array: NDArray[Any], buffer: B) -> None:
        """Copies to the device."""
        ...

    def download(self, buffer: B, array: NDArray[Any]) -> None:
        """Copies from the device."""
        ...

    def synchronize(self) -> None:
        """Waits for all of it."""
        ...


class StateGroup(Generic[B]):
    """States that are used one after another: they share what a call writes, and a number of places on the device.

    Args:
        memory: of the device.
        tensors: of one state.
        written: those of them that calls write.
        sizes: of the tensors' symbols.
        count: number of states.
        resident: how many states have their buffers on the device at a time; None for all.
        allocate: makes the buffers; None for what the memory does.

    Raises:
        OutOfMemoryError: no room for the buffers.
    """

    def __init__(
        self,
        memory: Memory[B],
        tensors: Sequence[TensorSpec],
        written: Sequence[TensorSpec],
        sizes: Mapping[str, int],
        count: int,
        resident: int | None = None,
        allocate: Callable[[int], B] | None = None,
    ) -> None:
        self.memory, self.tensors, self.sizes = memory, tuple(tensors), dict(sizes)
        self._places = count if resident is None else max(1, min(resident, count))
        self._used: list[tuple[weakref.ref[DeviceState[B]], dict[str, B]]] = []  # used longest ago comes first
        make = memory.allocate if allocate is None else allocate

        def buffers(specs: Sequence[TensorSpec]) -> dict[str, B]:
            return {spec.name: make(spec.nbytes(self.sizes)) for spec in specs}

        self.spare = buffers(written)
        self._free = [buffers(tensors) for _ in range(self._places)]

    def activate(self, state: DeviceState[B]) -> dict[str, B]:
        """The buffers of a state, on the device; another state is parked for them where no place is free."""
        if state.current is None:
            alive = []
            for ref, buffers in self._used:
                if ref() is None:  # the state was dropped, its place is free
                    self._free.append(buffers)
                else:
                    alive.append((ref, buffers))
            self._used = alive
            if not self._free:
                oldest = self._used.pop(0)[0]()
                assert oldest is not None
                self._free.append(self._park(oldest))
            state.current = self._free.pop()
            self._fill(state, state.current)
        self._used = [item for item in self._used if item[0]() is not state]
        self._used.append((weakref.ref(state), state.current))
        return state.current

    def _park(self, state: DeviceState[B]) -> dict[str, B]:
        """Saves a state in host memory and returns the buffers it had."""
        assert state.current is not None
        if state.parked is None:
            shapes = {spec.name: (spec.resolve(self.sizes), spec.numpy_dtype) for spec in self.tensors}
            state.parked = {name: self.memory.host_array(*shape) for name, shape in shapes.items()}
        for name, array in state.parked.items():
            self.memory.download(state.current[name], array)
        buffers, state.current = state.current, None
        return buffers

    def _fill(self, state: DeviceState[B], buffers: Mapping[str, B]) -> None:
        for name, buffer in buffers.items():
            if state.parked is None:
                self.memory.zero(buffer)
            else:
                self.memory.upload(state.parked[name], buffer)


def new_states(group: StateGroup[B], count: int) -> list[DeviceState[B]]:
    """Zero-filled states of a group, which lives as long as they do."""
    return [DeviceState(group) for _ in range(count)]


class DeviceState(EngineState, Generic[B]):
    """One state of a group.

    Args:
        group: that it is one of.
    """

    def __init__(self, group: StateGroup[B]) -> None:
        self.group = group
        self.sizes = group.sizes
        self.current: dict[str, B] | None = None  # its buffers, while it has a place on the device
        self.parked: dict[str, NDArray[Any]] | None = None  # host memory for when it has none, once it was parked

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors, wherever they are, and of the spare buffers."""
        size = {spec.name: spec.nbytes(self.sizes) for spec in self.group.tensors}
        return sum(size.values()) + sum(size[name] for name in self.group.spare)

    def rotate(self, states: Sequence[StateSpec]) -> None:
        """After a call that wrote the spare buffers, lets these become the state."""
        assert self.current is not None
        rotate(states, self.current, self.group.spare)

    def to_host(self) -> dict[str, NDArray[Any]]:
        memory, result = self.group.memory, {}
        for name, buffer in self.group.activate(self).items():
            spec = next(spec for spec in self.group.tensors if spec.name == name)
            result[name] = memory.host_array(spec.resolve(self.sizes), spec.numpy_dtype)
            memory.download(buffer, result[name])
        memory.synchronize()
        return {name: np.array(array) for name, array in result.items()}
