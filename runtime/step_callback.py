"""What a step callback is given of a run, and what it may change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t2v_rt.errors import RequestError, type_of
from t2v_rt.runtime.diffusers_habits import advice

Array = NDArray[np.float32]
StepCallback = Callable[[Any, int, float, dict[str, Any]], Mapping[str, Any] | None]  # given the pipeline
CALLBACK_TENSORS = ("latents", "prompt_embeds", "negative_prompt_embeds")


def changed_tensors(returned: Any, tensors: Mapping[str, Array | None]) -> dict[str, Array | None]:
    """A step's tensors after its callback: what that returned, as float32, in the place of the old ones.

    Raises:
        RequestError: not a mapping, an unknown name, another shape, or values that are not finite numbers.
    """
    if returned is not None and not isinstance(returned, Mapping):
        raise RequestError(f"the step callback returned a {type(returned).__name__}; expected a dict, or None")
    changed = dict(tensors)
    for name, value in (returned or {}).items():
        old, array = tensors.get(name), _as_array(name, value)
        if old is None or array.shape != old.shape or array.dtype.kind not in "fiu":
            raise RequestError(
                f"the step callback returned {name!r} of shape {list(array.shape)} and dtype {array.dtype}; expected "
                f"{f'numbers of shape {list(old.shape)}' if old is not None else ', '.join(CALLBACK_TENSORS)}"
            )
        with np.errstate(over="ignore"):  # what overflows is refused below
            changed[name] = np.ascontiguousarray(array, np.float32)
    for name in {"latents", *(returned or {})}:  # latents may also have been changed in place
        if not np.all(np.isfinite(changed[name])):  # type: ignore[arg-type]
            raise RequestError(f"the step callback left {name!r} with values that are not finite; return finite ones")
    return changed


def _as_array(name: str, value: Any) -> NDArray[Any]:
    """What a callback returned for a tensor; raises RequestError where NumPy cannot take it, as of a GPU's memory."""
    try:
        return np.asarray(value)
    except Exception as exc:  # the other library's own
        raise RequestError(
            f"the step callback returned {name!r} of type {type_of(value)}; expected a NumPy array{advice(name, value)}"
        ) from exc
