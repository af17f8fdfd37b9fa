"""One plan of TensorRT or TensorRT for RTX: the profile of a call, its context, its buffers on the GPU."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t2v_rt.engines.bundle.manifest import GraphSpec
from t2v_rt.engines.bundle.profiles import Range, nearest_profile
from t2v_rt.engines.contract import Array, DeviceArray, Engine, EngineState, Feeds
from t2v_rt.engines.tensorrt.cuda import Buffer, DeviceBuffer
from t2v_rt.engines.tensorrt.device_array import GpuArray, Loan
from t2v_rt.engines.tensorrt.device_state import DeviceState
from t2v_rt.engines.tensorrt.gpu import Gpu, KernelCache
from t2v_rt.errors import EngineError
from t2v_rt.system import forked

logger = logging.getLogger(__name__)
# Elements of an engine's largest output up to which its calls are recorded as CUDA graphs: 4,000 tokens of 64 elements.
# Its 1,700 launches take 10 ms, and run ahead of the kernels wherever these take longer. At 4,000 tokens a denoiser of
# 1.3 billion weights computes for 80 ms on the fastest card, at 32,760 for 10 s on a small one: nothing is left to
# save there, and a context whose graphs hold addresses is made again whenever its workspace moves.
GRAPHS_UP_TO = 256_000


def largest_output(spec: GraphSpec) -> int:
    """Elements of a plan's largest output at the largest sizes it was built for."""
    assert spec.plan is not None
    ranges = [profile.sizes for profile in spec.plan.profiles]
    most = {symbol: max(sizes[symbol].max for sizes in ranges) for symbol in ranges[0]}
    return max(prod(output.resolve(most)) for output in spec.outputs)


def choose_profile(spec: GraphSpec, sizes: Mapping[str, int], name: str) -> int:
    """The shape profile of a plan that holds a call's sizes.

    Args:
        spec: of the plan.
        sizes: symbol -> size.
        name: of the engine.

    Raises:
        EngineError: none does; names the nearest sizes that one does hold.
    """
    assert spec.plan is not None
    ranges = [profile.sizes for profile in spec.plan.profiles]
    wanted = {symbol: sizes[symbol] for symbol in ranges[0]}
    index, nearest = nearest_profile(ranges, wanted)
    if nearest != wanted:
        found, best = (", ".join(f"{key} {size}" for key, size in item.items()) for item in (wanted, nearest))
        raise EngineError(f"{name}: called with {found}; the nearest that the plan was built for is {best}")
    return index


