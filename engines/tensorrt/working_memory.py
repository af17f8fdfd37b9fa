"""What the engines of a GPU work in: the workspace of a call, and states that stay from call to call.

Both lie in one arena, states at its end and the workspace before them. For the denoiser's workspace is as large as a
decoder's states, and these are not there while it works: a memory plan counts the larger of the two, not both. An arena
is as large as was needed at once so far, and stays, so that a second video like the first takes nothing new. Another is
made only where states of one video leave too little room for another's call; then the one that was used last stays.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

from t2v_rt.engines.specs import aligned
from t2v_rt.engines.tensorrt.cuda import DeviceBuffer


class Arena:
    """One allocation.

    Args:
        buffer: of the device.
    """

    def __init__(self, buffer: DeviceBuffer) -> None:
        self.buffer = buffer
        self._blocks: list[weakref.ref[Block]] = []  # from its end to its beginning

    @property
    def busy(self) -> bool:
        """Whether a state is in it."""
        return self.room < self.buffer.nbytes

    @property
    def room(self) -> int:
        """Bytes before the first state."""
        return min((block.offset for ref in self._blocks if (block := ref()) is not None), default=self.buffer.nbytes)

    def take(self, nbytes: int) -> Block:
        """The last bytes before the first state."""
        block = Block(self, self.room - nbytes)
        self._blocks = [*(ref for ref in self._blocks if ref() is not None), weakref.ref(block)]
        return block


class Block:
    """A stretch of an arena for states that are there together; free when none of them is left."""

    def __init__(self, arena: Arena, offset: int) -> None:
        self.arena, self.offset = arena, offset


class StateBuffer:
    """Memory of one tensor of a state; it has its place from its first use on, when all that it lies beside is known.

    Args:
        memory: that it is in.
        nbytes: its size.
        beside: bytes of the largest workspace of a call with it.
    """

    def __init__(self, memory: WorkingMemory, nbytes: int, beside: int) -> None:
        self.nbytes, self.beside = nbytes, beside
        self._memory = memory
        self._place: tuple[Block, int] | None = None

    @property
    def address(self) -> int:
        """On the device; raises OutOfMemoryError at the first use."""
        if self._place is None:
            self._memory.place()
        assert self._place is not None
        block, offset = self._place
        return block.arena.buffer.address + offset

    def put(self, block: Block, offset: int) -> None:
        """Gives it its place.

        Args:
            block: that it keeps.
            offset: from the arena's beginning.
        """
        self._place = block, offset


class WorkingMemory:
    """The arenas of a GPU: one, but where videos are made at the same time.

    Args:
        allocate: memory of the device.
        lock: held by whoever uses the device.
    """

    def __init__(self, allocate: Callable[[int], DeviceBuffer], lock: threading.RLock) -> None:
        self._allocate, self._lock = allocate, lock
        self._last: Arena | None = None  # used; others live as long as states are in them
        self._arenas: list[weakref.ref[Arena]] = []
        self._waiting: list[weakref.ref[StateBuffer]] = []  # for their first use

    def workspace(self, nbytes: int) -> tuple[int, int]:
        """Address and size of memory for one call, at least so large; states that the call uses have their places.

        Raises:
            OutOfMemoryError: there is not so much.
        """
        with self._lock:
            arena = self._arena(nbytes)
            return arena.buffer.address, arena.room

    def state_buffer(self, nbytes: int, beside: int) -> StateBuffer:
        """Memory of a state's tensor, not cleared.

        Args:
            nbytes: of the tensor.
            beside: bytes of the largest workspace of a call with it.
        """
        with self._lock:
            buffer = StateBuffer(self, nbytes, beside)
            self._waiting = [*(ref for ref in self._waiting if ref() is not None), weakref.ref(buffer)]
            return buffer

    def place(self) -> None:
        """Gives all states that were made since the last time their places, with room for their calls before them.

        Raises:
            OutOfMemoryError: there is not so much.
        """
        with self._lock:
            buffers = [buffer for ref in self._waiting if (buffer := ref()) is not None]
            total = sum(aligned(buffer.nbytes) for buffer in buffers)
            arena = self._arena(total + max(aligned(buffer.beside) for buffer in buffers))
            block = arena.take(total)
            offset = block.offset
            for buffer in buffers:
                buffer.put(block, offset)
                offset += aligned(buffer.nbytes)
            self._waiting = []

    def release(self) -> None:
        """Gives back what no state is in."""
        with self._lock:
            self._last = None

    def _arena(self, nbytes: int) -> Arena:
        """An arena with so much room, one that states are in first."""
        self._last = self._fitting(nbytes)
        if self._last is None:  # and the one before is given back
            self._last = Arena(self._allocate(aligned(max(nbytes, 1))))
            self._arenas = [*(ref for ref in self._arenas if ref() is not None), weakref.ref(self._last)]
        return self._last

    def _fitting(self, nbytes: int) -> Arena | None:
        arenas = (arena for ref in self._arenas if (arena := ref()) is not None)
        return max((arena for arena in arenas if arena.room >= nbytes), key=lambda arena: arena.busy, default=None)
