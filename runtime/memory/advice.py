"""Whether a request fits in memory, and what would where it does not."""

from __future__ import annotations

import logging
import sys
from bisect import bisect_left
from collections.abc import Mapping
from typing import Any

from t2v_rt.engines.backend_info import backend_info, check_options
from t2v_rt.engines.bundle.manifest import Manifest
from t2v_rt.engines.bundle.profiles import holds
from t2v_rt.errors import RequestError
from t2v_rt.runtime.decode.tiles import parse_grid
from t2v_rt.runtime.families import family_of
from t2v_rt.runtime.memory.estimates import Way, denoise_stage
from t2v_rt.runtime.memory.plan import MemoryPlan, make_plan, parse_bytes, to_json
from t2v_rt.runtime.options import CallOptions
from t2v_rt.runtime.request import Request, make_request

logger = logging.getLogger(__name__)
SHRINK = 0.9  # of height and width, from one try to the next


def largest_fitting(
    manifest: Manifest,
    height: int,
    width: int,
    num_frames: int,
    budget: int,
    own_memory: bool | None = None,
    free: int | None = None,
    previews: bool = False,
) -> dict[str, int] | None:
    """The largest video, of one size with fewer frames or else smaller, whose plan fits a budget.

    One that the engines were built for, if there is any.

    Args:
        manifest: of the bundle.
        height: in pixels, of the request that does not fit.
        width: in pixels, of the request that does not fit.
        num_frames: of the request that does not fit.
        budget: bytes.
        own_memory: as `make_plan` takes it.
        free: as `make_plan` takes it.
        previews: as `make_plan` takes it.

    Returns:
        `height`, `width` and `num_frames`, or None where nothing fits.
    """

    def fits(size: tuple[int, int, int]) -> bool:
        shape = manifest.model.latent_shape(1, *size)
        return make_plan(manifest, shape, budget=budget, own_memory=own_memory, free=free, previews=previews).fits

    shorter, smaller = _smaller(manifest, height, width, num_frames)
    for built in (True, False):
        for sizes in (shorter, smaller):  # in each the memory falls, so the first that fits is found by halving
            known = [size for size in sizes if holds(manifest.profiles, *size) is built]
            index = bisect_left(known, True, key=fits)
            if index < len(known):
                return dict(zip(("height", "width", "num_frames"), known[index], strict=True))
    return None


def advise(manifest: Manifest, best: Mapping[str, int] | None) -> str:
    """Says what `largest_fitting` found, and whether engines must be built for it."""
    if best is None:
        return "no video of this model fits"
    built = "" if holds(manifest.profiles, **best) else ", by engines built for it"
    return f"{best['width']}x{best['height']} with {best['num_frames']} frames would fit{built} (an estimate)"


def check_room(manifest: Manifest, request: Request, plan: MemoryPlan, own_memory: bool | None = None) -> None:
    """Refuses a request that cannot fit, before anything is allocated.

    Args:
        manifest: of the bundle.
        request: whose memory is planned.
        plan: of the request's memory; it knows the budget, and what memory the machine has available.
        own_memory: as `make_plan` takes it.

    Raises:
        RequestError: more is needed than there is or the budget allows; names the largest video that fits.
    """
    size = request.height, request.width, request.num_frames
    measured = plan.free_bytes is not None
    checks = [
        (plan.host_bytes, plan.available_bytes, "the memory available"),
        (plan.least_bytes, plan.budget_bytes, "what the GPU has free for it" if measured else "the budget"),
    ]
    for needed, room, what in checks:
        if room is not None and needed > room:
            previews = plan.preview is not None
            best = largest_fitting(manifest, *size, room, own_memory, plan.free_bytes, previews)
            advice = advise(manifest, best)
            others = "end other programs that use the GPU, or ask for less: " if measured else ""
            raise RequestError(plan.refusal(needed, room, what, f"{others}{advice}"))


def warn_of_spilling(plan: MemoryPlan, free: int | None) -> None:
    """Warns where a budget that the user gave lets a request take more than a card has free.

    Args:
        plan: of the request's memory.
        free: bytes that other programs leave of the card; None where that is not known.
    """
    planned = plan.peak_bytes - plan.reserve_bytes  # which stands for what is on the card already
    if free is not None and planned > free:
        spilling = (
            "; Windows moves what is too much to the machine's memory, which is far slower, unless the NVIDIA control "
            "panel's 'CUDA - Sysmem Fallback Policy' is 'Prefer No Sysmem Fallback'"
        )
        logger.warning(
            "this request is planned with %.3g GB, %.3g GB of the GPU are free; end other programs that use it, or "
            "give a smaller vram_budget%s",
            planned / 1e9,
            free / 1e9,
            spilling if sys.platform == "win32" else "",
        )


