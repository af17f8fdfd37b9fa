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
from t2v_rt.runtime.denoise.guidance import Guidance
from t2v_rt.runtime.diffusers_habits import advice
from t2v_rt.runtime.noise import Generator, check_generators, randn_for
from t2v_rt.runtime.options import COPIES, EMBEDS, SCHEDULER, CallOptions, Prompt, call_settings, digest_name
from t2v_rt.runtime.schedulers.base import check_steps

SEED_BITS = 32  # of a seed that is drawn because none was given
RANDOM_SEED = -1  # asks for a drawn one, as in every program of this kind; a generator takes it as a seed, as torch's
Array = NDArray[np.float32]


@dataclass(frozen=True)
class CallArrays:
    """What a call may be given beside its options: arrays, and generators in the place of seeds.

    Args:
        generator: draws the noise instead of a seed's: one, or a list with one for each video.
        latents: float (B, C, F, H, W) to start from instead of noise; they set the video's size.
        prompt_embeds: float (B, L, D) instead of prompt.
        negative_prompt_embeds: float (B, L, D) instead of negative_prompt.
    """

    generator: Generator | Sequence[Generator] | None = None
    latents: NDArray[Any] | None = None
    prompt_embeds: NDArray[Any] | None = None
    negative_prompt_embeds: NDArray[Any] | None = None


NO_ARRAYS = CallArrays()


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
        sigmas: noise levels of the schedule, instead of the scheduler's own.
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

    def latent_shape(self, model: ModelSpec) -> tuple[int, ...]:
        """(B, C, F, H, W) of the request's latents."""
        return model.latent_shape(self.batch, self.height, self.width, self.num_frames)

    def tokens(self, model: ModelSpec) -> int:
        """Patches of all videos together that one prediction of the denoiser is made of."""
        _, _, frames, rows, columns = self.latent_shape(model)
        depth, height, width = model.patch
        return self.batch * (frames // depth) * (rows // height) * (columns // width)

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
            SCHEDULER: dict(scheduler),
            **({} if self.num_videos_per_prompt == 1 else {COPIES: self.num_videos_per_prompt}),
        }

    @classmethod
    def from_settings(cls, manifest: Manifest, settings: Mapping[str, Any], arrays: CallArrays = NO_ARRAYS) -> Request:
        """Reads back what `settings` told, so that it can be made again; the scheduler's are for `get_scheduler`.

        Args:
            manifest: what the bundle declares that the settings came from.
            settings: plain JSON values.
            arrays: what the request was made from beside its settings, which hold hashes of embeddings only.

        Returns:
            A request with the same settings; its frames come as float32 arrays.

        Raises:
            RequestError: a setting is missing, unknown or invalid, or embeddings or noise that the request was made
                from are missing or are other ones.
        """
        values = call_settings(settings)
        for name in EMBEDS:
            array = getattr(arrays, name)
            found = None if array is None else _digests(**{name: _floats(name, array, 3)})[digest_name(name)]
            if found != (recorded := settings.get(digest_name(name))):
                raise RequestError(f"{name} has the sha256 {found}, the settings say {recorded}; give the same arrays")
        if values["seed"] == [] and arrays.generator is None and arrays.latents is None:
            raise RequestError("the settings have no seed: a generator or latents were given; give the same ones")
        if values["seed"] == []:
            values["seed"] = None
        return make_request(manifest, CallOptions(**values), arrays)


def _digests(**arrays: Array | None) -> dict[str, str]:
    """What stands for arrays that were given."""
    return {
        digest_name(name): hashlib.sha256(array.tobytes()).hexdigest()
        for name, array in arrays.items()
        if array is not None
    }


