"""What would fit where a request does not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from t2v_rt.engines.bundle.manifest import Manifest
from t2v_rt.engines.bundle.profiles import holds
from t2v_rt.runtime.memory.plan import make_plan

SHRINK = 0.9  # of height and width, from one try to the next


def largest_fitting(
    manifest: Manifest, height: int, width: int, num_frames: int, budget: int, own_memory: bool | None = None
) -> dict[str, int] | None:
    """The largest video, of one size with fewer frames or else smaller, whose plan fits a budget.

    One that the engines were built for, if there is any.

    Args:
        manifest: of the bundle.
        height: in pixels, of the request that does not fit.
        width: likewise.
        num_frames: likewise.
        budget: bytes.
        own_memory: as `make_plan` takes it.

    Returns:
        `height`, `width` and `num_frames`, or None where nothing fits.
    """
    sizes = list(_smaller(manifest, height, width, num_frames))
    for size in sorted(sizes, key=lambda size: not holds(manifest.profiles, *size)):  # stable
        shape = manifest.model.latent_shape(1, *size)
        if make_plan(manifest, shape, budget=budget, own_memory=own_memory).fits:
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
    steps = model.steps
    for latents in range(model.decode.latents(num_frames), 0, -1):
        yield height, width, model.decode.frames(latents)
    while height > steps[0] or width > steps[1]:
        height, width = (
            max(step, int(side * SHRINK) // step * step) for side, step in zip((height, width), steps, strict=True)
        )
        yield height, width, model.decode.frames(2)
