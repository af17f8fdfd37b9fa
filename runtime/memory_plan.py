"""The memory plan: what each stage of a request needs and what stays loaded, before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from t2v_rt.engines.manifest import GRIDS, ComponentSpec, Manifest
from t2v_rt.engines.plans import nearest_profile
from t2v_rt.errors import RequestError
from t2v_rt.runtime import wan
from t2v_rt.runtime.tiles import Grid, fed_length

FLOAT = 4
LATENT_COPIES = 8  # sample, both predictions, guided prediction, the scheduler's history and its result
TOKEN_COPIES = 12  # hidden states, q, k, v, norms and the feed-forward's widening, in units of the hidden width
DECODE_CHANNELS = 96  # activations of a decoder chunk per output pixel, in floats: its widest level is cheap in pixels
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
        io_bytes: latents, embeddings and frames at its boundary.
    """

    name: str
    weights_bytes: int
    context_bytes: int
    state_bytes: int
    io_bytes: int

    @property
    def work_bytes(self) -> int:
        """All but the weights."""
        return self.context_bytes + self.state_bytes + self.io_bytes

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.work_bytes


@dataclass(frozen=True)
class MemoryPlan:
    """The stages of a request, and how they share a budget.

    Args:
        stages: in the order they run.
        grid: tiles of the VAE decoder.
        budget_bytes: that they must keep to, or None.
        reserve_bytes: of a card, for what is on it besides: the driver's own context, and a desktop.
        estimated: whether contexts are estimates; False where a builder told them.
    """

    stages: tuple[StageMemory, ...]
    grid: Grid
    budget_bytes: int | None
    reserve_bytes: int = 0
    estimated: bool = True

    @property
    def resident(self) -> bool:
        """Whether all weights stay loaded; otherwise each stage's are released when it ends."""
        return self.budget_bytes is None or self._peak_with_all_weights <= self.budget_bytes

    @property
    def _peak_with_all_weights(self) -> int:
        weights = sum(stage.weights_bytes for stage in self.stages)
        return self.reserve_bytes + weights + max(stage.work_bytes for stage in self.stages)

    @property
    def peak_bytes(self) -> int:
        """The most that is held at once, the reserve included."""
        if self.resident:
            return self._peak_with_all_weights
        return self.reserve_bytes + max(stage.total_bytes for stage in self.stages)

    @property
    def fits(self) -> bool:
        return self.budget_bytes is None or self.peak_bytes <= self.budget_bytes

    def check(self, available: int, what: str) -> None:
        """Refuses a request that cannot fit.

        Args:
            available: bytes.
            what: they are, for the message.

        Raises:
            RequestError: the stage that takes most takes more than that.
        """
        worst = max(self.stages, key=lambda stage: stage.total_bytes)
        needed = worst.total_bytes + self.reserve_bytes
        if needed > available:
            raise RequestError(
                f"this request needs about {needed / 1e9:.1f} GB in {worst.name}, {what} is "
                f"{available / 1e9:.1f} GB; ask for fewer frames or a smaller size"
            )


