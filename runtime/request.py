"""One request, validated: what a call asks for, with the bundle's defaults filled in."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t2v_rt.engines.bundle.manifest import Manifest
from t2v_rt.engines.bundle.model import ModelSpec
from t2v_rt.errors import RequestError, type_of
from t2v_rt.numbers import as_flag, as_integer, as_number
from t2v_rt.runtime.denoise.guidance import WHOLE, Guidance
from t2v_rt.runtime.denoise.step_cache import check_threshold
from t2v_rt.runtime.diffusers_habits import advice
from t2v_rt.runtime.noise import Generator, check_generators, check_seed, randn_for
from t2v_rt.runtime.prompts.tokenizer import check_text
from t2v_rt.runtime.schedulers.base import check_steps

OUTPUT_TYPES = ("np", "uint8", "pil", "latent")
ZERO_INIT_STEPS = 1  # of CFG-Zero*; its paper zeroes the first 4 % of the steps, diffusers' guider one
SEED_BITS = 32  # of a seed that is drawn because none was given
RANDOM_SEED = -1  # asks for a drawn one, as in every program of this kind; a generator takes it as a seed, as torch's
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
        guidance: how conditional and unconditional predictions become one.
        num_videos_per_prompt: videos of each prompt.
        seeds: one for all videos, or one per video; empty where generators or latents are given.
        output_type: of the frames.
        prompt_embeds: float32 (B, L, D) instead of prompts.
        negative_prompt_embeds: float32 (B, L, D) instead of negative prompts.
        latents: float32 (B, C, F, H, W) to start from instead of noise.
        guidance_batch: whether both predictions of a step are made in one batch; None until that is chosen.
        step_cache: threshold of the step cache; 0 turns it off.
        timesteps: of the schedule, instead of the scheduler's own.
        sigmas: likewise.
    """

    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...]
    height: int
    width: int
    num_frames: int
    num_inference_steps: int
    guidance: Guidance
    num_videos_per_prompt: int = 1
    seeds: tuple[int, ...] = ()
    output_type: str = "np"
    prompt_embeds: Array | None = field(default=None, repr=False)
    negative_prompt_embeds: Array | None = field(default=None, repr=False)
    latents: Array | None = field(default=None, repr=False)
    guidance_batch: bool | None = None
    step_cache: float = 0.0
    timesteps: tuple[float, ...] | None = None
    sigmas: tuple[float, ...] | None = None

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
            **_digests(prompt_embeds=self.prompt_embeds, negative_prompt_embeds=self.negative_prompt_embeds),
            "seed": self.seeds[0] if len(self.seeds) == 1 else list(self.seeds),
            "height": self.height,
            "width": self.width,
            "num_frames": self.num_frames,
            "num_inference_steps": self.num_inference_steps,
            "timesteps": None if self.timesteps is None else list(self.timesteps),
            "sigmas": None if self.sigmas is None else list(self.sigmas),
            **self.guidance.settings(),
            "guidance_batch": self.guidance_batch,
            "step_cache": self.step_cache,
            "scheduler": dict(scheduler),
        }


