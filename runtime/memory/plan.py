"""The memory plan: what each stage of a request needs and what stays loaded, before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from t2v_rt.engines.backend_info import backend_info
from t2v_rt.engines.bundle.manifest import Manifest
from t2v_rt.engines.bundle.model import thumbnail_size
from t2v_rt.errors import RequestError
from t2v_rt.numbers import as_number
from t2v_rt.runtime.decode.tiles import WHOLE, Grid
from t2v_rt.runtime.families import family_of
from t2v_rt.runtime.memory.estimates import COMPONENTS, FLOAT, RGB, StageMemory, Way, denoise_stage, encode_stage

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
ENCODER = COMPONENTS["encode"]
ALL = frozenset(COMPONENTS.values())
CARD_RESERVE = 600_000_000  # bytes: a CUDA context takes 0.3 GB, a desktop as much


@dataclass(frozen=True)
class MemoryPlan:
    """The stages of a request, and how they share a budget; made once for a call, which follows it to its end.

    Args:
        stages: in the order they run.
        one_engine: the encode stage with one of its engines loaded at a time.
        ways: to decode: the one that was chosen, then those that are tried where memory runs out all the same.
        parked_bytes: caches of tiles that wait in host memory for their turn; 0 where all stay on the device.
        budget_bytes: that they must keep to, or None.
        one_batch: whether guidance makes both predictions of a step in one batch.
        results_bytes: frames that a caller is given, held on the host beside the decode stage; in no stage's sum.
        reserve_bytes: of a card, for what is on it besides: the driver's own context, and a desktop.
        estimated: whether contexts are estimates; False where a builder told them.
        kept: components that stay loaded from stage to stage and from call to call. Any other is loaded for its stage
            and released after it, the text encoder engine by engine.
        available_bytes: of the machine's memory when it was made, where engines work in it, else None.
        free_bytes: of the card when it was made, where the budget was made of it, else None.
        preview: what previews take beside the denoise stage, of the VAE decoder; None where there are none.
    """

    stages: tuple[StageMemory, ...]
    one_engine: StageMemory
    ways: tuple[Way, ...]
    parked_bytes: int
    budget_bytes: int | None
    one_batch: bool = False
    results_bytes: int = 0
    reserve_bytes: int = 0
    estimated: bool = True
    kept: frozenset[str] = ALL
    available_bytes: int | None = None
    free_bytes: int | None = None
    preview: StageMemory | None = None

    @property
    def grid(self) -> Grid:
        """Tiles of the VAE decoder."""
        return self.ways[0][0]

    @property
    def resident(self) -> bool:
        """Whether all components stay loaded."""
        return self.kept == ALL

    @property
    def streamed(self) -> bool:
        """Whether the text encoder's engines are loaded one after another, each released before the next."""
        return ENCODER not in self.kept

    @property
    def peak_bytes(self) -> int:
        """The most that is held at once, the reserve included; engines that stay loaded keep their boundaries too."""
        return self.reserve_bytes + self._most(lambda stage: stage.weights_bytes + stage.io_bytes)

    @property
    def own_bytes(self) -> int:
        """What a run takes beside weights, which runs of one pipeline share."""
        return self._most(lambda stage: stage.io_bytes)

    @property
    def told_stages(self) -> tuple[StageMemory, ...]:
        """The stages as each is by itself: with previews the denoise stage has the VAE decoder loaded as well."""
        return tuple(_beside(stage, self._preview_of(stage)) for stage in self.stages)

    def _preview_of(self, stage: StageMemory) -> StageMemory | None:
        return self.preview if stage.name == "denoise" else None

    def _most(self, held: Callable[[StageMemory], int]) -> int:
        """The most of any stage: what it works in, what its engines hold, and what those hold that stay loaded.

        What one stage has worked in serves the next. It stays as large as it was, until an engine is loaded or closed.

        Args:
            held: what is counted of loaded engines.
        """
        kept = [stage for stage in self.stages if stage.component in self.kept]
        left = max((stage.work_bytes for stage in kept), default=0)
        most = max(
            (left if stage in kept else held(stage) + stage.work_bytes) + self._previewing(stage, held)
            for stage in self.stages
        )
        return sum(map(held, kept)) + most

    def _previewing(self, stage: StageMemory, held: Callable[[StageMemory], int]) -> int:
        """What previews add to a stage; on the CPU an engine works in memory of its own, on a card it may find less
        there than it needs."""
        preview = self._preview_of(stage)
        if preview is None:
            return 0
        loaded = 0 if preview.component in self.kept else held(preview)
        return loaded + preview.state_bytes + preview.context_bytes

    @property
    def fits(self) -> bool:
        return self.budget_bytes is None or self.peak_bytes <= self.budget_bytes

    @property
    def least_bytes(self) -> int:
        """What the largest stage takes when nothing else is kept loaded, the reserve included."""
        return self.reserve_bytes + max(stage.total_bytes for stage in self.told_stages)

    @property
    def host_bytes(self) -> int:
        """What engines on the CPU need of the machine's memory: the largest stage's, with reserve and results."""
        held = {"decode": self.results_bytes}
        return self.reserve_bytes + max(stage.total_bytes + held.get(stage.name, 0) for stage in self.told_stages)

    def keeping(self, names: Iterable[str]) -> MemoryPlan:
        """The plan that keeps, of what this one does, the named components only."""
        kept = self.kept & {*names}
        one = self.one_engine
        stages = self.stages if ENCODER in kept else tuple(one if s.name == one.name else s for s in self.stages)
        return replace(self, stages=stages, kept=kept)

    def streaming(self) -> MemoryPlan:
        """The plan that loads one of the text encoder's engines at a time."""
        return self.keeping(self.kept - {ENCODER})

    def releasing(self) -> MemoryPlan:
        """The plan that keeps nothing loaded from stage to stage."""
        return self.keeping(())

    def choices(self) -> Iterator[MemoryPlan]:
        """This plan and those that keep less, in the order that they are preferred.

        The text encoder goes first, since prompts are remembered, then what is the quickest to load again: a component
        is kept only beside all that take longer, next to which its own loading counts for little.
        """
        weights = {stage.component: stage.weights_bytes for stage in self.stages}
        order = sorted(self.kept - {ENCODER}, key=lambda name: (-weights.get(name, 0), name))
        yield self
        if not self.streamed:
            yield self.streaming()
        for count in range(len(order) - 1, -1, -1):
            yield self.keeping(order[:count])

    def beside(self, used: Mapping[str, int]) -> MemoryPlan:
        """The same plan where components still hold at their boundary what an earlier run, of a larger video, took.

        Args:
            used: component -> bytes.
        """
        larger = (max(stage.io_bytes, used.get(stage.component, 0)) for stage in self.stages)
        stages = (replace(stage, io_bytes=size) for stage, size in zip(self.stages, larger, strict=True))
        return replace(self, stages=tuple(stages))

    def of_stage(self, name: str) -> MemoryPlan:
        """The same plan of a run that has this stage only; components that are kept may be loaded beside it."""
        idle = (replace(stage, context_bytes=0, state_bytes=0) for stage in self.stages)
        here = zip(self.stages, idle, strict=True)
        chosen = (
            own if own.name == name else rest for own, rest in here if own.name == name or own.component in self.kept
        )
        return replace(self, stages=tuple(chosen), preview=None)

    def refusal(self, needed: int, room: int, what: str, advice: str) -> str:
        """Says that a request does not fit.

        Args:
            needed: bytes.
            room: bytes that there are.
            what: they are.
            advice: of `advise`.
        """
        worst = max(self.told_stages, key=lambda stage: stage.total_bytes).name
        return f"this request needs about {needed / 1e9:.3g} GB in {worst}, {what} is {room / 1e9:.3g} GB; {advice}"