class TensorRTEngine(Engine):
    """One plan, deserialised; its context is made at the first call.

    Args:
        name: component and role.
        spec: of the plan.
        engine: the library's.
        gpu: that it is on.
        cache: of its kernels.
    """

    def __init__(self, name: str, spec: GraphSpec, engine: Any, gpu: Gpu, cache: KernelCache) -> None:
        super().__init__(name, spec)
        assert spec.plan is not None
        self._plan = spec.plan
        self._engine, self._gpu, self._cache = engine, gpu, cache
        self._fixed = [all(size.fixed for size in item.sizes.values()) for item in spec.plan.profiles]
        # states change their buffers from call to call
        self._records_graphs = all(self._fixed) and not spec.states and largest_output(spec) <= GRAPHS_UP_TO
        self._context: Any = None
        self._kernels: Any = None
        self._kept: bytes | None = None
        self._calls = 0
        self._profile = -1
        self._shapes: dict[str, tuple[int, ...]] = {}  # that the context knows,
        self._needed = 0  # and the bytes it works in at these
        self._workspace: int | None = None  # address of what graphs were recorded on
        self._inputs: dict[str, DeviceBuffer] = {}
        self._outputs: dict[str, list[DeviceBuffer]] = {}  # that nobody has kept
        self._pinned: dict[str, NDArray[np.uint8]] = {}
        self._copies: dict[str, list[tuple[weakref.ref[NDArray[Any]], DeviceBuffer]]] = {}  # of read-only feeds

        forked.watch(self)

    def after_fork(self) -> None:
        """Leaves everything on the GPU to the parent; see `t2v_rt.system.forked`."""
        forked.abandon(self._engine, self._context, self._kernels)
        self._engine = self._context = self._kernels = None

    def most_workspace(self, sizes: Mapping[str, int]) -> int:
        """The most bytes that a call works in.

        Args:
            sizes: symbol -> size of the call, of some symbols; where no profile holds them, there is no call.
        """
        return max(
            (
                self.profile_bytes(i)
                for i, profile in enumerate(self._plan.profiles)
                if all(size in profile.sizes.get(symbol, Range.of(size)) for symbol, size in sizes.items())
            ),
            default=0,
        )

    def profile_bytes(self, profile: int) -> int:
        """What the library asks for to work in at the largest sizes of a shape profile."""
        return int(self._engine.get_device_memory_size_for_profile_v2(profile))

    def _run(self, feeds: Feeds, state: EngineState | None, keep: Sequence[str]) -> dict[str, Any]:
        sizes: dict[str, int] = {}
        for spec in self.inputs:
            spec.check(feeds[spec.name], sizes, self.name)
        profile = choose_profile(self.spec, sizes, self.name)
        with self._gpu.lock:
            if self._engine is None:
                raise EngineError(f"{self.name}: the engine is closed; open the component again")
            self._gpu.begin()
            try:
                buffers = self._state_buffers(state)  # before the workspace, which lies beside them
                self._prepare(profile, {**{name: feeds[name].shape for name in feeds}, **self._state_shapes(state)})
                results = self._execute(feeds, buffers, sizes, keep)
            except EngineError:
                raise
            except RuntimeError as exc:  # the bindings raise it for some calls, and return False for others
                raise self._gpu.failure(self.name) from exc
            if isinstance(state, DeviceState):
                state.rotate(self.states)
            self._calls += 1
            if self._calls & (self._calls - 1) == 0:  # most kernels are compiled at the first calls, some behind them
                self._keep_kernels()
            return results

    def _execute(
        self, feeds: Feeds, state: Mapping[str, Buffer], sizes: dict[str, int], keep: Sequence[str]
    ) -> dict[str, Any]:
        """Feeds in, outputs to where they are wanted; waits for all of it."""
        cuda = self._gpu.cuda
        for spec in self.inputs:
            self._bind_input(spec.name, feeds[spec.name])
        for name, buffer in state.items():
            self._bind(name, buffer.address)
        results: dict[str, Any] = {}
        for spec in self.outputs:
            loan = self._lend_output(spec.name, spec.nbytes(sizes))
            results[spec.name] = GpuArray(cuda, loan, spec.numpy_dtype, spec.resolve(sizes))
            self._bind(spec.name, loan.buffer.address)
        if not self._context.execute_async_v3(cuda.stream):
            raise self._gpu.failure(self.name)
        wanted = [spec.name for spec in self.outputs if spec.name not in keep]
        pinned = {name: self._pinned_like(name, results[name]) for name in wanted}
        for name, array in pinned.items():
            cuda.download(results[name], array)
        cuda.synchronize()
        return {**results, **{name: array.copy() for name, array in pinned.items()}}

    # -- before the call ---------------------------------------------------------------------------------------------

    def _prepare(self, profile: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Makes the context at the first call, tells it the shapes, and gives it as much workspace as they take."""
        if self._records_graphs and self._workspace not in (None, self._gpu.memory.workspace(self._needed)[0]):
            self._drop_context()  # with graphs that were recorded on other memory
        if self._context is None:
            self._kept = self._kept or self._cache.read()
            made = self._gpu.create_context(self._engine, self._plan, self._kept, self._records_graphs)
            self._context, self._kernels = made
            if self._context is None:
                raise self._gpu.failure(self.name)
        if profile != self._profile:
            self._shapes = {}
            if not self._context.set_optimization_profile_async(profile, self._gpu.cuda.stream):
                raise self._gpu.failure(self.name)
            self._gpu.cuda.synchronize()
            self._profile = profile
        if shapes != self._shapes:
            for name, shape in shapes.items():
                if not self._context.set_input_shape(name, shape):
                    raise self._gpu.failure(f"{self.name}: shape {list(shape)} of {name}")
            self._needed = self._needed_bytes()
            self._shapes = dict(shapes)
        self._workspace, _ = self._gpu.memory.workspace(self._needed)
        # no more than it needs: how much room states of other videos leave changes, and recorded graphs would not know
        self._context.set_device_memory(self._workspace, self._needed)

    def _needed_bytes(self) -> int:
        """What a call works in at the shapes that the context knows; of a range, its largest sizes may take more."""
        most = self.profile_bytes(self._profile)
        if self._fixed[self._profile]:
            return most
        # 0 is its word for nothing and for a failure: the most will do for both
        return int(self._context.update_device_memory_size_for_shapes()) or most

    def _drop_context(self) -> None:
        self._keep_kernels()
        self._context = self._kernels = self._workspace = None
        self._profile, self._shapes = -1, {}

    def _bind(self, name: str, address: int) -> None:
        if not self._context.set_tensor_address(name, address):
            raise self._gpu.failure(f"{self.name}: {name}")

    def _bind_input(self, name: str, array: Array) -> None:
        if isinstance(array, DeviceArray):
            if not isinstance(array, GpuArray) or array.cuda is not self._gpu.cuda:
                raise EngineError(f"{self.name}: {name!r} is on another device; expected an output of this component")
            if array.can_be_fed and not self._records_graphs:  # which hold the address
                self._bind(name, array.address)
                return
        buffer = self._input_buffer(name, array.nbytes)
        if isinstance(array, GpuArray):
            array.copy_to(buffer)
        elif array.flags.writeable:
            self._gpu.cuda.upload(self._staged(name, array), buffer)
        else:
            self._gpu.cuda.copy(self._copy_of(name, array), buffer, array.nbytes)
        self._bind(name, buffer.address)

    def _copy_of(self, name: str, array: NDArray[Any]) -> DeviceBuffer:
        """A read-only array's copy on the device, made once as long as the array lives."""
        copies = self._copies.setdefault(name, [])
        place = None
        for i, (ref, buffer) in enumerate(copies):
            if ref() is array:
                return buffer
            if ref() is None and buffer.nbytes == array.nbytes:  # a run that has ended leaves its place to the next
                place = i
        buffer = self._gpu.cuda.allocate(array.nbytes) if place is None else copies.pop(place)[1]
        self._gpu.cuda.upload(self._staged(name, array), buffer)
        copies.append((weakref.ref(array), buffer))
        return buffer

    def _state_buffers(self, state: EngineState | None) -> dict[str, Buffer]:
        """Name of each tensor of the plan that is a state -> its memory."""
        if not isinstance(state, DeviceState):
            return {}
        read, written = state.group.activate(state), state.group.spare
        inputs = {item.input: read[item.tensor.name] for item in self.states if item.input is not None}
        return inputs | {item.output: written[item.tensor.name] for item in self.states if item.output is not None}

    def _state_shapes(self, state: EngineState | None) -> dict[str, tuple[int, ...]]:
        if state is None:
            return {}
        return {item.input: item.tensor.resolve(state.sizes) for item in self.states if item.input is not None}

    def _lend_output(self, name: str, nbytes: int) -> Loan:
        """The device memory of an output; it is the last call's again where nobody has kept that, and large enough."""
        shelf = self._outputs.setdefault(name, [])
        buffer = next((item for item in shelf if item.nbytes >= nbytes), None)
        shelf.clear()
        return Loan(self._gpu.cuda.allocate(nbytes) if buffer is None else buffer, shelf)

    def _input_buffer(self, name: str, nbytes: int) -> DeviceBuffer:
        """The device memory of an input; its address stays as long as it is large enough."""
        if name not in self._inputs or self._inputs[name].nbytes < nbytes:
            self._inputs.pop(name, None)
            self._inputs[name] = self._gpu.cuda.allocate(nbytes)
        return self._inputs[name]

    def _staged(self, name: str, array: NDArray[Any]) -> NDArray[Any]:
        """The array in pinned memory; what was staged there before is on the device, since each call waits."""
        pinned = self._pinned_like(name, array)
        np.copyto(pinned, array)
        return pinned

    def _pinned_like(self, name: str, array: Array) -> NDArray[Any]:
        """Pinned memory for an array of such a shape."""
        nbytes = array.nbytes
        if name not in self._pinned or self._pinned[name].nbytes < nbytes:
            self._pinned.pop(name, None)
            self._pinned[name] = self._gpu.cuda.host_array((nbytes,), np.dtype(np.uint8))
        return self._pinned[name][:nbytes].view(array.dtype).reshape(array.shape)

    # -- after it ----------------------------------------------------------------------------------------------------

    def _keep_kernels(self) -> None:
        """Keeps what the library has compiled since the last time."""
        if self._kernels is None:
            return
        try:
            content = bytes(self._kernels.serialize())
        except RuntimeError as exc:  # as after a fault of the GPU, when all that is left is to let go
            logger.info("compiled kernels are not kept: %s", exc)
            return
        if content != self._kept:
            self._cache.write(content)
            self._kept = content

    def close(self) -> None:
        with self._gpu.lock:
            if self._engine is None:
                return
            self._gpu.settle()
            self._drop_context()
            self._engine = None
            self.trim()
            self._gpu.memory.release()

    def trim(self) -> None:
        """Gives back what crossed its boundary; calls that follow take the memory anew."""
        self._inputs, self._outputs, self._pinned, self._copies = {}, {}, {}, {}
