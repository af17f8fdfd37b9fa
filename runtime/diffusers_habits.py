"""What people who know diffusers' pipelines try on this one, and what to do here instead.

Nothing of torch or diffusers is imported: their objects are known by the module that their class is from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from t2v_rt.errors import ForeignAttributeError, RequestError, type_of

# names of diffusers' pipelines, and what to do here
WAYS = (
    (
        "to cuda cpu device _execution_device",
        "from_pretrained(…, provider='cuda') chooses the device of ONNX Runtime; the plans of a bundle run on the GPU",
    ),
    (
        "enable_model_cpu_offload enable_sequential_cpu_offload enable_group_offload disable_model_cpu_offload "
        "reset_device_map maybe_free_model_hooks remove_all_hooks",
        "from_pretrained(…, vram_budget='6GB') keeps engines within a budget, and pipe.close() releases them all",
    ),
    (
        "enable_tiling disable_tiling enable_vae_tiling disable_vae_tiling enable_slicing disable_slicing "
        "enable_vae_slicing disable_vae_slicing",
        "from_pretrained(…, vae_tiles='2x2') decodes in tiles, and vram_budget='6GB' in as many as it needs",
    ),
    (
        "enable_attention_slicing disable_attention_slicing enable_xformers_memory_efficient_attention "
        "disable_xformers_memory_efficient_attention fuse_qkv_projections unfuse_qkv_projections set_attention_backend "
        "enable_freeu disable_freeu",
        "that is built into the engines and has no switch; leave it out",
    ),
    ("half float dtype", "precision is chosen when engines are built, by build_engines(…, precision='fp16')"),
    (
        "transformer transformer_2 unet vae text_encoder tokenizer components",
        "networks are engines of the bundle, which build_engines makes, also from other weights (files={…})",
    ),
    (
        "load_lora_weights unload_lora_weights fuse_lora unfuse_lora set_adapters load_ip_adapter "
        "load_textual_inversion",
        "adapters cannot be added to engines; merge them into the checkpoint before build_engines",
    ),
    ("set_progress_bar_config progress_bar", "give the call progress=f, which is called as f(stage, done, total)"),
    ("_interrupt interrupt", "give the call cancel=threading.Event(), and set that event to end it"),
    (
        "guidance_scale _guidance_scale do_classifier_free_guidance",
        "give the call guidance_scale and, for a part of the steps, guidance_interval=(start, stop)",
    ),
    ("num_timesteps current_timestep", "the step callback is told its step, and progress=f also how many there are"),
    ("save_pretrained push_to_hub", "a bundle is a folder that can be copied; build_engines writes one"),
    ("config", "pipe.manifest tells what the bundle declares, pipe.scheduler.config the sampler's settings"),
)
INSTEAD: Mapping[str, str] = {name: way for names, way in WAYS for name in names.split()}


class DiffusersHabits:
    """Base of a pipeline: what is done in another way here than in diffusers' is answered with that way.

    Where such a name is asked for, and where it is set, a ForeignAttributeError tells it.
    """

    if not TYPE_CHECKING:  # to a type checker, every name would be an attribute that can be set

        def __getattr__(self, name: str) -> Any:
            _refuse(name)
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

        def __setattr__(self, name: str, value: Any) -> None:
            _refuse(name)
            super().__setattr__(name, value)


def _refuse(name: str) -> None:
    if name in INSTEAD:
        raise ForeignAttributeError(f"pipe.{name} is diffusers' and not t2v-rt's: {INSTEAD[name]}")


def scheduler_refusal(value: object) -> RequestError:
    """The error for what was given as a pipeline's scheduler and is none of ours, with what to give."""
    way = "one of t2v_rt.runtime.schedulers, made by get_scheduler(name, pipe.scheduler.config)"
    if type(value).__module__.startswith("diffusers."):
        name = type(value).__name__
        found = f"diffusers' {name}"
        way = f"t2v_rt.runtime.schedulers' own: get_scheduler({name!r}, theirs.config)"
    elif isinstance(value, type):
        found, way = f"the class {value.__name__}", "an instance: its from_config(pipe.scheduler.config)"
    elif isinstance(value, str):
        found = repr(value)
    else:
        found = f"of type {type_of(value)}"
    return RequestError(f"pipe.scheduler is {found}; expected {way}")


def advice(name: str, value: object) -> str:
    """What to add to an error about a foreign object: how to turn it into an array, or nothing.

    Args:
        name: of the argument.
        value: that was given for it.
    """
    return f": {name}.float().cpu().numpy()" if type(value).__module__.partition(".")[0] == "torch" else ""
