"""The memory plan: what each stage of a request needs and what stays loaded, before anything is loaded."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from t2v_rt.engines.manifest import ComponentSpec, Manifest
from t2v_rt.errors import RequestError
from t2v_rt.runtime import wan
from t2v_rt.runtime.tiles import WHOLE, Grid, fed_length

FLOAT = 4
LATENT_COPIES = 8  # sample, both predictions, guided prediction, the scheduler's history and its result
TOKEN_COPIES = 12  # hidden states, q, k, v, norms and the feed-forward's widening, in units of the hidden width
DECODE_CHANNELS = 96  # activations of a decoder chunk per output pixel, in floats: its widest level is cheap in pixels
GRIDS: tuple[Grid, ...] = (WHOLE, (1, 2), (2, 2), (2, 3), (3, 3), (3, 4), (4, 4))  # tried in turn, coarsest first
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
STAGES = {"encode": "text_encoder", "denoise": "transformer", "decode": "vae_decoder"}
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
    """

    stages: tuple[StageMemory, ...]
    grid: Grid
    budget_bytes: int | None

    @property
    def resident(self) -> bool:
        """Whether all weights stay loaded; otherwise each stage's are released when it ends."""
        return self.budget_bytes is None or self._peak_with_all_weights <= self.budget_bytes

    @property
    def _peak_with_all_weights(self) -> int:
        return sum(stage.weights_bytes for stage in self.stages) + max(stage.work_bytes for stage in self.stages)

    @property
    def peak_bytes(self) -> int:
        """The most that is held at once."""
        return self._peak_with_all_weights if self.resident else max(stage.total_bytes for stage in self.stages)

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
        if worst.total_bytes > available:
            raise RequestError(
                f"this request needs about {worst.total_bytes / 1e9:.1f} GB in {worst.name}, {what} is "
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
    encode = StageMemory("encode", components["text_encoder"].weights_bytes, text, 0, text)
    denoise = StageMemory(
        "denoise",
        components["transformer"].weights_bytes,
        calls * (model.heads * tokens * tokens + tokens * model.hidden_dim * TOKEN_COPIES) * FLOAT,
        0,
        LATENT_COPIES * latents * calls // batch + 2 * batch * text,
    )
    kept = latents + kept_frames * height * width * model.spatial_factor**2 * 3 * FLOAT
    for tiles in (grid,) if grid else GRIDS:
        decode = _decode_stage(components["vae_decoder"], height, width, tiles, model.temporal_factor, kept)
        plan = MemoryPlan((encode, denoise, decode), tiles, budget)
        if budget is None or decode.total_bytes <= budget:
            break
    return plan


def _decode_stage(vae: ComponentSpec, height: int, width: int, grid: Grid, frames: int, kept: int) -> StageMemory:
    """The decode stage of latents of `height` x `width` in a grid of tiles."""
    assert vae.tiles is not None
    rows, columns = height * vae.tiles.scale, width * vae.tiles.scale
    tile = fed_length(rows, grid[0], vae.tiles), fed_length(columns, grid[1], vae.tiles)
    whole_sizes, tile_sizes = {"height": height, "width": width}, {"height": tile[0], "width": tile[1]}
    head, tail = (_state_bytes(vae, part, sizes) for part, sizes in (("head", whole_sizes), ("tail", tile_sizes)))
    features = sum(spec.nbytes(whole_sizes) for spec in vae.graphs["head_next"].outputs)
    pixels = tile[0] * tile[1] * vae.tiles.upscale**2
    return StageMemory(
        "decode",
        vae.weights_bytes,
        features + pixels * frames * DECODE_CHANNELS * FLOAT,
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
        "vae_tiles": list(plan.grid),
        "stages": [{**vars(stage), "total_bytes": stage.total_bytes} for stage in plan.stages],
    }