def together_bytes(plans: Sequence[MemoryPlan]) -> int:
    """The most that runs of one pipeline hold at once; a component that several of them use is loaded once.

    Args:
        plans: of the runs; at least one.
    """
    if len(plans) == 1:
        return plans[0].peak_bytes
    kept = frozenset[str]().union(*(plan.kept for plan in plans))
    shared: dict[str, int] = {}
    streams: list[int] = []  # of runs that load the text encoder's engines one by one, each its own
    for plan in plans:
        for stage in plan.stages:
            if stage.component == ENCODER and plan.streamed:
                streams.append(stage.weights_bytes)
            else:
                shared[stage.component] = max(stage.weights_bytes, shared.get(stage.component, 0))
    always = sum(weights for name, weights in shared.items() if name in kept)
    at_times = sorted([*streams, *(weights for name, weights in shared.items() if name not in kept)])
    previewing = sum(plan.preview is not None for plan in plans)
    at_times = at_times[-len(plans) - previewing :]  # for they are in as many stages at a time
    reserve = max(plan.reserve_bytes for plan in plans)
    return reserve + always + sum(at_times) + sum(plan.own_bytes for plan in plans)


def parse_bytes(text: str | int) -> int:
    """Reads a size such as `8GiB`, `6 GB` or a plain number of bytes; GB means 1e9.

    Raises:
        RequestError: not a size.
    """
    number = as_number(text)
    plain = str(text) if number is None else f"{number:f}"
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", plain)
    if match is None or match[2].upper() not in UNITS or float(match[1]) <= 0:
        raise RequestError(f"{text!r} is not a size of memory; expected a number with B, MB, GB, MiB or GiB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def make_plan(
    manifest: Manifest,
    shape: tuple[int, ...],
    *,
    budget: int | None = None,
    grid: Grid | None = None,
    kept_frames: int = 0,
    batches: Sequence[bool] = (False,),
    room: int | None = None,
    available: int | None = None,
    own_memory: bool | None = None,
    free: int | None = None,
    previews: bool = False,
) -> MemoryPlan:
    """Plans a request; what a builder has not measured is estimated.

    Args:
        manifest: of the bundle.
        shape: (B, C, F, H, W) of the latents.
        budget: bytes that the stages must keep to, or None.
        grid: tiles of the VAE decoder; None for the coarsest whose decode stage keeps to the budget. Where the backend
            can, caches of tiles are parked in host memory where no grid keeps to it otherwise.
        kept_frames: frames that are held at once as float32 results.
        batches: whether guidance makes both predictions of a step in one batch, in the order that is preferred; the
            first whose denoise stage fits is taken, the last where none does.
        room: without a budget, bytes from which on the text encoder is not kept loaded; None for no limit.
        available: bytes of the machine's memory that the denoise stage must keep to as well, or None.
        own_memory: whether engines work in a card's memory (see `Backend.own_memory`); None for what the bundle's
            backend does where nothing else is asked of it.
        free: bytes of the card that the budget was made of, which leave out what is on it besides; None for a budget
            that `CARD_RESERVE` has to be kept of.
        previews: whether the VAE decoder makes thumbnails between the steps of the denoise stage.

    Returns:
        The plan; attention scores are counted whole where graphs of ONNX Runtime hold them.

    Raises:
        RequestError: more tiles than there are features, or a grid that the engines were not built for.
    """
    card = backend_info(manifest.backend).has_own_memory() if own_memory is None else own_memory
    limits = [limit for limit in (budget, available) if limit is not None]
    reserve = CARD_RESERVE if card and free is None else 0
    family = family_of(manifest.model)
    thumbnail = (1, *shape[1:3], *thumbnail_size(*shape[3:]))
    preview = family.decode_memory(manifest, thumbnail, (WHOLE, False), 0)[0] if previews else None
    for one_batch in batches:
        denoise, estimated = denoise_stage(manifest, shape, one_batch)
        if all(reserve + _beside(denoise, preview).total_bytes <= limit for limit in limits):
            break
    latents = 0 if card else prod(shape) * FLOAT
    results = 0 if card else kept_frames * prod(manifest.model.video_size(shape)[:2]) * RGB
    encode, one_engine = (encode_stage(manifest, streamed=flag) for flag in (False, True))
    ways, tried = family.decode_ways(manifest, grid), []
    for i, way in enumerate(ways):
        decode, parked = family.decode_memory(manifest, shape, way, latents)
        stages = (encode, denoise, decode)
        known = stages, one_engine, tuple(ways[i:]), parked, budget, one_batch, results, reserve, estimated
        tried.append(MemoryPlan(*known, available_bytes=available, free_bytes=free, preview=preview))
        if budget is None or decode.total_bytes + reserve <= budget:
            break
    else:
        tried.append(min(tried, key=lambda plan: plan.stages[-1].total_bytes))
    plan, limit = tried[-1], room if budget is None else budget
    if limit is None or plan.peak_bytes <= limit:
        return plan
    if budget is None:
        return plan.streaming()
    return next((choice for choice in plan.choices() if choice.fits), plan.releasing())


