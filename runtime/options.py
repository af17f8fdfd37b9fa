"""What may be asked of a video, and of where its engines run: the one list of these options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from t2v_rt.errors import RequestError
from t2v_rt.numbers import as_flag, as_integer, as_number
from t2v_rt.options import option
from t2v_rt.runtime.denoise.guidance import WHOLE, Guidance
from t2v_rt.runtime.denoise.step_cache import check_threshold
from t2v_rt.runtime.noise import check_seed
from t2v_rt.runtime.prompts.tokenizer import check_text
from t2v_rt.runtime.schedulers.base import check_steps

OUTPUT_TYPES = ("np", "uint8", "pil", "latent")
ZERO_INIT_STEPS = 1  # of CFG-Zero*; its paper zeroes the first 4 % of the steps, diffusers' guider one
Prompt = str | Sequence[str]
# settings that are read back as options of the same name
SAME = (
    *(
        "prompt",
        "negative_prompt",
        "seed",
        "height",
        "width",
        "num_frames",
        "num_inference_steps",
        "timesteps",
        "sigmas",
    ),
    *("guidance_scale", "guidance_rescale", "guidance_interval", "cfg_zero_star", "zero_init_steps", "guidance_batch"),
    "step_cache",
)
ARRAYS = ("prompt_embeds", "negative_prompt_embeds", "latents")  # of which settings hold hashes
SCHEDULER, COPIES = "scheduler", "num_videos_per_prompt"


def numbers(text: str) -> list[float]:
    """Reads `1000,750,500`; raises RequestError for what is no list of numbers."""
    try:
        return [float(item) for item in text.split(",")]
    except ValueError:
        raise RequestError(f"{text!r} is not a list of numbers such as 1000,750,500") from None


@dataclass(frozen=True, kw_only=True)
class BackendOptions:
    """Where engines run.

    Args:
        backend: backend that the bundle was built for; another one is refused, and none need be named.
        provider: provider of ONNX Runtime: `cpu` (where it is left out) or `cuda`, which is experimental.
        threads: threads of each engine of ONNX Runtime; all cores where it is left out, and never more than this
            process may use.
        device: index of the GPU that engines run on, as CUDA counts them (the fastest is 0); 0 where it is left out.
        trust: run plans that were not built on this machine by this user; they are native code.
    """

    backend: str | None = option(None, metavar="NAME")
    provider: str | None = option(None, metavar="NAME")
    threads: int | None = option(None, read=int, metavar="COUNT")
    device: int | None = option(None, read=int, metavar="INDEX")
    trust: bool = option(False)


@dataclass(frozen=True, kw_only=True)
class CallOptions:
    """What is asked of a call, but for arrays and callbacks; what is left out, or None, takes the bundle's default.

    Every value is kept as a plain one: numbers of NumPy's kinds become Python's, lists become tuples.

    Args:
        prompt: what to show, in English or Chinese: one text, or a list of them.
        negative_prompt: what to steer away from: one text for all prompts, or a list with one for each.
        height: height in pixels, a multiple of the model's patch.
        width: width in pixels, a multiple of the model's patch.
        num_frames: frames of the video: a multiple of the model's temporal factor, plus one.
        num_inference_steps: denoising steps of the scheduler.
        guidance_scale: strength of classifier-free guidance; 1 turns it off and halves the denoiser calls.
        num_videos_per_prompt: videos of each prompt.
        seed: seed of the noise: one for all videos, or a list with one for each; where it is left out, or -1, one is
            drawn and told.
        output_type: form of the frames: "np" (float32 in [0, 1]), "uint8", "pil" or "latent".
        guidance_rescale: 0 to 1, against the over-exposure of high guidance; 0 turns it off.
        guidance_interval: (start, stop), fractions of the steps that are guided; all where it is left out.
        cfg_zero_star: CFG-Zero* guidance.
        zero_init_steps: first steps that predict zero under CFG-Zero*; 1 where it is left out.
        guidance_batch: both predictions of a step in one batch (True) or in two calls (False); where it is left out,
            the faster one that memory allows, and the settings tell which.
        step_cache: threshold from which on a step is computed and not reused, 0.05 for a start; 0 turns the cache off.
        timesteps: falling timesteps of the schedule, such as 1000,750,500,250, instead of a number of steps.
        sigmas: falling noise levels of the schedule, such as 1.0,0.7,0.4, instead of a number of steps.

    Raises:
        RequestError: a value is invalid by itself, or two of them contradict each other.
    """

    prompt: Prompt | None = option(None, positional=True, metavar="PROMPT", help="what to show, in English or Chinese")
    negative_prompt: Prompt | None = option(None, metavar="TEXT", help="what to steer away from")
    height: int | None = option(None, read=int, metavar="PIXELS")
    width: int | None = option(None, read=int, metavar="PIXELS")
    num_frames: int | None = option(None, read=int, metavar="COUNT")
    num_inference_steps: int | None = option(None, read=int, metavar="COUNT")
    guidance_scale: float | None = option(None, read=float, metavar="SCALE")
    num_videos_per_prompt: int = 1
    seed: int | Sequence[int] | None = option(
        None, read=int, metavar="SEED", help="seed of the noise; where it is left out, or -1, one is drawn and told"
    )
    output_type: str = "np"
    guidance_rescale: float = option(0.0, read=float, metavar="FRACTION")
    guidance_interval: Sequence[float] | None = option(
        None,
        read=numbers,
        metavar="START,STOP",
        help="fractions of the steps between which there is guidance; all steps where it is left out",
    )
    cfg_zero_star: bool = option(False)
    zero_init_steps: int | None = option(None, read=int, metavar="COUNT")
    guidance_batch: bool | None = option(
        None,
        words={"auto": None, "on": True, "off": False},
        help="both predictions of a step in one batch (on) or in two calls (off); auto takes the faster one that "
        "memory allows",
    )
    step_cache: float | None = option(None, read=float, metavar="THRESHOLD")
    timesteps: Sequence[float] | None = option(None, read=numbers, metavar="T,T,…")
    sigmas: Sequence[float] | None = option(None, read=numbers, metavar="S,S,…")

    def __post_init__(self) -> None:
        if self.output_type not in OUTPUT_TYPES:
            raise RequestError(f"output_type is {self.output_type!r}; expected one of {', '.join(OUTPUT_TYPES)}")
        checked: dict[str, Any] = {
            **{name: _texts(name, getattr(self, name)) for name in ("prompt", "negative_prompt")},
            **{name: _positive(name, getattr(self, name)) for name in ("height", "width", "num_frames")},
            **{name: _levels(name, getattr(self, name)) for name in ("timesteps", "sigmas")},
            "num_videos_per_prompt": _positive("num_videos_per_prompt", self.num_videos_per_prompt) or 1,
            "seed": _seeds(self.seed),
            "guidance_batch": _switch("guidance_batch", self.guidance_batch),
            "step_cache": check_threshold(self.step_cache),
        }
        checked["num_inference_steps"] = self._steps(checked)
        guidance = self.guidance(1.0).settings()
        for name, value in guidance.items():
            if getattr(self, name) is not None:
                checked[name] = tuple(value) if isinstance(value, list) else value
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def guidance(self, scale: float) -> Guidance:
        """How the two predictions of a step become one.

        Args:
            scale: for where none is asked for.
        """
        steps = self.zero_init_steps
        if steps is None:
            steps = ZERO_INIT_STEPS if as_flag(self.cfg_zero_star) else 0
        interval = WHOLE if self.guidance_interval is None else self.guidance_interval
        asked = scale if self.guidance_scale is None else self.guidance_scale
        return Guidance(asked, self.guidance_rescale, interval, self.cfg_zero_star, steps)  # type: ignore[arg-type]  # checked there

    def _steps(self, levels: Mapping[str, Sequence[float] | None]) -> int | None:
        """Steps that are asked for: as many as there are timesteps or sigmas, where there are any."""
        asked = self.num_inference_steps
        given = {name: found for name in ("timesteps", "sigmas") if (found := levels[name]) is not None}
        if len(given) > 1:
            raise RequestError("timesteps and sigmas were both given; give one of them")
        for name, found in given.items():
            if asked is not None:
                raise RequestError(
                    f"{len(found)} {name} and num_inference_steps {asked!r} were both given; leave num_inference_steps "
                    "out"
                )
        return None if asked is None else check_steps(asked)


def call_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The values of `CallOptions` that settings stand for, as `Request.settings` tells them.

    Args:
        settings: plain JSON values, such as a video's metadata without what belongs to its file.

    Raises:
        RequestError: a setting is missing, or is not known to this version, which could then not repeat it.
    """
    missing = [name for name in (*SAME, SCHEDULER) if name not in settings]
    known = {*SAME, SCHEDULER, COPIES, *(digest_name(name) for name in ARRAYS)}
    unknown = sorted(set(settings) - known)
    if missing or unknown:
        found = f"no {missing[0]}" if missing else f"{unknown[0]!r}, which this version does not know"
        raise RequestError(f"the settings have {found}; expected all that a video of t2v-rt is made from")
    scheduler = settings[SCHEDULER]
    if not isinstance(scheduler, Mapping) or not isinstance(scheduler.get("_class_name"), str):
        raise RequestError(f"the settings have the scheduler {scheduler!r}; expected its class name and config")
    values = {name: settings[name] for name in SAME}
    if settings["timesteps"] is not None or settings["sigmas"] is not None:
        values["num_inference_steps"] = None  # the length of the list
    if settings["cfg_zero_star"] is False and settings["zero_init_steps"] == 0:
        values["zero_init_steps"] = None
    for name in ("prompt", "negative_prompt"):
        if digest_name(f"{name}_embeds") in settings:
            values[name] = None
    if COPIES in settings:
        values[COPIES] = settings[COPIES]
    return values


