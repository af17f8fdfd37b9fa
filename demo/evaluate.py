"""Measures how well a bundle of the demo checkpoint follows prompts that its training never saw.

Generates held-out combinations of colour, shape and motion in English and Mandarin through the runtime, with the same
seeds in both languages, and counts what the pixels show. Needs no torch.

    python demo/evaluate.py build/demo
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass

import clips
from measure import Reading, read_clip

from t2v_rt import TextToVideoPipeline

LANGUAGES = {"en": "English", "zh": "Mandarin"}
ATTRIBUTES = ("colour", "background", "motion", "shape")


@dataclass(frozen=True)
class Score:
    """Right readings out of all, per attribute."""

    right: dict[str, int]
    total: int

    def line(self, label: str) -> str:
        parts = [f"{name} {self.right[name]}/{self.total} ({self.percent(name):.1f} %)" for name in ATTRIBUTES]
        return f"{label:24}" + "  ".join(parts)

    def percent(self, name: str) -> float:
        return 100 * self.right[name] / self.total


def held_out_scenes(count: int) -> list[clips.Scene]:
    """Scenes of held-out combinations, spread evenly over combinations and backgrounds."""
    scenes, size = clips.scenes(held=True), len(clips.COLOURS) - 1
    combinations = [scenes[start : start + size] for start in range(0, len(scenes), size)]
    return [same[(i + turn) % size] for turn in range(size) for i, same in enumerate(combinations)][:count]


def score(readings: Sequence[Reading], scenes: Sequence[clips.Scene]) -> Score:
    """Counts the readings that agree with their scenes."""
    right = {
        name: sum(getattr(found, name) == getattr(scene, name) for found, scene in zip(readings, scenes, strict=True))
        for name in ATTRIBUTES
    }
    return Score(right, len(scenes))


def evaluate(
    pipe: TextToVideoPipeline, scenes: Sequence[clips.Scene], language: str, guidance: float, steps: int | None
) -> Score:
    """Generates every scene in a language, its phrasing and seed chosen by its place in the list."""
    readings = []
    for i, scene in enumerate(scenes):
        phrasings = clips.prompts(scene, language)
        out = pipe(phrasings[i % len(phrasings)], seed=i, guidance_scale=guidance, num_inference_steps=steps)
        readings.append(read_clip(out.frames[0]))
    return score(readings, scenes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", help="folder that build-engines wrote")
    parser.add_argument("--prompts", type=int, default=168, help="prompts in each language; 168 are all there are")
    parser.add_argument("--steps", type=int, help="denoising steps; the bundle's default where it is left out")
    parser.add_argument("--guidance", type=float, nargs="+", default=[5.0, 1.0], help="guidance scales to compare")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    scenes = held_out_scenes(options.prompts)
    pipe = TextToVideoPipeline.from_pretrained(options.bundle)
    results = {}
    for guidance in options.guidance:
        for language, name in LANGUAGES.items():
            result = evaluate(pipe, scenes, language, guidance, options.steps)
            results[f"{language}, guidance {guidance:g}"] = {**result.right, "total": result.total}
            if not options.json:
                print(result.line(f"{name}, guidance {guidance:g}"), flush=True)
    if options.json:
        print(json.dumps({"bundle_id": pipe.manifest.bundle_id, "results": results}))


if __name__ == "__main__":
    main()
