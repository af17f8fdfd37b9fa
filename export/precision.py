"""Precision as it is asked for: of matmul and convolution operands, and of what attention adds up in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

from t2v_rt.engines.bundle.profiles import Accumulation
from t2v_rt.errors import RequestError

Precision = Literal["fp32", "fp16", "bf16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
COMPUTE_DTYPES: Mapping[Precision, str] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
ACCUMULATIONS: tuple[Accumulation, ...] = get_args(Accumulation)  # the default first


def check_precision(name: str) -> Precision:
    """Returns a supported precision; raises RequestError, with the supported ones, for any other."""
    for known in PRECISIONS:
        if name == known:
            return known
    raise RequestError(f"precision is {name!r}; expected one of {', '.join(PRECISIONS)}")


def check_accumulation(name: str) -> Accumulation:
    """Returns what attention can add up in; raises RequestError, with what there is, for anything else."""
    for known in ACCUMULATIONS:
        if name == known:
            return known
    raise RequestError(f"attention_accumulation is {name!r}; expected one of {', '.join(ACCUMULATIONS)}")
