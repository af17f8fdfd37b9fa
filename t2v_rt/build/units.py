"""The units of a build: engines that are made together, and how each is to be written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod

from t2v_rt.engines.bundle.manifest import Defaults, TileSpec
from t2v_rt.engines.bundle.model import ModelSpec
from t2v_rt.engines.bundle.profiles import Accumulation, Range, VideoProfile
from t2v_rt.export.family import TEXT_ENCODER, Configs
from t2v_rt.export.graph import GraphOptions
from t2v_rt.export.precision import Precision
from t2v_rt.export.quantize import Quantization

MANY_TOKENS = 512  # of a denoiser: whole scores and widened values are as fast with fewer, and take little memory
SLICES = 3  # of a feed-forward: less than half the memory, 13 % less time at 4,500 tokens and as much at 768


@dataclass(frozen=True)
class Unit:
    """Engines that share weights, and so are made together.

    Args:
        component: its name.
        roles: of the engines.
        precision: of matmul and convolution operands.
        graph_options: role -> how the backend wants the graph; None for the plain form.
        ranges: role -> sizes of each shape profile of a plan.
        tiles: that the component works on.
    """

    component: str
    roles: tuple[str, ...]
    precision: Precision
    graph_options: Mapping[str, GraphOptions] | None = None
    ranges: Mapping[str, Sequence[Mapping[str, Range]]] = field(default_factory=dict)
    tiles: TileSpec | None = None

    @property
    def name(self) -> str:
        return f"{self.component}.{self.roles[0]}"


def graph_units(
    configs: Configs, components: Sequence[str], precision: Precision, text_weights: str, *, defaults: Defaults
) -> tuple[Unit, ...]:
    """The units of graphs, in the order they are made; ONNX Runtime multiplies quantized matrices in float32 only.

    Args:
        configs: of the checkpoint.
        components: to build.
        precision: of matmul and convolution operands.
        text_weights: `int8` or `int4` for the text encoder's matrices, or empty.
        defaults: of requests, whose size decides the form.
    """
    form, result = graph_form(configs.model(), defaults), []
    for name in components:
        own, kind = form, precision
        if name == TEXT_ENCODER and text_weights:
            own, kind = replace(form, quantization=Quantization(text_weights, "MatMulNBits")), "fp32"
        for roles in configs.units(name):
            result.append(Unit(name, roles, kind, dict.fromkeys(roles, own), tiles=configs.tiles(name)))
    return tuple(result)


def graph_form(model: ModelSpec, defaults: Defaults) -> GraphOptions:
    """How graphs are written for ONNX Runtime: for little memory, but where the default video is small, for speed.

    They take any size all the same; the manifest tells which of them hold attention scores.
    """
    shape = model.latent_shape(1, defaults.height, defaults.width, defaults.num_frames)
    tokens = prod(size // patch for size, patch in zip(shape[2:], model.patch, strict=True))
    return GraphOptions(tiled_attention=True, slices=SLICES) if tokens >= MANY_TOKENS else GraphOptions()


def plan_units(
    configs: Configs,
    components: Sequence[str],
    precision: Precision,
    text_weights: str,
    *,
    profiles: Sequence[VideoProfile],
    turing: bool,
    accumulation: Accumulation = "fp32",
) -> tuple[Unit, ...]:
    """The units of plans, in the order they are made.

    Args:
        configs: of the checkpoint.
        components: to build.
        precision: that was asked for; a component may have another, see `Configs.plan_precision`.
        text_weights: `int8` or `int4` for the text encoder's matrices, or empty.
        profiles: of videos that the plans are built for.
        turing: whether a GPU of the sm75 is among their targets, which multiplies neither float32 nor bfloat16.
        accumulation: what attention adds up in.
    """
    ranges = configs.ranges(profiles)
    graph_options = dict(configs.graph_options(ranges, not turing, accumulation))
    if text_weights:
        scheme = Quantization(text_weights, "DequantizeLinear")
        graph_options[TEXT_ENCODER] = {
            role: replace(options, quantization=scheme) for role, options in graph_options[TEXT_ENCODER].items()
        }
    return tuple(
        Unit(
            name,
            roles,
            configs.plan_precision(name, precision, turing),
            graph_options[name],
            ranges[name],
            configs.tiles(name, profiles),
        )
        for name in components
        for roles in configs.units(name)
    )