def digest_name(name: str) -> str:
    """The setting that stands for an array."""
    return f"{name}_sha256"


def _texts(name: str, text: object) -> Prompt | None:
    if text is None:
        return None
    items = (text,) if isinstance(text, str) else tuple(text) if isinstance(text, (list, tuple)) else ()
    if not items or not all(isinstance(item, str) for item in items):
        raise RequestError(f"{name} is {text!r}; expected text or a list of texts")
    for item in items:
        check_text(name, item)
    return text if isinstance(text, str) else items


def _levels(name: str, values: object) -> tuple[float, ...] | None:
    """Timesteps or sigmas; that they fall, and suit the scheduler, is for the scheduler to say."""
    if values is None:
        return None
    items = _items(values) or ()
    levels = tuple(level for item in items if (level := as_number(item)) is not None)
    if not items or len(levels) != len(items):
        raise RequestError(f"{name} is {values!r}; expected a list of numbers, such as [1000, 750, 500, 250]")
    return levels


def _items(values: object) -> tuple[Any, ...] | None:
    """What a list holds; None for what is no list."""
    several = isinstance(values, (list, tuple)) or (isinstance(values, np.ndarray) and values.ndim == 1)
    return tuple(values) if several else None  # type: ignore[arg-type]


def _seeds(seed: Any) -> int | tuple[int, ...] | None:
    several = _items(seed)
    if several is not None:
        return tuple(check_seed(item) for item in several)
    return None if seed is None else check_seed(seed)


def _switch(name: str, value: object) -> bool | None:
    flag = as_flag(value)
    if value is not None and flag is None:
        raise RequestError(f"{name} is {value!r}; expected True, False, or None to let it be chosen")
    return flag


def _positive(name: str, value: object) -> int | None:
    number = as_integer(value)
    if value is not None and (number is None or number < 1):
        raise RequestError(f"{name} is {value!r}; expected an integer of 1 or more")
    return number
