"""What each stage of a request takes in memory: a builder's own figures where there are any, estimates elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from t2v_rt.engines.backend_info import backend_info
from t2v_rt.engines.bundle.manifest import BLOCKS, GRIDS, ComponentSpec, GraphSpec, Manifest
from t2v_rt.engines.bundle.model import ModelSpec
from t2v_rt.engines.bundle.profiles import holds, nearest_profile
from t2v_rt.engines.specs import ALIGNMENT, StateSpec, aligned
from t2v_rt.errors import RequestError
from t2v_rt.runtime.decode.tiles import WHOLE, Grid, fed_length

FLOAT = 4
RGB = 3 * FLOAT
COMPONENTS = {"encode": "text_encoder", "denoise": "transformer", "decode": "vae_decoder"}  # whose engines a stage uses
Way = tuple[Grid, bool]  # to decode: tiles, and whether the caches of all but one wait in host memory
LATENT_COPIES = 8  # sample, both predictions, guided prediction, the scheduler's history and its result
# of a token in the denoiser, in units of the hidden width, as measured at 768 to 32,760 tokens: where attention holds
# scores, beside them; with a feed-forward's widened values of all tokens; and in graphs that work in parts, beside the
# scores of the text. The arena grows in powers of two: with 15 in all, 1.02 to 1.5 times what was measured
SCORED_COPIES, WIDENED_COPIES, TILED_COPIES = 12, 30, 11
HEAD_COPIES = 25  # of the decoder's largest cache, what activations take in ONNX Runtime's arena, as measured: head,
TAIL_COPIES = 18  # and tail; each session has an arena of its own, which keeps what it has taken
SCORE_COPIES = 2  # of the head's attention: one pixel of the latents to each other, before and after the softmax


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
    def component(self) -> str:
        """Whose engines it uses."""
        return COMPONENTS[self.name]

    @property
    def work_bytes(self) -> int:
        """What it works in: memory that the next stage has after it."""
        return self.context_bytes + self.state_bytes

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.work_bytes + self.io_bytes


def encode_stage(manifest: Manifest, *, streamed: bool) -> StageMemory:
    """The encode stage, with all engines loaded or one at a time."""
    encoder, model = manifest.components.get("text_encoder"), manifest.model
    if encoder is None:
        return StageMemory("encode", 0, 0, 0, 0)
    sizes = {"batch": 1, "length": model.text.length}
    text = model.text.length * model.text.dim * FLOAT
    told = built_context(encoder, BLOCKS, sizes)
    together = max if streamed else sum
    weights = together(shard.weights_bytes for shard in encoder.shards)
    if told is None:
        return StageMemory("encode", weights, text, 0, 2 * text)
    crossing = together(boundary_bytes(shard, "", sizes) for shard in encoder.shards)
    return StageMemory("encode", weights, told, 0, crossing, crossing)


def denoise_stage(manifest: Manifest, shape: tuple[int, ...], one_batch: bool) -> tuple[StageMemory, bool]:
    """The denoise stage of latents of a shape (B, C, F, H, W), and whether its context is an estimate."""
    model, denoiser = manifest.model, manifest.components["transformer"]
    batch, _, frames, height, width = shape
    text = 2 * batch * model.text.length * model.text.dim * FLOAT
    sizes = {"batch": 1, "frames": frames, "height": height, "width": width}
    told = built_context(denoiser, "model", sizes)
    if told is not None:
        crossing = boundary_bytes(denoiser, "model", sizes)
        stage = StageMemory("denoise", denoiser.weights_bytes, told, 0, crossing + text, crossing)
        return stage, not holds(manifest.profiles, *model.video_size(shape))
    calls = 2 * batch if one_batch else batch
    tokens = prod(size // patch for size, patch in zip((frames, height, width), model.patch, strict=True))
    context = calls * _denoiser_values(model, tokens, tiled=denoiser.graphs["model"].tiled) * FLOAT
    latents = LATENT_COPIES * prod(shape) * FLOAT * calls // batch
    return StageMemory("denoise", denoiser.weights_bytes, context, 0, latents + text), True


def _denoiser_values(model: ModelSpec, tokens: int, *, tiled: bool) -> int:
    """Values that a graph of the denoiser works in; a batch of one."""
    hidden = tokens * model.hidden_dim
    if tiled:
        return hidden * TILED_COPIES + tokens * model.heads * model.text.length  # to the text, scores are held
    return max(model.heads * tokens * tokens + hidden * SCORED_COPIES, hidden * WIDENED_COPIES)


def boundary_bytes(component: ComponentSpec, role_prefix: str, sizes: Mapping[str, int]) -> int:
    """Bytes of the inputs and outputs of a component's engines whose roles begin with `role_prefix`."""
    return sum(
        spec.nbytes(sizes) for graph in _graphs(component, role_prefix) for spec in (*graph.inputs, *graph.outputs)
    )


