"""What a call gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class TextToVideoOutput:
    """Frames and how they came about.

    Args:
        frames: (B, F, H, W, 3) float32 in [0, 1] for "np", uint8 for "uint8", lists of PIL images per video for "pil",
            or the latents (B, C, F, H, W) float32 for "latent".
        seed: the seed, or one per video; None where a generator or latents were given.
        settings: everything that determines the result, as plain JSON values.
        stage_seconds: wall time of `encode`, `denoise` and `decode`, loading of engines included.
        step_calls: denoiser predictions made for each video in each step: 2 with guidance, whether in one batch or in
            two calls, 0 where the step cache or zero-init stood in.
        skipped_calls: such predictions that the step cache avoided.
        peak_rss_bytes: the most memory the process has held resident so far.
    """

    frames: Any = field(repr=False)
    seed: int | list[int] | None
    settings: Mapping[str, Any] = field(repr=False)
    stage_seconds: Mapping[str, float]
    step_calls: tuple[int, ...]
    skipped_calls: int
    peak_rss_bytes: int