def _digests(**arrays: Array | None) -> dict[str, str]:
    """What stands for arrays that were given."""
    return {
        f"{name}_sha256": hashlib.sha256(array.tobytes()).hexdigest()
        for name, array in arrays.items()
        if array is not None
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
    guidance_rescale: float = 0.0,
    guidance_interval: Sequence[float] | None = None,
    cfg_zero_star: bool = False,
    zero_init_steps: int | None = None,
    guidance_batch: bool | None = None,
    step_cache: float | None = None,
    timesteps: Sequence[float] | None = None,
    sigmas: Sequence[float] | None = None,
) -> Request:
    """Validates a call and fills in the bundle's defaults; the arguments are those of the pipeline's call.

    Raises:
        RequestError: a setting is invalid, or two of them contradict each other.
    """
    defaults = manifest.defaults
    if output_type not in OUTPUT_TYPES:
        raise RequestError(f"output_type is {output_type!r}; expected one of {', '.join(OUTPUT_TYPES)}")
    start = None if latents is None else _floats("latents", latents, 5)
    height, width, num_frames = _sizes(manifest, start, height, width, num_frames)
    custom: dict[str, Any] = {"timesteps": _levels("timesteps", timesteps), "sigmas": _levels("sigmas", sigmas)}
    steps = _steps(defaults.num_inference_steps, num_inference_steps, custom)
    scale = defaults.guidance_scale if guidance_scale is None else guidance_scale
    guidance = make_guidance(scale, guidance_rescale, guidance_interval, cfg_zero_star, zero_init_steps)
    count, texts = _texts(manifest, prompt, prompt_embeds, negative_prompt, negative_prompt_embeds)
    copies = _positive("num_videos_per_prompt", num_videos_per_prompt, 1)
    videos = count * copies
    if start is not None and len(start) != videos:
        raise RequestError(f"latents hold {len(start)} videos, the request {videos}; give one for each")
    if generator is not None:
        check_generators(generator, videos)
        if seed is not None:
            raise RequestError("seed and generator were both given; give one of them")
    return Request(
        height=height,
        width=width,
        num_frames=num_frames,
        num_inference_steps=steps,
        guidance=guidance,
        num_videos_per_prompt=copies,
        seeds=_seeds(seed, videos, drawn=generator is not None or start is not None),
        output_type=output_type,
        latents=start,
        guidance_batch=_switch("guidance_batch", guidance_batch),
        step_cache=check_threshold(step_cache),
        **texts,
        **custom,
    )


def make_guidance(
    scale: float, rescale: float, interval: Sequence[float] | None, cfg_zero_star: bool, zero_init_steps: int | None
) -> Guidance:
    """The guidance that a call's arguments describe; what is None takes its default.

    Raises:
        RequestError: a value is out of its range.
    """
    if zero_init_steps is None:
        zero_init_steps = ZERO_INIT_STEPS if as_flag(cfg_zero_star) else 0
    whole = WHOLE if interval is None else interval
    return Guidance(scale, rescale, whole, cfg_zero_star, zero_init_steps)  # type: ignore[arg-type]  # checked there


def check_latents(model: ModelSpec, latents: NDArray[Any], videos: int | None = None) -> Array:
    """Checks latents that are to be looked at or decoded.

    Args:
        model: whose they should be.
        latents: float (B, C, F, h, w).
        videos: B, or None for any number.

    Returns:
        The same as float32.

    Raises:
        RequestError: they are not that, or not finite.
    """
    array = _floats("latents", latents, 5)
    if array.shape[1] != model.latents.channels or 0 in array.shape or len(array) != (videos or len(array)):
        whose = f"{'videos' if videos is None else videos}, {model.latents.channels}, frames, …"
        of = "" if videos is None else ": those of one video of this model"
        raise RequestError(f"latents has shape {list(array.shape)}; expected ({whose}){of}")
    return array


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
        generators = check_generators(generator, shape[0])
    if request.latents is not None:
        return request.latents.copy(), generators
    return randn_for(shape, generators), generators


def _steps(default: int, asked: int | None, custom: Mapping[str, Sequence[float] | None]) -> int:
    """Steps of the request: as many as there are custom timesteps or sigmas, where there are any."""
    given = {name: values for name, values in custom.items() if values is not None}
    if len(given) > 1:
        raise RequestError("timesteps and sigmas were both given; give one of them")
    for name, values in given.items():
        if asked is not None:
            raise RequestError(
                f"{len(values)} {name} and num_inference_steps {asked!r} were both given; leave num_inference_steps out"
            )
        return check_steps(len(values))
    return check_steps(default if asked is None else asked)


def _levels(name: str, values: Sequence[float] | None) -> tuple[float, ...] | None:
    """Custom timesteps or sigmas; that they fall, and suit the scheduler, is for the scheduler to say."""
    if values is None:
        return None
    several = isinstance(values, (list, tuple)) or (isinstance(values, np.ndarray) and values.ndim == 1)
    items = list(values) if several else []

    levels = tuple(level for item in items if (level := as_number(item)) is not None)
    if not items or len(levels) != len(items):
        raise RequestError(f"{name} is {values!r}; expected a list of numbers, such as [1000, 750, 500, 250]")
    return levels


def _switch(name: str, value: bool | None) -> bool | None:
    flag = as_flag(value)
    if value is not None and flag is None:
        raise RequestError(f"{name} is {value!r}; expected True, False, or None to let it be chosen")
    return flag


