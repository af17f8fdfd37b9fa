"""The memory plan: what each stage of a request needs and what stays loaded, before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from t2v_rt.engines.manifest import BLOCKS, GRIDS, ComponentSpec, GraphSpec, Manifest
from t2v_rt.engines.plans import holds, nearest_profile
from t2v_rt.engines.specs import StateSpec
from t2v_rt.errors import RequestError
from t2v_rt.numbers import as_number
from t2v_rt.runtime import wan
from t2v_rt.runtime.tiles import WHOLE, Grid, fed_length

FLOAT = 4
RGB = 3 * FLOAT
LATENT_COPIES = 8  # sample, both predictions, guided prediction, the scheduler's history and its result
TOKEN_COPIES = 12  # hidden states, q, k, v, norms and the feed-forward's widening, in units of the hidden width
HEAD_COPIES = 25  # of the decoder's largest cache, what activations take in ONNX Runtime's arena, as measured: head,
TAIL_COPIES = 18  # and tail; each session has an arena of its own, which keeps what it has taken
SCORE_COPIES = 2  # of the head's attention: one pixel of the latents to each other, before and after the softmax
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
STAGES = {"encode": "text_encoder", "denoise": "transformer", "decode": "vae_decoder"}
CARD_RESERVE = 600_000_000  # bytes: a CUDA context takes 0.3 GB, a desktop as much
SHRINK = 0.9  # of height and width, from one try to the next


@dataclass(frozen=True)
class StageMemory:
    """What one stage takes, in bytes.

    Args:
        name: `encode`, `denoise` or `decode`.
        weights_bytes: of its component.
        context_bytes: activations while it runs.
        state_bytes: caches that stay from call to call.
        io_bytes: latents, embeddings, features and frames at its engines' boundaries.
        staging_bytes: pinned memory of the host, through which these come and go; not in any sum.
    """

    name: str
    weights_bytes: int
    context_bytes: int
    state_bytes: int
    io_bytes: int
    staging_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.context_bytes + self.state_bytes + self.io_bytes


@dataclass(frozen=True)
class MemoryPlan:
    """The stages of a request, and how they share a budget.

    Args:
        stages: in the order they run.
        grid: tiles of the VAE decoder.
        parked_bytes: caches of tiles that wait in host memory for their turn; 0 where all stay on the device.
        budget_bytes: that they must keep to, or None.
        reserve_bytes: of a card, for what is on it besides: the driver's own context, and a desktop.
        estimated: whether contexts are estimates; False where a builder told them.
        resident: whether weights stay loaded; otherwise each stage's are released when it ends.
        streamed: whether the text encoder's engines are loaded one after another, each released before the next.
    """

    stages: tuple[StageMemory, ...]
    grid: Grid
    parked_bytes: int
    budget_bytes: int | None
    reserve_bytes: int = 0
    estimated: bool = True
    resident: bool = True
    streamed: bool = False

    @property
    def peak_bytes(self) -> int:
        """The most that is held at once, the reserve included; engines that stay loaded keep their boundaries too."""
        if self.resident:
            kept = sum(stage.weights_bytes + stage.io_bytes for stage in self.stages)
            return self.reserve_bytes + kept + max(stage.context_bytes + stage.state_bytes for stage in self.stages)
        return self.least_bytes

    @property
    def fits(self) -> bool:
        return self.budget_bytes is None or self.peak_bytes <= self.budget_bytes

    @property
    def least_bytes(self) -> int:
        """What the largest stage takes when nothing else is kept loaded, the reserve included."""
        return self.reserve_bytes + max(stage.total_bytes for stage in self.stages)

    def refusal(self, room: int, what: str, advice: str) -> str:
        """Says that a request does not fit.

        Args:
            room: bytes that there are.
            what: they are.
            advice: of `advise`.
        """
        worst = max(self.stages, key=lambda stage: stage.total_bytes).name
        needed = f"{self.least_bytes / 1e9:.3g} GB in {worst}"
        return f"this request needs about {needed}, {what} is {room / 1e9:.3g} GB; {advice}"


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
    one_batch: bool = False,
    room: int | None = None,
) -> MemoryPlan:
    """Plans a request; what a builder has not measured is estimated.

    Args:
        manifest: of the bundle.
        shape: (B, C, F, H, W) of the latents.
        budget: bytes that the stages must keep to, or None.
        grid: tiles of the VAE decoder; None for the coarsest whose decode stage keeps to the budget. On a card, caches
            of tiles are parked in host memory where no grid keeps to it otherwise.
        kept_frames: frames that are held at once as float32 results.
        one_batch: whether guidance makes both predictions of a step in one batch.
        room: without a budget, bytes from which on the text encoder is not kept loaded; None for no limit.

    Returns:
        The plan; attention scores of the denoiser are counted whole, as ONNX Runtime holds them.

    Raises:
        RequestError: more tiles than there are features, or a grid that the engines were not built for.
    """
    vae, (*_, height, width) = manifest.components["vae_decoder"], shape
    latents = prod(shape) * FLOAT
    denoise, estimated = _denoise_stage(manifest, shape, one_batch)
    kept = 0 if on_card(manifest) else latents + kept_frames * prod(wan.video_size(manifest.model, shape)[:2]) * RGB
    reserve = CARD_RESERVE if on_card(manifest) else 0
    limit, ways = room if budget is None else budget, []
    encode = _encode_stage(manifest, streamed=False)
    for tiles, parks in decode_ways(manifest, grid):
        decode, parked = decode_stage(vae, height, width, tiles, kept, parks)
        ways.append(MemoryPlan((encode, denoise, decode), tiles, parked, budget, reserve, estimated))
        if budget is None or decode.total_bytes + reserve <= budget:
            return _settled(ways[-1], manifest, limit)
    return _settled(min(ways, key=lambda plan: plan.stages[-1].total_bytes), manifest, limit)


def _settled(plan: MemoryPlan, manifest: Manifest, limit: int | None) -> MemoryPlan:
    """The plan of loaded weights, with fewer of them loaded where they do not keep to the limit together."""
    if limit is None or plan.peak_bytes <= limit:
        return plan
    encode = _encode_stage(manifest, streamed=True)
    return replace(plan, stages=(encode, *plan.stages[1:]), resident=plan.budget_bytes is None, streamed=True)


def on_card(manifest: Manifest) -> bool:
    """Whether a bundle's engines run on a card, with memory of its own."""
    return manifest.backend != "onnxruntime"


