"""Which attentions of a graph one kernel must compute, and whether its plan does so and adds up as was asked.

An attention that is not fused has its scores in memory, 26 GB of them for 832x480 and 81 frames. The library refuses
some such graphs, builds others without a word, and chooses by itself what a kernel adds up in. So a plan is read after
it was built, and what it says is held against what was wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from t2v_rt.engines.bundle.profiles import Accumulation, AttentionSpec
from t2v_rt.engines.tensorrt.plan_text import PlanText, coarsest
from t2v_rt.errors import EngineError

# TensorRT-RTX 1.7, built for heads of 8 to 384, one and more, for sm75 and sm89: these are fused, where there are two
# heads or more. Some narrower ones are too.
FUSED_HEADS = range(16, 257)


@dataclass(frozen=True)
class GraphAttention:
    """An attention of a graph.

    Args:
        name: of its node.
        heads: how many; -1 where the graph does not fix it.
        head_size: channels of each; -1 as well.
    """

    name: str
    heads: int
    head_size: int

    @property
    def must_fuse(self) -> bool:
        """Whether there is a kernel for it: it has several heads of a size that kernels are made for."""
        return self.heads != 1 and (self.head_size in FUSED_HEADS or self.head_size < 0)


def prepare_attention(trt: Any, network: Any) -> tuple[GraphAttention, ...]:
    """Lets the attentions that no kernel is made for, and no others, be computed by several kernels.

    Args:
        trt: the library's module.
        network: as the parser made it; its attentions come as plain layers, so they get their class.

    Returns:
        All its attentions.
    """
    result = []
    for layer in (network.get_layer(i) for i in range(network.num_layers)):
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            _, heads, _, head_size = layer.get_input(0).shape
            layer.__class__ = trt.IAttentionInputLayer
            found = GraphAttention(layer.attention.name, heads, head_size)
            layer.attention.decomposable = not found.must_fuse
            result.append(found)
    return tuple(result)


def check_attention(
    graph: str, wanted: Accumulation | None, attentions: Sequence[GraphAttention], plan: PlanText
) -> AttentionSpec:
    """Refuses a plan whose attention is not fused though it should be, or adds up in half without having been asked to.

    Where the plan does not tell, it is not refused, and None is in what is returned.

    Args:
        graph: its path, for errors.
        wanted: what the attentions are to add up in: `fp32`, or anything where it is `fp16` or None.
        attentions: of the graph, one or more.
        plan: what was read from it.

    Returns:
        What the manifest says of it.

    Raises:
        EngineError: it is another plan than was wanted.
    """
    result = read_attention(plan, len(attentions))
    must = {item.name for item in attentions if item.must_fuse}
    apart = sorted({name for program in plan.programs for name in program.unfused or ()} & must)
    if apart:
        raise EngineError(
            f"{graph}: {len(apart)} of {len(must)} attentions were not fused ({apart[0]} is the first), their scores "
            "would be in memory; expected one kernel for each: install the library version that t2v-rt was tested with"
        )
    if wanted == "fp32" and result.accumulation == "fp16":
        raise EngineError(
            f"{graph}: attention adds up in half precision, which long sums leave; expected float32: "
            "install the library version that t2v-rt was tested with, or build with --attention-accumulation fp16"
        )
    return result


def read_attention(plan: PlanText, count: int) -> AttentionSpec:
    """What a plan says of a graph's attentions; None for what it does not tell of each of them.

    Args:
        plan: what was read from it.
        count: attentions of the graph.
    """
    fused = []
    for program in plan.programs:
        names = {item.layer for item in program.fused or ()}
        if len(names) + len(program.unfused or ()) != count:
            return AttentionSpec(count, None, coarsest([item.accumulation for item in plan.programs]))
        fused.append(len(names))
    if not fused:
        return AttentionSpec(count, None, None)
    return AttentionSpec(count, min(fused), coarsest([item.accumulation for item in plan.programs]))