def _positive(name: str, value: int | None, default: int) -> int:
    number = as_integer(default if value is None else value)
    if number is None or number < 1:
        raise RequestError(f"{name} is {value!r}; expected an integer of 1 or more")
    return number


def _seeds(seed: int | Sequence[int] | None, videos: int, *, drawn: bool) -> tuple[int, ...]:
    several = isinstance(seed, (list, tuple)) or (isinstance(seed, np.ndarray) and seed.ndim == 1)
    if seed is None or (not several and check_seed(seed) == RANDOM_SEED):  # type: ignore[arg-type]
        return () if drawn else (_draw(),)
    given: tuple[Any, ...] = tuple(seed) if several else (seed,)  # type: ignore[arg-type]
    if len(given) not in (1, videos):
        raise RequestError(f"{len(given)} seeds were given for {videos} videos; give one, or one for each")
    seeds = (check_seed(item) for item in given)
    return tuple(_draw() if item == RANDOM_SEED else item for item in seeds)


def _draw() -> int:
    return secrets.randbits(SEED_BITS)


def _texts(
    manifest: Manifest,
    prompt: Prompt | None,
    prompt_embeds: NDArray[Any] | None,
    negative_prompt: Prompt | None,
    negative_prompt_embeds: NDArray[Any] | None,
) -> tuple[int, dict[str, Any]]:
    """The number of prompts, and the request's fields about them: a negative one for each."""
    dim = manifest.model.text.dim
    prompts, embeds = _text("prompt", prompt, prompt_embeds, dim)
    if not prompts and embeds is None:
        raise RequestError("neither prompt nor prompt_embeds was given; give one of them")
    count = len(prompts) if embeds is None else len(embeds)
    negatives, negative_embeds = _text("negative_prompt", negative_prompt, negative_prompt_embeds, dim)
    if negative_embeds is None:
        negatives = negatives or (manifest.defaults.negative_prompt,)
        negatives = negatives * count if len(negatives) == 1 else negatives
    found = len(negatives) if negative_embeds is None else len(negative_embeds)
    if found != count:
        raise RequestError(f"{found} of negative_prompt were given for {count} prompts; give one, or one for each")
    return count, {
        "prompts": prompts,
        "negative_prompts": negatives,
        "prompt_embeds": embeds,
        "negative_prompt_embeds": negative_embeds,
    }


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
    for item in items:
        check_text(name, item)
    return items, None


def _floats(name: str, array: NDArray[Any], dims: int) -> Array:
    if not isinstance(array, np.ndarray) or array.ndim != dims or array.dtype.kind != "f":
        found = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else f"of type {type_of(array)}"
        raise RequestError(
            f"{name} is {found}; expected a floating-point NumPy array of {dims} dimensions{advice(name, array)}"
        )
    with np.errstate(over="ignore"):  # what overflows is refused here
        floats = np.ascontiguousarray(array, np.float32)
    if not np.all(np.isfinite(floats)):
        raise RequestError(f"{name} holds values that are not finite in float32; give finite ones")
    return floats


def _sizes(
    manifest: Manifest, latents: Array | None, height: int | None, width: int | None, num_frames: int | None
) -> tuple[int, int, int]:
    """Height, width and frames: those of the latents, those asked for, or the bundle's."""
    if latents is not None:
        height, width, num_frames = _sizes_of(latents, manifest, height, width, num_frames)
    height = _positive("height", height, manifest.defaults.height)
    width = _positive("width", width, manifest.defaults.width)
    num_frames = _positive("num_frames", num_frames, manifest.defaults.num_frames)
    manifest.model.check_size(height, width, num_frames)
    return height, width, num_frames


def _sizes_of(
    latents: Array, manifest: Manifest, height: int | None, width: int | None, num_frames: int | None
) -> tuple[int, int, int]:
    """The video size that latents stand for; sizes given along with them must agree."""
    model = manifest.model
    channels, sizes, known = latents.shape[1], model.video_size(latents.shape), model.latents.channels
    asked = (height, width, num_frames)
    if channels != known or any(a not in (None, b) for a, b in zip(asked, sizes, strict=True)):
        raise RequestError(
            f"latents {list(latents.shape)} are those of a {sizes[1]}x{sizes[0]} video of {sizes[2]} frames with "
            f"{channels} channels; the request asks for another size, or the model has {known} channels"
        )
    return sizes
