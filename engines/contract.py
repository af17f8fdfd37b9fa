"""The engine contract: what every backend gives, and what the runtime relies on.

- An engine holds nothing of a request: two threads may call one engine at the same time, each with its own state.
- Feeds are NumPy arrays of exactly the declared dtypes and shapes, with any strides; they are read, never kept or
  changed. A read-only one (`flags.writeable` is False) must stay as it is for as long as it lives: a device may keep
  its copy.
- Outputs are NumPy arrays that belong to the caller and stay valid after the next call and after `close()`.
- An output that a call is asked to keep stays where the engine works, and is what another engine of the component may
  be fed, whole or a window of it: `kept[i : i + 1, :, rows, columns]`. Where engines work in the host's memory it is a
  NumPy array, else a `DeviceArray`. It belongs to the caller and stays valid as well; its memory serves later calls
  once nothing refers to it or a window of it any more.
- State is made by the component, owned by the caller (one per video, one per tile), kept on the device between calls
  and shared by the component's engines. If a call fails, the state it was given must not be used again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from math import prod
from types import TracebackType
from typing import Any, Self, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from t2v_rt.engines.bundle.manifest import ComponentSpec, GraphSpec
from t2v_rt.engines.specs import StateSpec, TensorSpec
from t2v_rt.errors import EngineError

T = TypeVar("T")


class DeviceArray(ABC):
    """An output that was kept where its engine works, or a window of it, which lies there as well."""

    @property
    @abstractmethod
    def dtype(self) -> np.dtype[Any]:
        """Of its values."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""

    @property
    def nbytes(self) -> int:
        """Of its values."""
        return prod(self.shape) * self.dtype.itemsize

    @abstractmethod
    def __getitem__(self, window: slice | tuple[slice, ...]) -> Self:
        """A window, without a copy: a slice of step 1 for each of the first dimensions, as of a NumPy array."""

    @abstractmethod
    def to_host(self) -> NDArray[Any]:
        """A copy on the host."""

    def __len__(self) -> int:
        return self.shape[0]


Array = NDArray[Any] | DeviceArray
Feeds = Mapping[str, Array]


def rotate(states: Sequence[StateSpec], current: MutableMapping[str, T], spare: MutableMapping[str, T]) -> None:
    """Lets buffers change places after a call, so that what it wrote becomes the state; nothing is copied.

    Args:
        states: of the engine that was called.
        current: name -> buffer that holds the state.
        spare: name -> buffer that a call writes, of the written states.
    """
    followers = {state.follows: state.tensor.name for state in states if state.follows is not None}
    for state in states:
        if state.output is not None:
            name = state.tensor.name
            last = followers.get(name, name)
            freed = current[last]
            if last != name:
                current[last] = current[name]
            current[name], spare[name] = spare[name], freed


