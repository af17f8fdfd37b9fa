"""The picture that `generate --preview` writes after each step: what the video looks like so far.

The VAE decoder makes a thumbnail of it (see `t2v_rt.runtime.preview`). Nothing that goes wrong on the way to the
picture ends the video: the run warns of it once and goes on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from t2v_rt.errors import PreviewError, T2VError
from t2v_rt.runtime.pipeline import TextToVideoPipeline
from t2v_rt.runtime.step_callback import StepCallback
from t2v_rt.runtime.video import contact_sheet, write_png

SHEET_COLUMNS = 6


def preview_writer(path: Path) -> StepCallback:
    """A step callback that writes the video as it stands: one image for each latent frame, in the video's size.

    Args:
        path: png file that is written anew after each step.

    Returns:
        The callback; it raises PreviewError where there is no picture of a step.
    """

    def write(pipe: TextToVideoPipeline, step: int, t: float, tensors: dict[str, Any]) -> None:
        frames, factor = pipe.preview(tensors["latents"])[0], pipe.manifest.model.latents.spatial_factor
        sheet = contact_sheet(frames.repeat(factor, 1).repeat(factor, 2), SHEET_COLUMNS)
        try:
            write_png(path, sheet)
        except T2VError as exc:
            raise PreviewError(str(exc)) from exc

    return write
