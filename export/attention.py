"""Attention as an engine is asked for it: what it adds up in, which decides whether long sums come out right.

A fused kernel in half precision may keep its sums in half too. Its output is divided by the sum of the weights only at
the end, so that after some ten thousand keys a step of the sum is as small as half's last bit, and sums of a few large
values leave half's range. Kernels for bfloat16 add up in float32 as they are; for float16 they do where the operands
come as float32 that was just made of halves: the casts are no kernels of their own, and cost no memory.
"""

from __future__ import annotations

from t2v_rt.export.graph import GraphWriter


def attend(
    g: GraphWriter,
    query: str,
    key: str,
    value: str,
    mask: str | None = None,
    *,
    heads: int,
    scale: float | None = None,
) -> str:
    """Attention of operands (B, tokens, heads * head_dim) in the compute dtype, by one fused kernel where there is one.

    Args:
        g: takes the nodes.
        query: of each token that attends.
        key: of each token that is attended to.
        value: of the same.
        mask: added to the scores, in the compute dtype, (B or 1, heads or 1, queries, keys); None for none.
        heads: of query and key alike.
        scale: of the scores; None for the reciprocal root of the head size.

    Returns:
        The attended values, in the compute dtype.
    """
    operands = [query, key, value] + ([mask] if mask else [])
    attributes = {"q_num_heads": heads, "kv_num_heads": heads} | ({} if scale is None else {"scale": scale})
    if not (g.precision == "fp16" and g.options.accumulation == "fp32"):
        return g.op("Attention", *operands, **attributes)
    # a mask stays in half: TensorRT-RTX 1.7 fuses no float32 one
    operands[:3] = [g.full(operand) for operand in operands[:3]]
    return g.half(g.op("Attention", *operands, **attributes))