class EngineState(ABC):
    """Tensors that stay on the device from call to call; made by `Component.new_state`."""

    sizes: Mapping[str, int]

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes held on the device."""

    @abstractmethod
    def to_host(self) -> dict[str, NDArray[Any]]:
        """Copies of all tensors by name."""


class Engine(ABC):
    """A loaded engine: one graph of a component.

    Args:
        name: component and role, named in errors.
        spec: what crosses the engine's boundary.
    """

    def __init__(self, name: str, spec: GraphSpec) -> None:
        self.name = name
        self.spec = spec

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self.spec.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self.spec.outputs

    @property
    def states(self) -> tuple[StateSpec, ...]:
        return self.spec.states

    @overload
    def infer(self, feeds: Feeds, state: EngineState | None = None) -> dict[str, NDArray[Any]]: ...

    @overload
    def infer(self, feeds: Feeds, state: EngineState | None = None, *, keep: Sequence[str]) -> dict[str, Any]: ...

    def infer(self, feeds: Feeds, state: EngineState | None = None, *, keep: Sequence[str] = ()) -> Mapping[str, Array]:
        """Runs the engine once.

        Args:
            feeds: input name -> array, of the dtypes and shapes in `inputs`; kept outputs of the component's engines
                among them.
            state: updated in place; needed exactly where `states` is not empty.
            keep: names of outputs that stay where the engine works.

        Returns:
            Output name -> new array, of the dtypes and shapes in `outputs`.

        Raises:
            EngineError: a feed is missing, unknown, of the wrong dtype or shape, or on another device; the state is
                missing, surplus or made for other sizes; an unknown output is to be kept; or the backend failed.
        """
        self._check(feeds, state)
        if unknown := sorted(set(keep) - {spec.name for spec in self.outputs}):
            raise EngineError(f"{self.name}: {unknown} are to be kept; expected of {[x.name for x in self.outputs]}")
        return self._run(feeds, state, keep)

    def _check(self, feeds: Feeds, state: EngineState | None) -> None:
        expected = [spec.name for spec in self.inputs]
        if len(feeds) != len(expected) or any(name not in feeds for name in expected):
            raise EngineError(f"{self.name}: fed {sorted(feeds)}; expected {sorted(expected)}")
        if (state is None) == bool(self.states):
            wanted = "needs a state, made by the component's new_state" if self.states else "takes no state"
            raise EngineError(f"{self.name}: {'no' if state is None else 'a'} state was given; this engine {wanted}")
        sizes: dict[str, int] = {}
        for spec in self.inputs:
            spec.check(feeds[spec.name], sizes, self.name)
        if state is not None and any(sizes.get(symbol, size) != size for symbol, size in state.sizes.items()):
            raise EngineError(f"{self.name}: state made for {dict(state.sizes)}, fed {sizes}; make a new state")

    @abstractmethod
    def _run(self, feeds: Feeds, state: EngineState | None, keep: Sequence[str]) -> dict[str, Any]:
        """Runs the engine on checked feeds."""

    @abstractmethod
    def close(self) -> None:
        """Releases the engine's memory; closing twice is allowed, and closing never fails: what is wrong is logged."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Component(ABC):
    """The loaded engines of one component, and the states they share.

    Args:
        name: `text_encoder`, `transformer` or `vae_decoder`.
        spec: from the manifest.
        engines: role -> engine.
    """

    def __init__(self, name: str, spec: ComponentSpec, engines: Mapping[str, Engine]) -> None:
        self.name = name
        self.spec = spec
        self.engines = dict(engines)

    def __getitem__(self, role: str) -> Engine:
        try:
            return self.engines[role]
        except KeyError:
            raise EngineError(f"{self.name} has no engine {role!r}; it has {sorted(self.engines)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.engines)

    def states(self, role_prefix: str = "") -> tuple[TensorSpec, ...]:
        """The state tensors of all engines whose role begins with `role_prefix`, each once."""
        engines = [engine for role, engine in self.engines.items() if role.startswith(role_prefix)]
        return tuple({state.tensor.name: state.tensor for engine in engines for state in engine.states}.values())

    def new_state(self, *, height: int, width: int, role_prefix: str = "") -> EngineState:
        """A zero-filled state; see `new_states`."""
        return self.new_states(1, height=height, width=width, role_prefix=role_prefix)[0]

    def written(self, role_prefix: str = "") -> tuple[TensorSpec, ...]:
        """Those of `states` that some engine writes: a call needs a second buffer for each."""
        engines = [engine for role, engine in self.engines.items() if role.startswith(role_prefix)]
        written = [state.tensor for engine in engines for state in engine.states if state.output is not None]
        return tuple({tensor.name: tensor for tensor in written}.values())

    @abstractmethod
    def new_states(
        self, count: int, *, height: int, width: int, role_prefix: str = "", resident: int | None = None
    ) -> Sequence[EngineState]:
        """Zero-filled states that are used one after another, such as those of a frame's tiles.

        They share the buffers that a call writes before they become the state: `count` states take the memory of
        `count`, and that of the written tensors once more, not twice as much each.

        Args:
            count: number of states.
            height: rows of what the engines are fed: latents, or the features of a tile.
            width: columns of what the engines are fed.
            role_prefix: for the engines whose role begins with it, such as `head` or `tail`; for all by default.
            resident: how many of them have a place on the device at a time. The others are parked in host memory; a
                call with a parked one saves the one that was used longest ago and brings it in. None for all.
                Where the device is the host, it changes nothing.
        """

    @abstractmethod
    def trim(self) -> None:
        """Gives back the memory that nobody's data is in; later calls take what they need anew."""

    def close(self) -> None:
        """Closes all engines."""
        for engine in self.engines.values():
            engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
