"""The demo checkpoint makes the video that diffusers makes of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from t2v_rt import TextToVideoPipeline, build_engines
from tests.support.checkpoints import load_reference

CHECKPOINT = Path(__file__).resolve().parent.parent / "demo" / "bouncing-shapes"
VIDEO_TOLERANCE = 0.05 / 255  # largest difference of a frame to diffusers' after the default steps
PROMPT = "a red ball bouncing on a blue background"


def test_the_video_is_diffusers(tmp_path: Path) -> None:
    demo = TextToVideoPipeline.from_pretrained(build_engines(CHECKPOINT, tmp_path / "bundle").folder)
    defaults = demo.manifest.defaults
    expected = load_reference(CHECKPOINT)(
        PROMPT,
        height=defaults.height,
        width=defaults.width,
        num_frames=defaults.num_frames,
        num_inference_steps=defaults.num_inference_steps,
        guidance_scale=defaults.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(0),
        output_type="np",
    ).frames
    assert np.abs(demo(PROMPT, seed=0).frames - expected).max() < VIDEO_TOLERANCE
