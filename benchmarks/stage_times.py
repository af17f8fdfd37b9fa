"""From the events of a call to the times of its stages."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from t2v_rt.benchmarks.recorder import ENGINE, LOAD, MARK, SCHEDULER, Event

# what is counted, in words; the report says it beside the figures
COUNTED = {
    "open": "reading the manifest, comparing the files with their hashes or, after the first time, with the stamp of "
    "that, and making the backend ready; no engine is loaded",
    "load": "loading the engines of all components, which the first call does",
    "tokenize": "cleaning and tokenizing both prompts, measured alone; it is a part of encode",
    "encode": "both prompts to embeddings; what was remembered of them is forgotten before each call",
    "encode engines": "the part of encode that its engines take",
    "step": "one step of the sampler: its predictions, guidance, the step; preparing the prompts counts to the first",
    "step engines": "the part of a step that the denoiser's engine takes",
    "step guidance": "from the end of the engine's call to the sampler: joining both predictions, looking for values "
    "that are not finite",
    "step scheduler": "the sampler's own step",
    "step outside": "a step without its engines: guidance, scheduler, and the loop around them",
    "denoise": "all steps",
    "decode first": "the first chunk of frames, the decoder's states made for it",
    "decode next": "each later chunk",
    "decode engines": "the part of all chunks that engines take",
    "decode": "all chunks",
    "file": "encoding the frames and writing the file, after the call and outside of it",
    "outside": "all of the call that no engine takes: requests, plans, guidance, samplers, copies",
    "call": "the whole call, from prompts to float32 frames; noise is given, and neither the file nor the noise counts",
}
PARTS = ("encode", "denoise", "decode")  # of a call, one after another


def stage_times(events: Sequence[Event], start: float, end: float) -> dict[str, list[float]]:
    """Seconds of each stage of a call, once for each time it came.

    Args:
        events: of the call.
        start: reading of the clock when it began.
        end: reading of the clock when it returned.
    """
    marks = {name: [event.end for event in events if event.kind == MARK and event.name == name] for name in PARTS}
    encoded, steps, chunks = marks["encode"], marks["denoise"], marks["decode"]
    times: dict[str, list[float]] = {"call": [end - start]}
    if len(encoded) > 1:
        times["encode"] = [encoded[-1] - encoded[0]]
        times["encode engines"] = [_inside(events, ENGINE, encoded[0], encoded[-1])]
    bounds = [*encoded[-1:], *steps]
    for begun, ended in pairwise(bounds):
        for name, value in _step(events, begun, ended).items():
            times.setdefault(name, []).append(value)
    if len(bounds) > 1:
        times["denoise"] = [bounds[-1] - bounds[0]]
    bounds = [*(steps or encoded or [start])[-1:], *chunks]
    if len(bounds) > 1:
        pieces = [ended - begun for begun, ended in pairwise(bounds)]
        times |= {"decode first": pieces[:1], "decode next": pieces[1:], "decode": [bounds[-1] - bounds[0]]}
        times["decode engines"] = [_inside(events, ENGINE, bounds[0], bounds[-1])]
    loading = _inside(events, LOAD, start, end)
    times["outside"] = [end - start - _inside(events, ENGINE, start, end) - loading]
    if loading:
        times["load"] = [loading]
    return {name: values for name, values in times.items() if values}


def _step(events: Sequence[Event], start: float, end: float) -> dict[str, float]:
    """The parts of one step."""
    engines = _inside(events, ENGINE, start, end)
    samplers = [event for event in _within(events, start, end) if event.kind == SCHEDULER]
    last = max((event.end for event in _within(events, start, end) if event.kind == ENGINE), default=start)
    parts = {"step": end - start, "step engines": engines, "step outside": end - start - engines}
    if samplers:
        parts |= {
            "step guidance": max(0.0, samplers[0].start - last),
            "step scheduler": sum(event.seconds for event in samplers),
        }
    return parts


def _inside(events: Sequence[Event], kind: str, start: float, end: float) -> float:
    return sum(event.seconds for event in _within(events, start, end) if event.kind == kind)


def _within(events: Sequence[Event], start: float, end: float) -> list[Event]:
    return [event for event in events if event.start >= start and event.end <= end]