def make_request(manifest: Manifest, options: CallOptions, arrays: CallArrays = NO_ARRAYS) -> Request:
    """Checks a call's options against the model and the arrays, and fills in the bundle's defaults.

    Args:
        manifest: what the bundle declares.
        options: what is asked for.
        arrays: what takes the place of prompts, noise or seeds.

    Raises:
        RequestError: a setting is invalid for the model, or two of them contradict each other.
    """
    defaults = manifest.defaults
    start = None if arrays.latents is None else _floats("latents", arrays.latents, 5)
    height, width, num_frames = _sizes(manifest, start, options)
    count, texts = _texts(manifest, options, arrays)
    videos = count * options.num_videos_per_prompt
    if start is not None and len(start) != videos:
        raise RequestError(f"latents hold {len(start)} videos, the request {videos}; give one for each")
    if arrays.generator is not None:
        check_generators(arrays.generator, videos)
        if options.seed is not None:
            raise RequestError("seed and generator were both given; give one of them")
    timesteps, sigmas = (None if given is None else tuple(given) for given in (options.timesteps, options.sigmas))
    levels, asked = timesteps or sigmas, options.num_inference_steps
    return Request(
        height=height,
        width=width,
        num_frames=num_frames,
        num_inference_steps=check_steps(len(levels) if levels else asked or defaults.num_inference_steps),
        guidance=options.guidance(defaults.guidance_scale),
        num_videos_per_prompt=options.num_videos_per_prompt,
        seeds=_seeds(options.seed, videos, drawn=arrays.generator is not None or start is not None),
        output_type=options.output_type,
        latents=start,
        guidance_batch=options.guidance_batch,
        step_cache=options.step_cache or 0.0,
        timesteps=timesteps,
        sigmas=sigmas,
        **texts,
    )


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
    request: Request, model: ModelSpec, generator: Generator | Sequence[Generator] | None
) -> tuple[Array, list[Generator]]:
    """The latents to start from, and the generators that go on drawing for stochastic samplers.

    One generator draws all videos in one go; a list draws each video's own, as diffusers does.

    Args:
        request: its seeds are used where `generator` is None.
        model: whose latents they are.
        generator: instead of the request's seeds.

    Raises:
        RequestError: the number of generators is neither one nor that of the videos, or they are of another kind.
    """
    if generator is None:
        generators = [Generator(seed) for seed in request.seeds]
    else:
        generators = check_generators(generator, request.batch)
    if request.latents is not None:
        return request.latents.copy(), generators
    return randn_for(request.latent_shape(model), generators), generators


def _seeds(seed: int | Sequence[int] | None, videos: int, *, drawn: bool) -> tuple[int, ...]:
    if seed is None or seed == RANDOM_SEED:
        return () if drawn else (_draw(),)
    given = (seed,) if isinstance(seed, int) else tuple(seed)
    if len(given) not in (1, videos):
        raise RequestError(f"{len(given)} seeds were given for {videos} videos; give one, or one for each")
    return tuple(_draw() if item == RANDOM_SEED else item for item in given)


def _draw() -> int:
    return secrets.randbits(SEED_BITS)


def _texts(
    manifest: Manifest,
    options: CallOptions,
    arrays: CallArrays,
) -> tuple[int, dict[str, Any]]:
    """The number of prompts, and the request's fields about them: a negative one for each."""
    dim = manifest.model.text.dim
    prompts, embeds = _text("prompt", options.prompt, arrays.prompt_embeds, dim)
    if not prompts and embeds is None:
        raise RequestError("neither prompt nor prompt_embeds was given; give one of them")
    count = len(prompts) if embeds is None else len(embeds)
    negatives, negative_embeds = _text("negative_prompt", options.negative_prompt, arrays.negative_prompt_embeds, dim)
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
    return () if text is None else (text,) if isinstance(text, str) else tuple(text), None


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


def _sizes(manifest: Manifest, latents: Array | None, options: CallOptions) -> tuple[int, int, int]:
    """Height, width and frames: those of the latents, those asked for, or the bundle's."""
    defaults = manifest.defaults
    asked = (options.height, options.width, options.num_frames)
    if latents is not None:
        asked = _sizes_of(latents, manifest, asked)
    known = (defaults.height, defaults.width, defaults.num_frames)
    height, width, num_frames = (known[i] if size is None else size for i, size in enumerate(asked))
    manifest.model.check_size(height, width, num_frames)
    return height, width, num_frames


def _sizes_of(latents: Array, manifest: Manifest, asked: tuple[int | None, ...]) -> tuple[int, int, int]:
    """The video size that latents stand for; sizes given along with them must agree."""
    model = manifest.model
    channels, sizes, known = latents.shape[1], model.video_size(latents.shape), model.latents.channels
    if channels != known or any(a not in (None, b) for a, b in zip(asked, sizes, strict=True)):
        raise RequestError(
            f"latents {list(latents.shape)} are those of a {sizes[1]}x{sizes[0]} video of {sizes[2]} frames with "
            f"{channels} channels; the request asks for another size, or the model has {known} channels"
        )
    return sizes
