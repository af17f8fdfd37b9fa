"""What a card will get, read from a plan: without a GPU no plan can be loaded, but much of it is text.

For each shape profile that was compiled, a plan says in words what memory it works in and which kernels it launches,
and it carries the source of those that are compiled on the card; the weights follow as binary. What is not found in the
text, as in a plan of another version of the library, is None here, and nobody may take it for an answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import BinaryIO

from t2v_rt.engines.bundle.profiles import Accumulation

HEAD = b"header {\n  version = "  # of each program
PIECE = 8 << 20  # bytes that are searched at once
BLOCK = 64 << 10  # bytes that are text or not
PRINTABLE = bytes([9, 10, *range(32, 127)])
NOT_TEXT = 1 / 4  # of other bytes: source has a few between functions, weights of half precision a half or more
FUSED = "_gemm_mha"  # kernels for a whole attention begin so
# they order streams, or compute shapes on the host
NO_KERNELS = frozenset(["signal", "wait", "shape_call", "reshape", "cast"])
# what a matrix product adds up in, by the last word of its traits; there is no other sum for bfloat16 (PTX ISA, mma)
SUMS: Mapping[str, Accumulation] = {"fp16": "fp16", "fp32": "fp32", "bf16": "fp32"}

TARGETS = re.compile(rb"\n  accelerators=\{([^}]*)\}")
REGION = re.compile(rb"\n  region = \{ name=(\S+) size=(\d+) [^\n]*?type=(\w+) place=(\w+)")
TENSOR = re.compile(rb'\n  (?:sub_)?tensor=\{[^\n]*? dims=\{ ([^}]*)\}[^\n]*? name="([^"\n]+)"')
MAIN = re.compile(rb"\nmain \{\n(.*?)\n\}\n", re.DOTALL)
INSTRUCTION = re.compile(r'\s*(\w+)=\{ name="?([^\s"]+)')
FULL_NAME = re.compile(r" fqn=(\S+) ")
ARGUMENTS = re.compile(r' input_args=\{ "([^"]+)" "([^"]+)"')  # queries and keys
LAYERS = re.compile(r"\[ONNX Layer: ([^\]]*Attention[^\]]*)\]")
SOURCE = re.compile(
    rb"Kernel_traits\w*<\s*fmha::(\w+)_traits,\s*fmha::(\w+)_traits.*?__global__ void (\w+)\(", re.DOTALL
)


@dataclass(frozen=True)
class Region:
    """Memory that a program works in.

    Args:
        name: of the library.
        bytes: its size.
        owner: `user` where the caller gives it, else `system`.
        place: `accelerator` or `host`.
    """

    name: str
    bytes: int
    owner: str
    place: str

    @property
    def is_context(self) -> bool:
        """Whether it is part of the workspace that a call is given."""
        return (self.owner, self.place) == ("user", "accelerator")


@dataclass(frozen=True)
class FusedAttention:
    """An attention that one kernel computes.

    Args:
        kernel: its full name.
        layer: the graph's node.
        queries: how many; None where the number changes from call to call, or is not told.
        keys: as `queries`.
        alike: whether there are as many keys as queries, which self attention has; None where it is not told.
        scores: what the products of queries and keys are added up in; None where it is not told.
        values: as `scores`, of the weighted sum of values.
    """

    kernel: str
    layer: str
    queries: int | None
    keys: int | None
    alike: bool | None
    scores: Accumulation | None = None
    values: Accumulation | None = None

    @property
    def accumulation(self) -> Accumulation | None:
        """The coarser of both sums; None where they are not told."""
        return coarsest([self.scores, self.values])


@dataclass(frozen=True)
class Program:
    """What a plan runs for one shape profile.

    Args:
        targets: the GPUs it is for, all of which get the same kernels; None where they are not told.
        regions: of its memory; None where they are not told.
        launches: kernels of a call; None where they are not told.
        sources: how many different ones of them come as source, and are compiled on the card.
        fused: its attentions that one kernel computes.
        unfused: graph nodes of attentions whose scores are a matrix in memory.
    """

    targets: tuple[str, ...] | None
    regions: tuple[Region, ...] | None
    launches: int | None
    sources: int | None
    fused: tuple[FusedAttention, ...] | None
    unfused: tuple[str, ...] | None

    @property
    def context_bytes(self) -> int | None:
        """Device memory that the caller gives it to work in; None where it is not told."""
        if self.regions is None:
            return None
        return sum(item.bytes for item in self.regions if item.is_context)

    @property
    def accumulation(self) -> Accumulation | None:
        """What the coarsest of its fused attentions adds up in; None where it is not told."""
        return None if self.fused is None else coarsest([item.accumulation for item in self.fused])


@dataclass(frozen=True)
class PlanText:
    """What a plan tells of itself.

    Args:
        programs: one for each shape profile that was compiled by itself; none where the plan tells nothing.
    """

    programs: tuple[Program, ...]


def read_plan(stream: BinaryIO) -> PlanText:
    """Reads the text of a plan; a small part of the file is in memory at a time.

    Args:
        stream: the open file, at any position.
    """
    programs: list[Program] = []
    sources: dict[str, tuple[Accumulation | None, Accumulation | None]] = {}
    for text in _texts(stream):
        sources |= {kernel.decode(): (_sums(qk), _sums(pv)) for qk, pv, kernel in SOURCE.findall(text)}
        targets = TARGETS.search(text)
        if targets is None or targets[1].strip() != b"*":  # a part of the program before it, chosen on the card
            programs.append(_read_program(text))
    return PlanText(tuple(replace(program, fused=_with_sums(program.fused, sources)) for program in programs))


def _texts(stream: BinaryIO) -> Iterator[bytes]:
    """The text of each program, the sources that follow it included."""
    starts = list(_find_all(stream, HEAD))
    for start, end in zip(starts, [*starts, None][1:], strict=True):
        stream.seek(start)
        blocks: list[bytes] = []
        left = None if end is None else end - start
        while block := stream.read(BLOCK if left is None else min(BLOCK, left)):
            blocks.append(block)
            left = None if left is None else left - len(block)
            if len(block.translate(None, PRINTABLE)) > len(block) * NOT_TEXT:
                break
        yield b"".join(blocks)


def _find_all(stream: BinaryIO, wanted: bytes) -> Iterator[int]:
    """The places of a text in a file."""
    stream.seek(0)
    kept = len(wanted) - 1  # bytes of a place that two pieces share
    end, start = b"", 0  # of the pieces before, and of the next one
    while piece := stream.read(PIECE):
        yield from (start - len(end) + place for place in _places(end + piece[:kept], wanted))
        yield from (start + place for place in _places(piece, wanted))
        start += len(piece)
        end = (end + piece[-kept:])[-kept:]


def _places(text: bytes, wanted: bytes) -> Iterator[int]:
    place = text.find(wanted)
    while place >= 0:
        yield place
        place = text.find(wanted, place + 1)


def _read_program(text: bytes) -> Program:
    targets, main = TARGETS.search(text), MAIN.search(text)
    before = text if main is None else text[: main.start()]
    regions = tuple(
        Region(name.decode(), int(size), owner.decode(), place.decode())
        for name, size, owner, place in REGION.findall(before)
    )
    shapes = {name.decode(): dims.decode().split() for dims, name in TENSOR.findall(before)}
    launched, sources, products = 0, set(), set()
    fused: list[FusedAttention] = []
    for line in [] if main is None else main[1].decode(errors="replace").split("\n"):
        instruction = INSTRUCTION.match(line)
        if instruction is None or instruction[1] in NO_KERNELS:
            continue
        launched += 1
        full = FULL_NAME.search(line)
        sources |= set() if full is None else {full[1]}
        layers = LAYERS.findall(line)
        if instruction[2].startswith(FUSED):
            fused.append(_fused(full[1] if full else instruction[2], layers, ARGUMENTS.search(line), shapes))
        elif instruction[1] == "fully_connected" or "backbone=gemm" in line:
            products |= set(layers)
    told = main is not None
    return Program(
        None if targets is None else tuple(targets[1].decode().split()),
        regions or None,
        launched if told else None,
        len(sources) if told else None,
        tuple(fused) if told else None,
        tuple(sorted(products - {item.layer for item in fused})) if told else None,
    )


def _fused(
    kernel: str, layers: list[str], arguments: re.Match[str] | None, shapes: Mapping[str, list[str]]
) -> FusedAttention:
    """An attention, by the shapes of what it takes: queries (heads, length, size), keys so or (heads, size, length)."""
    layer = layers[0] if layers else ""
    query, key = ([], []) if arguments is None else (shapes.get(arguments[i], []) for i in (1, 2))
    if len(query) != 3 or len(key) != 3 or query[2] not in key[1:]:
        return FusedAttention(kernel, layer, None, None, None)
    many = query[1], key[2] if key[1] == query[2] else key[1]
    queries, keys = (int(size) if size.isdecimal() else None for size in many)
    return FusedAttention(kernel, layer, queries, keys, many[0] == many[1])


def _with_sums(
    fused: tuple[FusedAttention, ...] | None, sources: Mapping[str, tuple[Accumulation | None, Accumulation | None]]
) -> tuple[FusedAttention, ...] | None:
    if fused is None:
        return None
    told = [(item, *sources.get(item.kernel, (None, None))) for item in fused]
    return tuple(replace(item, scores=scores, values=values) for item, scores, values in told)


def _sums(traits: bytes) -> Accumulation | None:
    return SUMS.get(traits.decode().rpartition("_")[2])


def coarsest(sums: Sequence[Accumulation | None]) -> Accumulation | None:
    """The coarsest of several; None where there are none, or where one is not known and the others are finer."""
    if "fp16" in sums:
        return "fp16"
    return "fp32" if sums and None not in sums else None