def decode_ways(manifest: Manifest, grid: Grid | None) -> list[tuple[Grid, bool]]:
    """The ways to decode, in the order they are tried, each slower than the one before and most of them smaller.

    Args:
        manifest: of the bundle.
        grid: the only one to use, or None.

    Returns:
        Tiles, and whether their caches are parked in host memory but for one tile's.

    Raises:
        RequestError: the engines were not built for that grid.
    """
    tiles = manifest.components["vae_decoder"].tiles
    built_for = tiles.grids if tiles is not None else ()
    if grid is not None and built_for and grid not in built_for:
        known = ", ".join(f"{rows}x{columns}" for rows, columns in built_for)
        raise RequestError(f"vae_tiles is {grid[0]}x{grid[1]}; the engines were built for {known}")
    grids = [grid] if grid is not None else built_for or GRIDS
    parkable = [item for item in grids if item != WHOLE] if on_card(manifest) else []
    return [(item, False) for item in grids] + [(item, True) for item in parkable]


def _encode_stage(manifest: Manifest, *, streamed: bool) -> StageMemory:
    """The encode stage, with all engines loaded or one at a time."""
    encoder, model = manifest.components.get("text_encoder"), manifest.model
    if encoder is None:
        return StageMemory("encode", 0, 0, 0, 0)
    sizes = {"batch": 1, "length": model.text_length}
    text = model.text_length * model.text_dim * FLOAT
    told = built_context(encoder, BLOCKS, sizes)
    together = max if streamed else sum
    weights = together(part.weights_bytes for part in encoder.parts)
    if told is None:
        return StageMemory("encode", weights, text, 0, 2 * text)
    crossing = together(boundary_bytes(part, "", sizes) for part in encoder.parts)
    return StageMemory("encode", weights, told, 0, crossing, crossing)