def _beside(stage: StageMemory, preview: StageMemory | None) -> StageMemory:
    """A stage with previews beside it."""
    if preview is None:
        return stage
    return StageMemory(
        stage.name,
        stage.weights_bytes + preview.weights_bytes,
        stage.context_bytes + preview.context_bytes,
        stage.state_bytes + preview.state_bytes,
        stage.io_bytes + preview.io_bytes,
        stage.staging_bytes + preview.staging_bytes,
    )


def to_json(plan: MemoryPlan) -> dict[str, Any]:
    """A plan as plain JSON values: `peak_bytes`, `budget_bytes`, `fits`, `kept`, `vae_tiles`, `stages` and more.

    `kept` names the components that stay loaded, `resident` says whether these are all, `streamed` whether the text
    encoder is loaded engine by engine.
    """
    return {
        "peak_bytes": plan.peak_bytes,
        "budget_bytes": plan.budget_bytes,
        "fits": plan.fits,
        "kept": [stage.component for stage in plan.stages if stage.component in plan.kept and stage.weights_bytes],
        "resident": plan.resident,
        "streamed": plan.streamed,
        "reserve_bytes": plan.reserve_bytes,
        "estimated": plan.estimated,
        "vae_tiles": list(plan.grid),
        "parked_bytes": plan.parked_bytes,
        "stages": [{**vars(stage), "total_bytes": stage.total_bytes} for stage in plan.told_stages],
    }