def _graphs(component: ComponentSpec, role_prefix: str) -> list[GraphSpec]:
    """The graphs of a component whose roles begin with `role_prefix`."""
    return [graph for role, graph in component.graphs.items() if role.startswith(role_prefix)]


def built_context(component: ComponentSpec, role_prefix: str, sizes: Mapping[str, int]) -> int | None:
    """What a builder told of the memory that a component's engines work in, one after another.

    Args:
        component: from the manifest.
        role_prefix: its roles begin with it.
        sizes: symbol -> size of the call.

    Returns:
        Bytes, of the profile nearest to those sizes, and in proportion where it does not hold them; None where the
        engines are graphs, of which nothing is told.
    """
    contexts = []
    for graph in _graphs(component, role_prefix):
        if graph.plan is None:
            return None
        ranges = [profile.sizes for profile in graph.plan.profiles]
        wanted = {name: sizes[name] for name in ranges[0]}
        index, held = nearest_profile(ranges, wanted)
        told = graph.plan.profiles[index].context_bytes
        contexts.append(told * prod(wanted.values()) // prod(held.values()))
    return max(contexts)


def decode_stage(
    vae: ComponentSpec, height: int, width: int, grid: Grid, parks: bool, kept: int
) -> tuple[StageMemory, int]:
    """The decode stage, and the bytes of caches that wait in host memory.

    Args:
        vae: from the manifest.
        height: of the latents.
        width: of the latents.
        grid: of tiles.
        parks: whether the caches of all tiles but one wait in host memory.
        kept: bytes that are held besides.
    """
    assert vae.tiles is not None
    rows, columns = height * vae.tiles.scale, width * vae.tiles.scale
    tile = fed_length(rows, grid[0], vae.tiles), fed_length(columns, grid[1], vae.tiles)
    whole_sizes, tile_sizes = {"height": height, "width": width}, {"height": tile[0], "width": tile[1]}
    head, written = _state_bytes(vae, "head", whole_sizes)
    tail, spare = _state_bytes(vae, "tail", tile_sizes)
    count = grid[0] * grid[1]
    crossing = boundary_bytes(vae, "head", whole_sizes) + boundary_bytes(vae, "tail", tile_sizes)
    given = sum(spec.nbytes(whole_sizes) for graph in _graphs(vae, "head") for spec in graph.outputs)
    fed = sum(spec.nbytes(tile_sizes) for graph in _graphs(vae, "tail") for spec in graph.inputs)
    staged = crossing - given - fed  # these stay on the device, where the tail reads them
    if grid == WHOLE and fed % ALIGNMENT == 0:  # one frame after another, each where the head left it
        crossing -= fed
    told = [built_context(vae, role, at) for role, at in (("head", whole_sizes), ("tail", tile_sizes))]
    known = [context for context in told if context is not None]
    guessed = (
        HEAD_COPIES * _largest_state(vae, "head", whole_sizes)
        + (0 if all(graph.tiled for graph in _graphs(vae, "head")) else SCORE_COPIES * (height * width) ** 2 * FLOAT)
        + TAIL_COPIES * _largest_state(vae, "tail", tile_sizes)
    )
    decode = StageMemory(
        "decode",
        vae.weights_bytes,
        max(known) if known else guessed,
        head + written + (1 if parks else count) * tail + spare,
        kept + crossing,
        staged if known else 0,
    )
    return decode, count * tail if parks else 0


def _state_bytes(vae: ComponentSpec, role_prefix: str, sizes: dict[str, int]) -> tuple[int, int]:
    """Bytes of one state, and of the buffers that a call writes before they become the state."""
    states = _states(vae, role_prefix)
    held = {state.tensor.name: aligned(state.tensor.nbytes(sizes)) for state in states}
    written = {state.tensor.name for state in states if state.output is not None}
    return sum(held.values()), sum(held[name] for name in written)


def _largest_state(vae: ComponentSpec, role_prefix: str, sizes: dict[str, int]) -> int:
    """Bytes of the largest tensor of a state."""
    return max(state.tensor.nbytes(sizes) for state in _states(vae, role_prefix))


def _states(vae: ComponentSpec, role_prefix: str) -> list[StateSpec]:
    """The states of the graphs whose roles begin with `role_prefix`, of each graph."""
    return [state for graph in _graphs(vae, role_prefix) for state in graph.states]


def tile_ways(manifest: Manifest, grid: Grid | None) -> list[Way]:
    """The ways to decode with tiles, in the order they are tried, each slower than the one before.

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
    parkable = [item for item in grids if item != WHOLE] if backend_info(manifest.backend).parks_states else []
    return [(item, False) for item in grids] + [(item, True) for item in parkable]
