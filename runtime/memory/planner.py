"""Makes the memory plans of a pipeline's calls: from what is the same for all, and what there is room for now."""

from __future__ import annotations

from collections.abc import Sequence

from t2v_rt.engines.backends import Backend
from t2v_rt.engines.bundle.manifest import Manifest
from t2v_rt.runtime.decode.tiles import Grid
from t2v_rt.runtime.denoise.denoiser import guidance_batches
from t2v_rt.runtime.memory.device_memory import DeviceMemory
from t2v_rt.runtime.memory.plan import MemoryPlan, make_plan
from t2v_rt.runtime.request import Request
from t2v_rt.system.resources import available_memory_bytes


class Planner:
    """Plans for one set of engines.

    Args:
        manifest: of the bundle.
        backend: loads its engines.
        memory: of its device.
        budget: bytes that the set's runs may take together, or None for what the device has free.
        grid: tiles of the VAE decoder, or None.
        sets: of engines, among which the machine's memory is divided.
    """

    def __init__(
        self,
        manifest: Manifest,
        backend: Backend,
        memory: DeviceMemory,
        budget: int | None,
        grid: Grid | None,
        sets: int = 1,
    ) -> None:
        self._manifest, self._backend, self._memory = manifest, backend, memory
        self._budget, self._grid = budget, grid
        available = self._available_bytes()  # when the pipeline is opened: loaded weights would count twice
        self._room = None if available is None else available // sets

    def plan(self, request: Request, kept_frames: int, previews: bool) -> MemoryPlan:
        """See `TextToVideoPipeline.plan`."""
        card, tokens = self._backend.own_memory, request.tokens(self._manifest.model)
        batches = guidance_batches(request.guidance, request.guidance_batch, card, tokens)
        shape = request.latent_shape(self._manifest.model)
        return self.of_latents(
            shape, kept_frames=kept_frames, batches=batches, previews=previews, available=self._available_bytes()
        )

    def of_latents(
        self,
        shape: tuple[int, ...],
        *,
        kept_frames: int = 0,
        batches: Sequence[bool] = (False,),
        previews: bool = False,
        available: int | None = None,
    ) -> MemoryPlan:
        """The plan of latents of a shape, with what the device has room for now; see `make_plan`."""
        room, budget, free = self._memory.measure(self._backend), self._budget, None
        if budget is None:
            budget, free = room.bytes, room.free_bytes
        return make_plan(
            self._manifest,
            shape,
            budget=budget,
            grid=self._grid,
            kept_frames=kept_frames,
            batches=batches,
            room=self._room,
            available=available,
            own_memory=self._backend.own_memory,
            free=free,
            previews=previews,
        )

    def _available_bytes(self) -> int | None:
        """Of the machine's memory, where engines work in it."""
        return None if self._backend.own_memory else available_memory_bytes()
