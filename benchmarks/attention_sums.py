"""What attention over a whole video loses to the order and the precision of its sums, emulated on the CPU.

    python -m t2v_rt.benchmarks.attention_sums --output benchmarks/results/attention_sums.json

A fused attention takes the keys in blocks. Of each block it has the scores, the running maximum, and the exponentials,
whose sum it keeps in float32; they go into the output's accumulator as halves, 16 keys a step, and the accumulator is
divided by their sum only at the end. `attention` does the same, step by step, with what TensorRT-RTX's kernels for
GeForce have for accumulators. Within a step sums are exact here, and a little less so on a card.

Errors are the largest difference from exact attention, relative to its largest value, over `QUERIES` queries of a head.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from t2v_rt.benchmarks import results

BLOCK, STEP = 64, 16  # keys of a block, and those that one instruction multiplies and adds up
HEAD, QUERIES = 128, 32
KEYS = (32_760, 75_600)  # of 832x480 and of 1280x720, 81 frames
Array = NDArray[np.float32]


@dataclass(frozen=True)
class Arithmetic:
    """What a kernel multiplies and adds up in.

    Args:
        operands: of queries, keys, values, weights and results.
        scores: that products of queries and keys are added up in.
        sums: that products of weights and values are added up in.
        centred: whether values come less their mean, which is added to the result.
    """

    operands: Any
    scores: Any
    sums: Any
    centred: bool = False


ACCUMULATORS: Mapping[str, Arithmetic] = {
    "half": Arithmetic(np.float16, np.float16, np.float16),
    "half, scores float32": Arithmetic(np.float16, np.float32, np.float16),
    "half centred": Arithmetic(np.float16, np.float16, np.float16, centred=True),
    "half centred, scores float32": Arithmetic(np.float16, np.float32, np.float16, centred=True),
    "bfloat16": Arithmetic(ml_dtypes.bfloat16, np.float32, np.float32),
    "float32": Arithmetic(np.float16, np.float32, np.float32),
}


@dataclass(frozen=True)
class Setting:
    """What is attended to.

    Args:
        name: of it.
        spread: standard deviation of the scores.
        mean: of the values of a channel, its sign the channel's own.
        deviation: of the values of a channel from that.
        offset: mean of the scores.
    """

    name: str
    spread: float
    mean: float
    deviation: float
    offset: float = 0.0


SETTINGS = (
    Setting("equal values", 1.0, 1.0, 0.0),
    Setting("flat head, values about 2", 0.1, 2.0, 1.0),
    Setting("usual head, values about 0.5", 1.0, 0.5, 1.0),
    Setting("usual head, values about 0", 1.0, 0.0, 1.0),
    Setting("peaked head, values about 0.5", 3.0, 0.5, 1.0),
    Setting("sharp head, values about 0.5", 8.0, 0.5, 1.0),
    Setting("large scores, values about 0.5", 2.0, 0.5, 1.0, offset=30.0),
    Setting("usual head, values 20 times as large", 1.0, 10.0, 20.0),
)


def attention(
    query: Array, key: Array, value: Array, *, accumulator: str = "float32", scale: float | None = None
) -> Array:
    """Attention as a fused kernel computes it.

    Args:
        query: float32 (..., queries, head).
        key: float32 (..., keys, head).
        value: float32 (..., keys, head).
        accumulator: one of `ACCUMULATORS`.
        scale: of the scores; None for the reciprocal root of the head's size. It goes into the queries, as plans do it.

    Returns:
        float32 (..., queries, head), values of the operands' precision; infinite or not a number where sums left it.
    """
    kind = ACCUMULATORS[accumulator]
    mean = _rounded(value.mean(axis=-2, keepdims=True, dtype=np.float64), kind.operands) if kind.centred else None
    queries = _rounded(query * (query.shape[-1] ** -0.5 if scale is None else scale), kind.operands)
    keys, values = _rounded(key, kind.operands), _rounded(value, kind.operands)
    if mean is not None:
        values = _rounded(values - mean, kind.operands)
    shape = (*query.shape[:-1], value.shape[-1])
    highest = np.full((*shape[:-1], 1), -np.inf, np.float32)
    total, sums = np.zeros_like(highest), np.zeros(shape, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, key.shape[-2], BLOCK):
            block = slice(start, min(start + BLOCK, key.shape[-2]))
            scores = _scores(queries, keys[..., block, :], kind.scores)
            before, highest = highest, np.maximum(highest, scores.max(axis=-1, keepdims=True))
            weights, kept = np.exp(scores - highest), np.exp(before - highest)
            total = total * kept + weights.sum(axis=-1, keepdims=True)
            sums = _rounded(sums * kept, kind.sums)
            weights = _rounded(weights, kind.operands)
            for first in range(0, weights.shape[-1], STEP):
                step = slice(first, first + STEP)
                sums = _rounded(sums + weights[..., step] @ values[..., block, :][..., step, :], kind.sums)
        result = _rounded(sums / total, kind.operands)
        return result if mean is None else _rounded(result + mean, kind.operands)


def _rounded(x: NDArray[Any], dtype: Any) -> Array:
    """To a precision and back to float32."""
    with np.errstate(over="ignore"):
        return x.astype(dtype).astype(np.float32)


def _scores(queries: Array, keys: Array, dtype: Any) -> Array:
    turned = np.swapaxes(keys, -1, -2)
    if dtype is np.float32:
        return queries @ turned
    scores = np.zeros((*queries.shape[:-1], keys.shape[-2]), np.float32)
    for first in range(0, queries.shape[-1], STEP):
        step = slice(first, first + STEP)
        scores = _rounded(scores + queries[..., step] @ turned[..., step, :], dtype)
    return scores


def exact_attention(query: Array, key: Array, value: Array) -> NDArray[np.float64]:
    """The same in float64, with nothing rounded; for comparison."""
    scores = query.astype(np.float64) @ np.swapaxes(key, -1, -2).astype(np.float64) / math.sqrt(query.shape[-1])
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    result: NDArray[np.float64] = weights @ value.astype(np.float64) / weights.sum(axis=-1, keepdims=True)
    return result


def operands(setting: Setting, keys: int, queries: int = QUERIES) -> tuple[Array, Array, Array]:
    """Random queries (queries, HEAD), keys and values (keys, HEAD) of a setting."""
    rng = np.random.default_rng(0)
    signs = rng.choice([-1.0, 1.0], HEAD)
    common = math.sqrt(setting.offset / math.sqrt(HEAD))  # of queries and keys alike, which lifts every score
    own = math.sqrt(max(setting.spread**2 - common**2, 0.0))
    query = own * rng.standard_normal((queries, HEAD)) + common * signs
    key = rng.standard_normal((keys, HEAD)) + common * signs
    value = setting.mean * rng.choice([-1.0, 1.0], HEAD) + setting.deviation * rng.standard_normal((keys, HEAD))
    return query.astype(np.float32), key.astype(np.float32), value.astype(np.float32)


def error(setting: Setting, keys: int, accumulator: str, queries: int = QUERIES) -> float:
    """Of attention with an accumulator; infinite where a result is, or is not a number."""
    query, key, value = operands(setting, keys, queries)
    expected = exact_attention(query, key, value)
    found = attention(query, key, value, accumulator=accumulator)
    worst = float(np.abs(found - expected).max() / np.abs(expected).max())
    return worst if math.isfinite(worst) else math.inf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for keys in KEYS:
        print(f"{keys} keys{'':32}" + "".join(f"{name.replace(', scores float32', ' *'):>16}" for name in ACCUMULATORS))
        for setting in SETTINGS:
            errors = {name: error(setting, keys, name) for name in ACCUMULATORS}
            print(f"{setting.name:42}" + "".join(f"{value:16.2g}" for value in errors.values()), flush=True)
            told = {name: value if math.isfinite(value) else "inf" for name, value in errors.items()}
            rows.append({"keys": keys, **asdict(setting), "errors": told})
    print("* scores added up in float32")
    if options.output is not None:
        results.write(options.output, {"head": HEAD, "queries": QUERIES, "results": rows})


if __name__ == "__main__":
    main()