def parse_bytes(text: str | int) -> int:
    """Reads a size such as `8GiB`, `6 GB` or a plain number of bytes; GB means 1e9.

    Raises:
        RequestError: not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
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
) -> MemoryPlan:
    """Plans a request; what a builder has not measured is estimated.

    Args:
        manifest: of the bundle.
        shape: (B, C, F, H, W) of the latents.
        budget: bytes that the stages must keep to, or None.
        grid: tiles of the VAE decoder; None for the coarsest whose decode stage keeps to the budget.
        kept_frames: frames that are held at once as float32 results.
        one_batch: whether guidance makes both predictions of a step in one batch.

    Returns:
        The plan; attention scores of the denoiser are counted whole, as ONNX Runtime holds them.

    Raises:
        RequestError: more tiles than there are features.
    """
    model, components = manifest.model, manifest.components
    batch, channels, frames, height, width = shape
    tokens = (frames // model.patch[0]) * (height // model.patch[1]) * (width // model.patch[2])
    latents = batch * channels * frames * height * width * FLOAT
    calls = 2 * batch if one_batch else batch
    text = model.text_length * model.text_dim * FLOAT
    encoder = built_context(components["text_encoder"], "model", {"batch": 1, "length": model.text_length})
    encode = StageMemory(
        "encode", components["text_encoder"].weights_bytes, text if encoder is None else encoder, 0, text
    )
    sizes = {"batch": 1, "frames": frames, "height": height, "width": width}
    told = built_context(components["transformer"], "model", sizes)
    denoise = StageMemory(
        "denoise",
        components["transformer"].weights_bytes,
        calls * (model.heads * tokens * tokens + tokens * model.hidden_dim * TOKEN_COPIES) * FLOAT
        if told is None
        else told,
        0,
        LATENT_COPIES * latents * calls // batch + 2 * batch * text,
    )
    kept = latents + kept_frames * height * width * model.spatial_factor**2 * 3 * FLOAT
    decoder = components["vae_decoder"]
    built_for = decoder.tiles.grid if decoder.tiles is not None else None
    if grid is not None and built_for not in (None, grid):
        raise RequestError(f"vae_tiles is {grid}; the engines were built for {built_for}: leave it out")
    reserve = 0 if manifest.backend == "onnxruntime" else CARD_RESERVE
    for tiles in [item for item in (grid, built_for) if item is not None][:1] or GRIDS:
        decode = _decode_stage(decoder, height, width, tiles, model.temporal_factor, kept)
        plan = MemoryPlan((encode, denoise, decode), tiles, budget, reserve, estimated=told is None)
        if budget is None or decode.total_bytes + reserve <= budget:
            break
    return plan


def built_context(component: ComponentSpec, part: str, sizes: Mapping[str, int]) -> int | None:
    """What a builder told of the memory that a component's engines work in, one after another.

    Args:
        component: from the manifest.
        part: its roles begin with it.
        sizes: symbol -> size of the call.

    Returns:
        Bytes, of the profile nearest to those sizes; None where the engines are graphs, of which nothing is told.
    """
    contexts = []
    for role, graph in component.graphs.items():
        if role.startswith(part):
            if graph.plan is None:
                return None
            ranges = [profile.sizes for profile in graph.plan.profiles]
            index, _ = nearest_profile(ranges, {name: sizes[name] for name in ranges[0]})
            contexts.append(graph.plan.profiles[index].context_bytes)
    return max(contexts)


def _decode_stage(vae: ComponentSpec, height: int, width: int, grid: Grid, frames: int, kept: int) -> StageMemory:
    """The decode stage of latents of `height` x `width` in a grid of tiles."""
    assert vae.tiles is not None
    rows, columns = height * vae.tiles.scale, width * vae.tiles.scale
    tile = fed_length(rows, grid[0], vae.tiles), fed_length(columns, grid[1], vae.tiles)
    whole_sizes, tile_sizes = {"height": height, "width": width}, {"height": tile[0], "width": tile[1]}
    head, tail = (_state_bytes(vae, part, sizes) for part, sizes in (("head", whole_sizes), ("tail", tile_sizes)))
    features = sum(spec.nbytes(whole_sizes) for spec in vae.graphs["head_next"].outputs)
    pixels = tile[0] * tile[1] * vae.tiles.upscale**2
    told = [built_context(vae, part, at) for part, at in (("head", whole_sizes), ("tail", tile_sizes))]
    known = [context for context in told if context is not None]
    return StageMemory(
        "decode",
        vae.weights_bytes,
        features + (max(known) if known else pixels * frames * DECODE_CHANNELS * FLOAT),
        2 * head + (grid[0] * grid[1] + 1) * tail,
        kept,
    )


def _state_bytes(vae: ComponentSpec, part: str, sizes: dict[str, int]) -> int:
    graphs = [graph for role, graph in vae.graphs.items() if role.startswith(part)]
    states = {state.tensor.name: state.tensor.nbytes(sizes) for graph in graphs for state in graph.states}
    return sum(states.values())


def largest_fitting(manifest: Manifest, height: int, width: int, num_frames: int, budget: int) -> dict[str, int] | None:
    """The largest video, of one size with fewer frames or else smaller, whose plan fits a budget.

    Args:
        manifest: of the bundle.
        height: in pixels, of the request that does not fit.
        width: likewise.
        num_frames: likewise.
        budget: bytes.

    Returns:
        `height`, `width` and `num_frames`, or None where nothing fits.
    """
    for size in _smaller(manifest, height, width, num_frames):
        if make_plan(manifest, wan.latent_shape(manifest.model, 1, *size), budget=budget).fits:
            return dict(zip(("height", "width", "num_frames"), size, strict=True))
    return None


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
    """A plan as plain JSON values: `peak_bytes`, `budget_bytes`, `fits`, `resident`, `vae_tiles` and `stages`."""
    return {
        "peak_bytes": plan.peak_bytes,
        "budget_bytes": plan.budget_bytes,
        "fits": plan.fits,
        "resident": plan.resident,
        "reserve_bytes": plan.reserve_bytes,
        "estimated": plan.estimated,
        "vae_tiles": list(plan.grid),
        "stages": [{**vars(stage), "total_bytes": stage.total_bytes} for stage in plan.stages],
    }