def _denoise_stage(manifest: Manifest, shape: tuple[int, ...], one_batch: bool) -> tuple[StageMemory, bool]:
    """The denoise stage of latents of a shape (B, C, F, H, W), and whether its context is an estimate."""
    model, denoiser = manifest.model, manifest.components["transformer"]
    batch, _, frames, height, width = shape
    text = 2 * batch * model.text_length * model.text_dim * FLOAT
    sizes = {"batch": 1, "frames": frames, "height": height, "width": width}
    told = built_context(denoiser, "model", sizes)
    if told is not None:
        crossing = boundary_bytes(denoiser, "model", sizes)
        stage = StageMemory("denoise", denoiser.weights_bytes, told, 0, crossing + text, crossing)
        return stage, not holds(manifest.profiles, *wan.video_size(model, shape))
    calls = 2 * batch if one_batch else batch
    tokens = prod(size // patch for size, patch in zip((frames, height, width), model.patch, strict=True))
    context = calls * (model.heads * tokens * tokens + tokens * model.hidden_dim * TOKEN_COPIES) * FLOAT
    latents = LATENT_COPIES * prod(shape) * FLOAT * calls // batch
    return StageMemory("denoise", denoiser.weights_bytes, context, 0, latents + text), True


def boundary_bytes(component: ComponentSpec, part: str, sizes: Mapping[str, int]) -> int:
    """Bytes of the inputs and outputs of a component's engines whose roles begin with `part`."""
    return sum(spec.nbytes(sizes) for graph in _graphs(component, part) for spec in (*graph.inputs, *graph.outputs))


def _graphs(component: ComponentSpec, part: str) -> list[GraphSpec]:
    """The graphs of a component whose roles begin with `part`."""
    return [graph for role, graph in component.graphs.items() if role.startswith(part)]


def built_context(component: ComponentSpec, part: str, sizes: Mapping[str, int]) -> int | None:
    """What a builder told of the memory that a component's engines work in, one after another.

    Args:
        component: from the manifest.
        part: its roles begin with it.
        sizes: symbol -> size of the call.

    Returns:
        Bytes, of the profile nearest to those sizes, and in proportion where it does not hold them; None where the
        engines are graphs, of which nothing is told.
    """
    contexts = []
    for graph in _graphs(component, part):
        if graph.plan is None:
            return None
        ranges = [profile.sizes for profile in graph.plan.profiles]
        wanted = {name: sizes[name] for name in ranges[0]}
        index, held = nearest_profile(ranges, wanted)
        told = graph.plan.profiles[index].context_bytes
        contexts.append(told * prod(wanted.values()) // prod(held.values()))
    return max(contexts)


def decode_stage(
    vae: ComponentSpec, height: int, width: int, grid: Grid, kept: int, parks: bool
) -> tuple[StageMemory, int]:
    """The decode stage, and the bytes of caches that wait in host memory.

    Args:
        vae: from the manifest.
        height: of the latents.
        width: of the latents.
        grid: of tiles.
        kept: bytes that are held besides.
        parks: whether the caches of all tiles but one wait in host memory.
    """
    assert vae.tiles is not None
    rows, columns = height * vae.tiles.scale, width * vae.tiles.scale
    tile = fed_length(rows, grid[0], vae.tiles), fed_length(columns, grid[1], vae.tiles)
    whole_sizes, tile_sizes = {"height": height, "width": width}, {"height": tile[0], "width": tile[1]}
    head, written = _state_bytes(vae, "head", whole_sizes)
    tail, spare = _state_bytes(vae, "tail", tile_sizes)
    count = grid[0] * grid[1]
    crossing = boundary_bytes(vae, "head", whole_sizes) + boundary_bytes(vae, "tail", tile_sizes)
    told = [built_context(vae, part, at) for part, at in (("head", whole_sizes), ("tail", tile_sizes))]
    known = [context for context in told if context is not None]
    guessed = (
        HEAD_COPIES * _largest_state(vae, "head", whole_sizes)
        + SCORE_COPIES * (height * width) ** 2 * FLOAT
        + TAIL_COPIES * _largest_state(vae, "tail", tile_sizes)
    )
    decode = StageMemory(
        "decode",
        vae.weights_bytes,
        max(known) if known else guessed,
        head + written + (1 if parks else count) * tail + spare,
        kept + crossing,
        crossing if known else 0,
    )
    return decode, count * tail if parks else 0


def _state_bytes(vae: ComponentSpec, part: str, sizes: dict[str, int]) -> tuple[int, int]:
    """Bytes of one state, and of the buffers that a call writes before they become the state."""
    states = _states(vae, part)
    held = {state.tensor.name: state.tensor.nbytes(sizes) for state in states}
    written = {state.tensor.name for state in states if state.output is not None}
    return sum(held.values()), sum(held[name] for name in written)


def _largest_state(vae: ComponentSpec, part: str, sizes: dict[str, int]) -> int:
    """Bytes of the largest tensor of a state."""
    return max(state.tensor.nbytes(sizes) for state in _states(vae, part))


def _states(vae: ComponentSpec, part: str) -> list[StateSpec]:
    """The states of the graphs whose roles begin with `part`, of each graph."""
    return [state for graph in _graphs(vae, part) for state in graph.states]


def largest_fitting(manifest: Manifest, height: int, width: int, num_frames: int, budget: int) -> dict[str, int] | None:
    """The largest video, of one size with fewer frames or else smaller, whose plan fits a budget.

    One that the engines were built for, if there is any.

    Args:
        manifest: of the bundle.
        height: in pixels, of the request that does not fit.
        width: likewise.
        num_frames: likewise.
        budget: bytes.

    Returns:
        `height`, `width` and `num_frames`, or None where nothing fits.
    """
    sizes = list(_smaller(manifest, height, width, num_frames))
    for size in sorted(sizes, key=lambda size: not holds(manifest.profiles, *size)):  # stable
        if make_plan(manifest, wan.latent_shape(manifest.model, 1, *size), budget=budget).fits:
            return dict(zip(("height", "width", "num_frames"), size, strict=True))
    return None


def advise(manifest: Manifest, best: Mapping[str, int] | None) -> str:
    """Says what `largest_fitting` found, and whether engines must be built for it."""
    if best is None:
        return "no video of this model fits"
    built = "" if holds(manifest.profiles, **best) else ", by engines built for it"
    return f"{best['width']}x{best['height']} with {best['num_frames']} frames would fit{built} (an estimate)"


def _smaller(manifest: Manifest, height: int, width: int, num_frames: int) -> Iterator[tuple[int, int, int]]:
    """Sizes to try, in falling order: fewer frames first, then, at a single chunk of frames, smaller pictures."""
    model = manifest.model
    steps = (model.spatial_factor * model.patch[1], model.spatial_factor * model.patch[2])
    for frames in range(num_frames, 0, -model.temporal_factor):
        yield height, width, frames
    while height > steps[0] or width > steps[1]:
        height, width = (
            max(step, int(side * SHRINK) // step * step) for side, step in zip((height, width), steps, strict=True)
        )
        yield height, width, 1 + model.temporal_factor


def to_json(plan: MemoryPlan) -> dict[str, Any]:
    """A plan as plain JSON values: `peak_bytes`, `budget_bytes`, `fits`, `resident`, `vae_tiles`, `stages` and more."""
    return {
        "peak_bytes": plan.peak_bytes,
        "budget_bytes": plan.budget_bytes,
        "fits": plan.fits,
        "resident": plan.resident,
        "streamed": plan.streamed,
        "reserve_bytes": plan.reserve_bytes,
        "estimated": plan.estimated,
        "vae_tiles": list(plan.grid),
        "parked_bytes": plan.parked_bytes,
        "stages": [{**vars(stage), "total_bytes": stage.total_bytes} for stage in plan.stages],
    }
