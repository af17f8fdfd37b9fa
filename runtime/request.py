"""One request, validated: what a call asks for, with the bundle's defaults filled in."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t2v_rt.engines.manifest import Manifest
from t2v_rt.errors import RequestError
from t2v_rt.runtime import wan
from t2v_rt.runtime.noise import Generator, check_seed
from t2v_rt.runtime.scheduler_base import check_steps

OUTPUT_TYPES = ("np", "uint8", "pil", "latent")
SEED_BITS = 32  # of a seed that is drawn because none was given
Array = NDArray[np.float32]
Prompt = str | Sequence[str]


@dataclass(frozen=True)
class Request:
    """A validated request; every field is final.

    Args:
        prompts: one per video before `num_videos_per_prompt`; empty where embeddings are given.
        negative_prompts: as many.
        height: in pixels.
        width: in pixels.
        num_frames: of the video.
        num_inference_steps: steps of the scheduler.
        guidance_scale: classifier-free guidance; at 1 or less there is no second denoiser call.
        num_videos_per_prompt: videos of each prompt.
        seeds: one for all videos, or one per video; empty where generators or latents are given.
        output_type: of the frames.
        prompt_embeds: float32 (B, L, D) instead of prompts.
        negative_prompt_embeds: float32 (B, L, D) instead of negative prompts.
        latents: float32 (B, C, F, H, W) to start from instead of noise.
    """

    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...]
    height: int
    width: int
    num_frames: int
    num_inference_steps: int
    guidance_scale: float
    num_videos_per_prompt: int = 1
    seeds: tuple[int, ...] = ()
    output_type: str = "np"
    prompt_embeds: Array | None = field(default=None, repr=False)
    negative_prompt_embeds: Array | None = field(default=None, repr=False)
    latents: Array | None = field(default=None, repr=False)

    @property
    def batch(self) -> int:
        """Videos of the request."""
        prompts = len(self.prompts) if self.prompt_embeds is None else len(self.prompt_embeds)
        return prompts * self.num_videos_per_prompt

    def settings(self, scheduler: Mapping[str, Any]) -> dict[str, Any]:
        """Everything that determines the result, as plain JSON values."""
        single = len(self.prompts) == 1
        return {
            "prompt": self.prompts[0] if single else list(self.prompts),
            "negative_prompt": self.negative_prompts[0] if single else list(self.negative_prompts),
            "seed": self.seeds[0] if len(self.seeds) == 1 else list(self.seeds),
            "height": self.height,
            "width": self.width,
            "num_frames": self.num_frames,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "scheduler": dict(scheduler),
        }


def make_request(
    manifest: Manifest,
    *,
    prompt: Prompt | None,
    negative_prompt: Prompt | None = None,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    num_videos_per_prompt: int = 1,
    seed: int | Sequence[int] | None = None,
    generator: Generator | Sequence[Generator] | None = None,
    latents: NDArray[Any] | None = None,
    prompt_embeds: NDArray[Any] | None = None,
    negative_prompt_embeds: NDArray[Any] | None = None,
    output_type: str = "np",
) -> Request:
    """Validates a call and fills in the bundle's defaults; the arguments are those of the pipeline's call.

    Raises:
        RequestError: a setting is invalid, or two of them contradict each other.
    """
    model, defaults = manifest.model, manifest.defaults
    if output_type not in OUTPUT_TYPES:
        raise RequestError(f"output_type is {output_type!r}; expected one of {', '.join(OUTPUT_TYPES)}")
    start = None if latents is None else _floats("latents", latents, 5)
    if start is not None:
        height, width, num_frames = _sizes_of(start, manifest, height, width, num_frames)
    height = _positive("height", height, defaults.height)
    width = _positive("width", width, defaults.width)
    num_frames = _positive("num_frames", num_frames, defaults.num_frames)
    wan.check_size(model, height, width, num_frames)
    scale = defaults.guidance_scale if guidance_scale is None else guidance_scale
    _check_guidance(scale)
    prompts, embeds = _text("prompt", prompt, prompt_embeds, model.text_dim)
    if not prompts and embeds is None:
        raise RequestError("neither prompt nor prompt_embeds was given; give one of them")
    count = len(prompts) if embeds is None else len(embeds)
    negatives, negative_embeds = _text("negative_prompt", negative_prompt, negative_prompt_embeds, model.text_dim)
    if negative_embeds is None:
        negatives = negatives or (defaults.negative_prompt,)
        negatives = negatives * count if len(negatives) == 1 else negatives
    found = len(negatives) if negative_embeds is None else len(negative_embeds)
    if found != count:
        raise RequestError(f"{found} of negative_prompt were given for {count} prompts; give one, or one for each")
    videos = count * _positive("num_videos_per_prompt", num_videos_per_prompt, 1)
    if start is not None and len(start) != videos:
        raise RequestError(f"latents hold {len(start)} videos, the request {videos}; give one for each")
    return Request(
        prompts=prompts,
        negative_prompts=negatives,
        height=height,
        width=width,
        num_frames=num_frames,
        num_inference_steps=check_steps(
            defaults.num_inference_steps if num_inference_steps is None else num_inference_steps
        ),
        guidance_scale=float(scale),
        num_videos_per_prompt=num_videos_per_prompt,
        seeds=_seeds(seed, videos, drawn=generator is not None or start is not None),
        output_type=output_type,
        prompt_embeds=embeds,
        negative_prompt_embeds=negative_embeds,
        latents=start,
    )


def make_noise(
    request: Request, shape: tuple[int, ...], generator: Generator | Sequence[Generator] | None
) -> tuple[Array, list[Generator]]:
    """The latents to start from, and the generators that go on drawing for stochastic samplers.

    One generator draws all videos in one go; a list draws each video's own, as diffusers does.

    Args:
        request: its seeds are used where `generator` is None.
        shape: (B, C, F, H, W).
        generator: instead of the request's seeds.

    Raises:
        RequestError: the number of generators is neither one nor that of the videos, or they are of another kind.
    """
    if generator is None:
        generators = [Generator(seed) for seed in request.seeds]
    else:
        generators = [generator] if isinstance(generator, Generator) else list(generator)
        if not all(isinstance(item, Generator) for item in generators):
            raise RequestError(
                f"generator is a {type(generators[0]).__name__}; expected t2v_rt.runtime.noise.Generator, or give seed"
            )
        if len(generators) not in (1, shape[0]) or not generators:
            raise RequestError(f"{len(generators)} generators were given for {shape[0]} videos; give one, or one each")
    if request.latents is not None:
        return request.latents.copy(), generators
    if len(generators) == 1:
        return generators[0].randn(shape), generators
    return np.concatenate([item.randn((1, *shape[1:])) for item in generators]), generators


def _check_guidance(scale: float) -> None:
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not math.isfinite(scale) or scale < 0:
        raise RequestError(f"guidance_scale is {scale!r}; expected a finite number of 0 or more (1 turns guidance off)")


def _positive(name: str, value: int | None, default: int) -> int:
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        raise RequestError(f"{name} is {value!r}; expected an integer of 1 or more")
    return int(value)


def _seeds(seed: int | Sequence[int] | None, videos: int, *, drawn: bool) -> tuple[int, ...]:
    if seed is None:
        return () if drawn else (secrets.randbits(SEED_BITS),)
    seeds = tuple(seed) if isinstance(seed, (list, tuple)) else (seed,)
    if len(seeds) not in (1, videos):
        raise RequestError(f"{len(seeds)} seeds were given for {videos} videos; give one, or one for each")
    return tuple(check_seed(item) for item in seeds)  # type: ignore[arg-type]


def _text(
    name: str, text: Prompt | None, embeds: NDArray[Any] | None, dim: int
) -> tuple[tuple[str, ...], Array | None]:
    if text is not None and embeds is not None:
        raise RequestError(f"both {name} and {name}_embeds were given; give one of them")
    if embeds is not None:
        array = _floats(f"{name}_embeds", embeds, 3)
        if array.shape[2] != dim or 0 in array.shape:
            raise RequestError(f"{name}_embeds has shape {list(array.shape)}; expected (videos, positions, {dim})")
        return (), array
    if text is None:
        return (), None
    items = (text,) if isinstance(text, str) else tuple(text) if isinstance(text, (list, tuple)) else ()
    if not items or not all(isinstance(item, str) for item in items):
        raise RequestError(f"{name} is {text!r}; expected text or a list of texts")
    return items, None


def _floats(name: str, array: NDArray[Any], dims: int) -> Array:
    if not isinstance(array, np.ndarray) or array.ndim != dims or array.dtype.kind != "f":
        found = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
        raise RequestError(f"{name} is {found}; expected a floating-point NumPy array of {dims} dimensions")
    if not np.all(np.isfinite(array)):
        raise RequestError(f"{name} holds values that are not finite")
    return np.ascontiguousarray(array, np.float32)


def _sizes_of(
    latents: Array, manifest: Manifest, height: int | None, width: int | None, num_frames: int | None
) -> tuple[int, int, int]:
    """The video size that latents stand for; sizes given along with them must agree."""
    model = manifest.model
    _, channels, frames, rows, columns = latents.shape
    sizes = (
        rows * model.spatial_factor,
        columns * model.spatial_factor,
        (frames - 1) * model.temporal_factor + 1,
    )
    asked = (height, width, num_frames)
    if channels != model.latent_channels or any(a not in (None, b) for a, b in zip(asked, sizes, strict=True)):
        raise RequestError(
            f"latents {list(latents.shape)} are those of a {sizes[1]}x{sizes[0]} video of {sizes[2]} frames with "
            f"{channels} channels; the request asks for another size, or the model has {model.latent_channels} channels"
        )
    return sizes
