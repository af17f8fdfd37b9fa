"""Shape profiles: the sizes an ahead-of-time engine is built for, and what the manifest says of such an engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self

from t2v_rt.errors import RequestError

Accumulation = Literal["fp32", "fp16"]  # what many products are added up in, the default first


@dataclass(frozen=True)
class Range:
    """Sizes from `min` to `max`, and the one between them that an engine is tuned for.

    Raises:
        RequestError: not 1 <= min <= opt <= max.
    """

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise RequestError(f"range {self.min}:{self.opt}:{self.max}; expected min <= opt <= max, all 1 or more")

    @classmethod
    def of(cls, size: int) -> Self:
        """One size only."""
        return cls(size, size, size)

    @property
    def fixed(self) -> bool:
        """Whether it holds one size only."""
        return self.min == self.max

    def __contains__(self, size: object) -> bool:
        return isinstance(size, int) and self.min <= size <= self.max

    def nearest(self, size: int) -> int:
        """The size inside the range that is closest to `size`."""
        return min(max(size, self.min), self.max)

    def map(self, function: Callable[[int], int]) -> Self:
        """The range of what a rising function makes of its sizes."""
        return type(self)(function(self.min), function(self.opt), function(self.max))

    def __str__(self) -> str:
        return str(self.opt) if self.fixed else f"{self.min} to {self.max}"


def nearest_profile(profiles: Sequence[Mapping[str, Range]], sizes: Mapping[str, int]) -> tuple[int, dict[str, int]]:
    """The profile that needs the smallest change of sizes, relative to each, and the sizes changed so that they fit.

    Args:
        profiles: name -> range, one or more, of the same names.
        sizes: name -> wanted size.

    Returns:
        Index of the profile, and the sizes; they are the wanted ones exactly where the profile holds those.
    """
    fitting = [{name: ranges[name].nearest(size) for name, size in sizes.items()} for ranges in profiles]
    changes = [sum(abs(fit[name] - size) / size for name, size in sizes.items()) for fit in fitting]
    index = changes.index(min(changes))
    return index, fitting[index]


@dataclass(frozen=True)
class VideoProfile:
    """Videos that a bundle's engines can make together, in pixels and frames."""

    height: Range
    width: Range
    num_frames: Range

    def __str__(self) -> str:
        return f"{self.width}x{self.height}, {self.num_frames} frames"


def holds(profiles: Sequence[VideoProfile], height: int, width: int, num_frames: int) -> bool:
    """Whether plans were built for a video; without profiles any will do."""
    return not profiles or any(
        height in profile.height and width in profile.width and num_frames in profile.num_frames for profile in profiles
    )


def check_profiles(profiles: Sequence[VideoProfile], height: int, width: int, num_frames: int) -> None:
    """Refuses a video that plans were not built for; without profiles any will do.

    Args:
        profiles: of the bundle.
        height: in pixels.
        width: in pixels.
        num_frames: of the video.

    Raises:
        RequestError: names the nearest that they make.
    """
    if holds(profiles, height, width, num_frames):
        return
    wanted = {"height": height, "width": width, "num_frames": num_frames}
    _, best = nearest_profile([vars(profile) for profile in profiles], wanted)
    raise RequestError(
        f"the plans were not built for {width}x{height} with {num_frames} frames; the nearest video they make is "
        f"{best['width']}x{best['height']} with {best['num_frames']} frames"
    )


Sizes = int | str | None


def parse_profiles(
    height: Sizes, width: Sizes, num_frames: Sizes, defaults: tuple[int, int, int]
) -> tuple[VideoProfile, ...]:
    """Reads the sizes of build-engines.

    Each is one size, a range `min:max` (tuned for its end) or `min:opt:max`, or several of these separated by commas.
    Where one names several, another names as many, taken in order, or one for all.

    Args:
        height: in pixels; None for the default.
        width: in pixels; None for the default.
        num_frames: in frames; None for the default.
        defaults: height, width and frames of what is left out.

    Returns:
        One profile, or as many as the sizes name.

    Raises:
        RequestError: a text that is none of these, or different numbers of sizes.
    """
    names = ("height", "width", "num_frames")
    given = zip(names, (height, width, num_frames), defaults, strict=True)
    lists = {name: _parse_ranges(name, default if value is None else value) for name, value, default in given}
    count = max(len(ranges) for ranges in lists.values())
    for name, ranges in lists.items():
        if len(ranges) not in (1, count):
            raise RequestError(f"{name} names {len(ranges)} sizes, another {count}; expected as many, or one for all")
    rows = zip(*(ranges * count if len(ranges) == 1 else ranges for ranges in lists.values()), strict=True)
    return tuple(VideoProfile(*row) for row in rows)


def _parse_ranges(name: str, value: int | str) -> tuple[Range, ...]:
    ranges = []
    for part in str(value).split(","):
        sizes = part.strip().split(":")
        if not all(size.strip().isdecimal() for size in sizes) or len(sizes) > 3:
            raise RequestError(
                f"{name} is {value!r}; expected a size such as 480, a range such as 480:720, or several with commas"
            )
        numbers = [int(size) for size in sizes]
        middle = numbers[1] if len(numbers) == 3 else numbers[-1]
        ranges.append(Range(numbers[0], middle, numbers[-1]))
    return tuple(ranges)


@dataclass(frozen=True)
class PlanProfile:
    """One shape profile of an engine.

    Args:
        sizes: symbol -> range.
        context_bytes: device memory that a call at the profile's largest sizes works in, weights and what crosses
            the engine's boundary not counted.
    """

    sizes: Mapping[str, Range]
    context_bytes: int


@dataclass(frozen=True)
class AttentionSpec:
    """What a plan was found to make of its graph's attentions, when it was built.

    Args:
        count: attentions of the graph.
        fused: how many of them one kernel computes, the rest have their scores in the context; None where the plan does
            not tell.
        accumulation: the coarsest sum that a fused one adds up in; None where the plan does not tell, or none is fused.
    """

    count: int
    fused: int | None
    accumulation: Accumulation | None

    @property
    def told(self) -> bool:
        """Whether the plan tells all there is to know."""
        return self.fused == 0 or (self.fused is not None and self.accumulation is not None)

    def __str__(self) -> str:
        if self.fused is None:
            return f"{self.count}, whether they are fused is not told by this plan"
        if self.fused == 0:
            return f"{self.count} not fused, scores are in memory"
        sums = "what they add up in is not told by this plan"
        if self.accumulation is not None:
            sums = {"fp16": "adds up in half precision", "fp32": "adds up in float32"}[self.accumulation]
        return f"{self.fused} of {self.count} fused, {sums}"


@dataclass(frozen=True)
class PlanSpec:
    """What is known of an engine that was built ahead of time.

    Args:
        profiles: its shape profiles, in the engine's order.
        weights_bytes: device memory of its weights.
        attention: what it makes of attentions; None where the graph has none, or nobody has read the plan.
        nodes: operator -> number of nodes of the ONNX graph it was built from.
    """

    profiles: tuple[PlanProfile, ...]
    weights_bytes: int
    attention: AttentionSpec | None = None
    nodes: Mapping[str, int] = field(default_factory=dict)


def count_nodes(path: Path) -> dict[str, int]:
    """Operator -> number of nodes of an ONNX graph; empty where the onnx package is not installed."""
    try:
        import onnx
    except ImportError:
        return {}
    model = onnx.load(str(path), load_external_data=False)
    return dict(sorted(Counter(node.op_type for node in model.graph.node).items()))