def plan_request(
    manifest: Manifest,
    options: CallOptions,
    *,
    vram_budget: str | int | None = None,
    vae_tiles: str | None = None,
    provider: str | None = None,
    previews: bool = False,
) -> dict[str, Any]:
    """Plans a request of a bundle that is known by its manifest alone.

    Args:
        manifest: of the bundle.
        options: whose size is planned; the bundle's where there is none.
        vram_budget: memory of the card, bytes or text such as `8GiB`.
        vae_tiles: tiles of the VAE decoder, such as `2x3`; None for the coarsest grid that keeps to the budget.
        provider: of ONNX Runtime, `cpu` or `cuda`, whether it is here or not; None for `cpu`.
        previews: whether a preview is made after each step.

    Returns:
        `backend`, `height`, `width`, `num_frames`, the plan as `to_json` tells it, `profiles` as `profile_contexts`
        does; and where it does not fit, `largest_fitting`: the size and frames of one that does, or None; `advice` says
        it in words.

    Raises:
        RequestError: a size that the model cannot make, or a budget or tiles that cannot be read.
        BackendError: an unknown provider, or a backend that has none to choose.
    """
    check_options(manifest.backend, {"provider": provider})
    card = backend_info(manifest.backend).has_own_memory(provider)
    request = make_request(manifest, options)
    budget = None if vram_budget is None else parse_bytes(vram_budget)
    grid = None if vae_tiles is None else parse_grid(vae_tiles)
    size = request.height, request.width, request.num_frames
    shape = manifest.model.latent_shape(1, *size)
    made = make_plan(manifest, shape, budget=budget, grid=grid, own_memory=card, previews=previews)
    report = {
        "backend": manifest.backend,
        "height": size[0],
        "width": size[1],
        "num_frames": size[2],
        **to_json(made),
        "profiles": profile_contexts(manifest, size, made.ways[0]),
    }
    if not made.fits and budget is not None:
        report["largest_fitting"] = best = largest_fitting(manifest, *size, budget, card, previews=previews)
        report["advice"] = advise(manifest, best)
    return report


def profile_contexts(manifest: Manifest, size: tuple[int, int, int], way: Way) -> list[dict[str, Any]]:
    """What plans work in for each of the sizes that they were built for; empty where any size will do.

    Args:
        manifest: of the bundle.
        size: height, width and frames of a request.
        way: that it is decoded in.

    Returns:
        For each profile `video`, its sizes in words; `ranged`, whether these are several, of which all are planned with
        the context of the largest; `used`, whether the request is of it; `context_bytes` of the denoise and the decode
        stage.
    """
    family, used, rows = family_of(manifest.model), False, []
    for profile in manifest.profiles:
        largest = profile.height.max, profile.width.max, profile.num_frames.max
        shape = manifest.model.latent_shape(1, *largest)
        stages = denoise_stage(manifest, shape, False)[0], family.decode_memory(manifest, shape, way, 0)[0]
        holding = not used and holds((profile,), *size)  # the first that holds it
        used = used or holding
        rows.append(
            {
                "video": str(profile),
                "ranged": not all(sizes.fixed for sizes in vars(profile).values()),
                "used": holding,
                "context_bytes": {stage.name: stage.context_bytes for stage in stages},
            }
        )
    return rows


def _smaller(
    manifest: Manifest, height: int, width: int, num_frames: int
) -> tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]]:
    """Sizes to try, in falling order: the same picture with fewer frames; smaller pictures, of two latent frames."""
    model, steps = manifest.model, manifest.model.steps
    latents = model.decode.latents(num_frames)
    shorter = [(height, width, model.decode.frames(count)) for count in range(latents, 0, -1)]
    smaller = []
    while height > steps[0] or width > steps[1]:
        height, width = (
            max(step, int(side * SHRINK) // step * step) for side, step in zip((height, width), steps, strict=True)
        )
        smaller.append((height, width, model.decode.frames(2)))
    return shorter, smaller
