"""Tensors that change what others mean, told by their names: weights read without them would be other weights.

Source of the names: ComfyUI (`scaled_fp8`, `scale_weight`, `comfy_quant`), bitsandbytes (`absmax`, `quant_map`,
`quant_state`, `SCB`), GPTQ and AWQ (`qweight`, `qzeros`, `scales`, `g_idx`), DeepSeek (`weight_scale_inv`),
compressed-tensors, torchao and quanto; the adapters of PEFT, kohya's scripts and LyCORIS.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from t2v_rt.errors import CheckpointError
from t2v_rt.export.tensor_file import ITEM_BYTES, StoredTensor

PLAIN = "expected the weights themselves in fp16, bf16 or fp32"
LAST = r"(?:.*\.)?"  # a name whose last part is
# each network's own tensors are `weight`, `bias`, `gamma`, `modulation` and these; none of them is what a rule names
OWN = re.compile(LAST + r"scale_shift_table")
RULES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE), meaning)
    for pattern, meaning in (
        (
            r"(?:.*[._])?(?:lora|lycoris|locon|lokr|loha|hada|dora|oft|boft|ia3)(?:[._].*)?",
            "is part of an adapter, such as a LoRA, which changes a network; expected the network with it merged in",
        ),
        (
            LAST + r"(?:alpha|dora_scale|diff(?:_[bm])?|set_weight|reshape_weight|[wb]_norm)",
            "is part of an adapter or patch, which changes a network; expected the network with it merged in",
        ),
        (LAST + r"scaled_fp8", f"tells that 8-bit weights are to be multiplied by scales; {PLAIN}"),
        (LAST + r"(?:\w*_)?w?scales?(?:_\w+)?", f"is a scale that quantized weights are multiplied by; {PLAIN}"),
        (
            LAST + r"(?:\w*_)?(?:absmax|quant_map|quant_state\b.*|comfy_quant|qweight|q?zeros|zero_points?|g_idx|scb|"
            r"weight_format|codebooks?|qdata|packed|weight_shape|smooth(?:_factor)?|channel_mask)",
            f"is a part of quantized weights; {PLAIN}",
        ),
        (LAST + r"weight\._(?:data|scale|shift)", f"is a part of quantized weights; {PLAIN}"),
        (LAST + r"(?:weight|bias)_(?:mask|orig|delta)", f"is a mask or change of pruned weights; {PLAIN}"),
    )
)
SMALL = re.compile(r"F4|F6_|F8_|E8M0")  # begins the dtypes of floats in 8 bits and less


def refuse_altering(tensors: Mapping[str, StoredTensor], example: str = "") -> None:
    """Refuses a network whose weights are not what its tensors hold by themselves.

    Args:
        tensors: name -> place.
        example: a file that would do, for the error.

    Raises:
        CheckpointError: names the tensor, what it means and what to use instead.
    """
    such = f", such as {example}" if example else ""
    for name, tensor in tensors.items():
        meaning = next((meaning for rule, meaning in RULES if rule.fullmatch(name)), None)
        if meaning is not None and not OWN.fullmatch(name):
            raise CheckpointError(f"{tensor.file}: tensor {name!r} {meaning}{such}")
    for name, tensor in tensors.items():
        if SMALL.match(tensor.dtype):
            raise CheckpointError(f"{tensor.file}: tensor {name!r} is of 8-bit floats ({tensor.dtype}); {PLAIN}{such}")
        if name.endswith("weight") and tensor.dtype not in ITEM_BYTES:
            raise CheckpointError(f"{tensor.file}: tensor {name!r} is of integers ({tensor.dtype}); {PLAIN}{such}")


def refuse_quantized(config: Mapping[str, Any], place: str) -> None:
    """Refuses a network whose `config.json` says that its weights are quantized; `place` names it for the error."""
    found = config.get("quantization_config")
    if found:
        method = found.get("quant_method", "unknown") if isinstance(found, Mapping) else found
        raise CheckpointError(f"{place}: quantization_config is there, its method {method!r}; {PLAIN}")
