"""What a request needs in memory, estimated before anything is allocated."""

from __future__ import annotations

import re
from dataclasses import dataclass

from t2v_rt.engines.manifest import ComponentSpec, Manifest
from t2v_rt.errors import RequestError
from t2v_rt.runtime.tiles import WHOLE, Grid, fed_length

FLOAT = 4
LATENT_COPIES = 8  # sample, both predictions, guided prediction, the scheduler's history and its result
TOKEN_COPIES = 12  # hidden states, q, k, v, norms and the feed-forward's widening, in units of the hidden width
DECODE_CHANNELS = 96  # activations of a decoder chunk per output pixel, in floats: its widest level is cheap in pixels
GRIDS: tuple[Grid, ...] = (WHOLE, (1, 2), (2, 2), (2, 3), (3, 3), (3, 4), (4, 4))  # tried in turn, coarsest first
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes per stage, weights included."""

    encode: int
    denoise: int
    decode: int

    @property
    def peak(self) -> int:
        return max(self.encode, self.denoise, self.decode)


def parse_bytes(text: str | int) -> int:
    """Reads a size such as `8GiB`, `6 GB` or a plain number of bytes; GB means 1e9.

    Raises:
        RequestError: not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    if match is None or match[2].upper() not in UNITS or float(match[1]) <= 0:
        raise RequestError(f"{text!r} is not a size of memory; expected a number with B, MB, GB, MiB or GiB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def estimate(manifest: Manifest, shape: tuple[int, ...], kept_frames: int, grid: Grid = WHOLE) -> MemoryEstimate:
    """Estimates the memory of a request.

    Args:
        manifest: of the bundle.
        shape: (B, C, F, H, W) of the latents.
        kept_frames: frames that are held at once as float32 results.
        grid: tiles of the decoder's tail.

    Returns:
        Bytes per stage; attention scores of the denoiser counted whole, as ONNX Runtime holds them.
    """
    model = manifest.model
    weights = {name: spec.weights_bytes for name, spec in manifest.components.items()}
    batch, channels, frames, height, width = shape
    tokens = (frames // model.patch[0]) * (height // model.patch[1]) * (width // model.patch[2])
    latents = batch * channels * frames * height * width * FLOAT
    scores = batch * model.heads * tokens * tokens * FLOAT
    activations = batch * tokens * model.hidden_dim * TOKEN_COPIES * FLOAT
    pixels = height * width * model.spatial_factor**2
    return MemoryEstimate(
        encode=weights["text_encoder"] + model.text_length * model.text_dim * FLOAT * 2,
        denoise=weights["transformer"] + LATENT_COPIES * latents + scores + activations,
        decode=weights["vae_decoder"]
        + _decoder_bytes(manifest.components["vae_decoder"], height, width, grid, model.temporal_factor)
        + latents
        + kept_frames * pixels * 3 * FLOAT,
    )


def coarsest_grid(manifest: Manifest, shape: tuple[int, ...], budget: int | None) -> Grid:
    """The coarsest grid of decoder tiles whose estimate fits a budget; the finest one where none does.

    Args:
        manifest: of the bundle.
        shape: (B, C, F, H, W) of the latents.
        budget: in bytes; None for no limit, and so for no tiles.
    """
    fitting = (grid for grid in GRIDS if budget is None or estimate(manifest, shape, 0, grid).decode <= budget)
    return next(fitting, GRIDS[-1])


def _decoder_bytes(vae: ComponentSpec, height: int, width: int, grid: Grid, frames: int) -> int:
    """States, features and activations while one latent frame of `height` x `width` is decoded."""
    assert vae.tiles is not None
    rows, columns = height * vae.tiles.scale, width * vae.tiles.scale
    tile = fed_length(rows, grid[0], vae.tiles), fed_length(columns, grid[1], vae.tiles)
    whole_sizes, tile_sizes = {"height": height, "width": width}, {"height": tile[0], "width": tile[1]}
    head, tail = (_state_bytes(vae, part, sizes) for part, sizes in (("head", whole_sizes), ("tail", tile_sizes)))
    features = sum(spec.nbytes(whole_sizes) for spec in vae.graphs["head_next"].outputs)
    pixels = tile[0] * tile[1] * vae.tiles.upscale**2
    return 2 * head + (grid[0] * grid[1] + 1) * tail + features + pixels * frames * DECODE_CHANNELS * FLOAT


def _state_bytes(vae: ComponentSpec, part: str, sizes: dict[str, int]) -> int:
    graphs = [graph for role, graph in vae.graphs.items() if role.startswith(part)]
    states = {state.tensor.name: state.tensor.nbytes(sizes) for graph in graphs for state in graph.states}
    return sum(states.values())


def check_fits(needed: MemoryEstimate, available: int, what: str) -> None:
    """Refuses a request that cannot fit.

    Raises:
        RequestError: a stage needs more than `available` bytes.
    """
    if needed.peak > available:
        stage = max(("encode", "denoise", "decode"), key=lambda name: int(getattr(needed, name)))
        raise RequestError(
            f"this request needs about {needed.peak / 1e9:.1f} GB in {stage}, {what} is {available / 1e9:.1f} GB; "
            "ask for fewer frames or a smaller size"
        )
