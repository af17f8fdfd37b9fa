"""Attention as an engine is asked for it: what it adds up in, which decides whether long sums come out right.

A fused kernel in half precision may keep its sums in half too. Its output is divided by the sum of the weights only at
the end, so that after some ten thousand keys a step of the sum is as small as half's last bit, and sums of a few large
values leave half's range. Kernels for bfloat16 add up in float32 as they are; for float16 they do where the operands
come as float32 that was just made of halves: the casts are no kernels of their own, and cost no memory.

Sums in half, where they are asked for, are of values less their mean over the keys: what is left has both signs, so
that sums stay small. The weights of a query sum to one, so the mean is added to what was attended. With float32 sums it
is left alone, though it would do no harm: a self-test on tokens that are all alike would then attend to zeros.
"""

from __future__ import annotations

from t2v_rt.export.graph import GraphWriter


def project_values(g: GraphWriter, x: str, name: str, n_in: int, n_out: int) -> tuple[str, str | None]:
    """Values of a video's tokens for `attend`.

    Args:
        g: takes the nodes.
        x: hidden states (B, tokens, n_in) in the compute dtype.
        name: of the Linear in the checkpoint.
        n_in: its width.
        n_out: width of the values.

    Returns:
        The values (B, tokens, n_out) and their mean over the tokens (B, 1, n_out), both in the compute dtype; None for
        the mean where sums are not in half.
    """
    if g.precision == "fp16" and g.options.accumulation == "fp16":
        value = g.linear(x, name, n_in, n_out)  # before its mean, or the builder keeps the matrix twice
        mean = g.half(g.op("ReduceMean", g.full(x), g.const([1]), keepdims=1))
        return value, g.linear(mean, name, n_in, n_out)
    if g.options.accumulation is None:
        return g.linear(x, name, n_in, n_out), None
    # Of rows and not of (B, tokens, n_in): a builder makes one product of all matrices that multiply the same value,
    # and keeps queries, keys and values until the last of them is used. Where a matrix is used twice, it does not.
    rows = g.linear(g.reshape(x, [-1, n_in]), name, n_in, n_out)
    value = g.reshape(rows, [g.dim(x, 0), -1, n_out])
    return g.reshape(value, [0, 0, n_out]), None  # or ONNX Runtime would not know its width beforehand


def attend(
    g: GraphWriter,
    query: str,
    key: str,
    value: str,
    mask: str | None = None,
    *,
    heads: int,
    scale: float | None = None,
    mean: str | None = None,
    parts: int = 1,
) -> str:
    """Attention of operands (B, tokens, heads * head_dim) in the compute dtype, by one fused kernel where there is one.

    Args:
        g: takes the nodes; its options say what to add up in.
        query: of each token that attends.
        key: of each token that is attended to.
        value: of the same.
        mask: added to the scores, in the compute dtype, (B or 1, heads or 1, queries, keys); None for none.
        heads: of query and key alike.
        scale: of the scores; None for the reciprocal root of the head size.
        mean: of the values, from `project_values`; without it, sums are in float32 even where half was asked for.
        parts: kernels that the heads are shared out to, or more where they do not divide evenly. (Heads and not
            queries: TensorRT-RTX 1.7's builder crashes where two attentions of float32 operands share keys.)

    Returns:
        The attended values, in the compute dtype.
    """
    upcast = g.precision == "fp16" and g.options.accumulation is not None and mean is None
    count = _even_parts(heads, parts)
    attributes: dict[str, float] = {"q_num_heads": heads // count, "kv_num_heads": heads // count}
    if scale is not None:
        attributes["scale"] = scale
    attended = []
    centred = value if mean is None else g.op("Sub", value, mean)
    for part in zip(*(_split(g, operand, count) for operand in (query, key, centred)), strict=True):
        operands = [g.full(operand) for operand in part] if upcast else list(part)
        # a mask stays in half: TensorRT-RTX 1.7 fuses no float32 one
        result = g.op("Attention", *operands, *([mask] if mask else []), **attributes)
        attended.append(g.half(result) if upcast else result)
    result = attended[0] if count == 1 else g.concat(attended, 2)
    return result if mean is None else g.half(g.add(g.full(result), g.full(mean)))


def _split(g: GraphWriter, x: str, count: int) -> list[str]:
    return [x] if count == 1 else g.ops("Split", count, x, axis=2, num_outputs=count)


def _even_parts(heads: int, wanted: int) -> int:
    """The least number of equal parts, as many as wanted or more; one where a head is all there is."""
    return next((count for count in range(wanted, heads + 1) if heads % count == 0), 1)
