"""A video's latent frames through the VAE decoder, one after another: the head on the whole, the tail on tiles."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from t2v_rt.engines.contract import Component
from t2v_rt.errors import EngineError
from t2v_rt.runtime.decode.tiles import Grid, make_tiles

Array = NDArray[np.float32]
COLOURS = 3


class FrameDecoder:
    """Decodes one video; it holds the causal caches between latent frames.

    Args:
        vae: the component, with the engines `head_first`, `head_next` and `tail`.
        height: of the latents.
        width: of the latents.
        grid: tiles of the tail from top to bottom and from left to right.
        parks: whether the caches of all tiles but one are kept in host memory.

    Raises:
        RequestError: more tiles than there are features.
    """

    def __init__(self, vae: Component, height: int, width: int, grid: Grid, parks: bool = False) -> None:
        spec = vae.spec.tiles
        if spec is None:
            raise EngineError(f"{vae.name} says nothing of tiles; build the bundle again")
        self._vae = vae
        self._pixels = (height * spec.scale * spec.upscale, width * spec.scale * spec.upscale)
        self._tiles = make_tiles(height * spec.scale, width * spec.scale, grid, spec)
        fed = self._tiles[0].rows.fed, self._tiles[0].columns.fed
        self._head = vae.new_state(height=height, width=width, role_prefix="head")
        self._tails = vae.new_states(
            len(self._tiles),
            height=fed[0].stop - fed[0].start,
            width=fed[1].stop - fed[1].start,
            role_prefix="tail",
            resident=1 if parks else None,
        )
        self._when = "first"

    def decode(self, latents: Array) -> Array:
        """Decodes the video's next latent frame.

        Args:
            latents: float32 (1, C, 1, H, W), denormalized.

        Returns:
            float32 (f, 3, height, width): the frames of the latent frame.
        """
        when, self._when = self._when, "next"
        head, tail = self._vae[f"head_{when}"], self._vae["tail"]
        features = head.infer({"latents": latents[:, :, 0]}, self._head, keep=("features",))["features"]
        frames = np.empty((len(features), COLOURS, *self._pixels), np.float32)
        for tile, state in zip(self._tiles, self._tails, strict=True):
            for i in range(len(features)):
                fed = features[i : i + 1, :, tile.rows.fed, tile.columns.fed]
                pixels = tail.infer({"features": fed}, state)["frames"][0]
                frames[i, :, tile.rows.target, tile.columns.target] = pixels[:, tile.rows.kept, tile.columns.kept]
        return frames
