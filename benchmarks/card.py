"""The first hour of a bundle on a card: what could only be hoped without one, step by step, bounded in time.

    python -m t2v_rt.benchmarks.card prepare build/card
    python -m t2v_rt.benchmarks.card run build/true/plans --variant build/card/fp16 --minutes 25

`prepare` builds bundles of two layers of true width, which differ in how attention accumulates: they need no GPU. `run`
takes the steps of `card_steps` in their order, each in a process of its own that is ended when its time is up, and
writes one JSON: the card's name, and for each step whether it passed, failed or was left out, and why. Steps that the
machine cannot take are left out with the reason, so that it runs anywhere.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from t2v_rt import build_engines
from t2v_rt.benchmarks import results
from t2v_rt.benchmarks.card_steps import STEPS, Step
from t2v_rt.benchmarks.make_checkpoint import make_checkpoint
from t2v_rt.benchmarks.wan_tensors import CONFIGS
from t2v_rt.commands.doctor import find_gpus
from t2v_rt.errors import RequestError

MINUTES = 25.0
LAYERS = 2  # as many as show a layer's time and memory; the whole model has 30
SIZE = {"height": 480, "width": 832, "num_frames": 81}
GRACE = 10.0  # seconds in which a step that hangs tells where
SAID = 400  # last characters of what a failed step said
# name -> options of the build, beside the backend
VARIANTS: Mapping[str, Mapping[str, str]] = {
    "fp32": {"precision": "fp16", "attention_accumulation": "fp32"},
    "fp16": {"precision": "fp16", "attention_accumulation": "fp16"},
    "bf16": {"precision": "bf16"},
}


def prepare(folder: Path, gpus: str | None = None) -> list[Path]:
    """Builds the bundles whose denoisers are compared.

    Args:
        folder: that gets a checkpoint of random weights and a bundle for each of `VARIANTS`.
        gpus: to build for; None for the default.

    Returns:
        The bundles' folders.
    """
    configs = {**CONFIGS, "transformer": {**CONFIGS["transformer"], "num_layers": LAYERS}}
    checkpoint = folder / "checkpoint"
    if not checkpoint.exists():
        make_checkpoint(checkpoint, configs)
    for name, options in VARIANTS.items():
        build_engines(checkpoint, folder / name, backend="tensorrt-rtx", gpus=gpus, **SIZE, **options)  # type: ignore[arg-type]
    return [folder / name for name in VARIANTS]


def run(
    bundle: Path, variants: Sequence[Path] = (), minutes: float = MINUTES, only: Sequence[str] = ()
) -> dict[str, Any]:
    """Takes the steps.

    Args:
        bundle: of plans.
        variants: more bundles, whose denoisers are compared with the first one's.
        minutes: that all steps may take together.
        only: names of steps; none for all.

    Returns:
        `gpus`, `gpu_problem` and `steps`: name -> `verdict` (`passed`, `failed` or `left out`), `why`,
        `seconds`, and the step's own figures.

    Raises:
        RequestError: an unknown step.
    """
    known = [step.name for step in STEPS]
    if unknown := sorted(set(only) - set(known)):
        raise RequestError(f"unknown step {', '.join(unknown)}; expected one or more of {', '.join(known)}")
    gpus, problem = find_gpus()
    end = time.monotonic() + minutes * 60
    report: dict[str, Any] = {"gpus": gpus, "gpu_problem": problem, "steps": {}}
    for step in STEPS:
        if only and step.name not in only:
            continue
        left = end - time.monotonic()
        if left <= 0:
            result: dict[str, Any] = {"verdict": "left out", "why": f"the {minutes:g} minutes were over"}
        else:
            result = take(step, bundle, variants, min(left, step.seconds))
        report["steps"][step.name] = {"question": step.question, **result}
        print(f"{step.name:10}{result['verdict']:10}{result.get('why', '')}", file=sys.stderr, flush=True)
    return report


def take(step: Step, bundle: Path, variants: Sequence[Path], seconds: float) -> dict[str, Any]:
    """Takes one step in a process of its own, which tells where it hangs before its time is up."""
    command = [sys.executable, "-P", "-m", "t2v_rt.benchmarks.card_steps", step.name, str(bundle), f"{seconds:.0f}"]
    start = time.monotonic()
    try:
        done = subprocess.run(
            [*command, *map(str, variants)], capture_output=True, text=True, timeout=seconds + GRACE, check=False
        )
    except subprocess.TimeoutExpired as exc:
        said = exc.stderr.decode(errors="replace") if isinstance(exc.stderr, bytes) else ""
        return {"verdict": "failed", "why": f"it took more than {seconds:.0f} s: {said[-SAID:]}"}
    lines = done.stdout.strip().splitlines()
    try:
        result: dict[str, Any] = json.loads(lines[-1])
    except (IndexError, ValueError):
        result = {"verdict": "failed", "why": f"exit code {done.returncode}: {' '.join(done.stderr.split())[-SAID:]}"}
    return {**result, "seconds": round(time.monotonic() - start, 2)}


def result_name(gpus: Sequence[Mapping[str, Any]]) -> str:
    """File of the results of a machine, by its first card's name."""
    name = str(gpus[0]["name"]) if gpus else "no GPU"
    return f"card-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.json"


def main() -> None:
    """Prepares bundles, or takes the steps and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    preparing = commands.add_parser("prepare", help="build the bundles that are compared")
    preparing.add_argument("folder", type=Path)
    preparing.add_argument("--gpu", help="GPUs to build for, such as sm89")
    running = commands.add_parser("run", help="take the steps that this machine can take")
    running.add_argument("bundle", type=Path, help="bundle of plans, of the true size")
    running.add_argument("--variant", type=Path, action="append", default=[], help="another bundle to compare with")
    running.add_argument("--minutes", type=float, default=MINUTES)
    running.add_argument("--step", action="append", default=[], help="take this one only; may be given several times")
    running.add_argument("--output", type=Path, help="JSON file; by default one named after the card")
    parsed = parser.parse_args()
    if parsed.command == "prepare":
        print("\n".join(map(str, prepare(parsed.folder, parsed.gpu))))
        return
    report = run(parsed.bundle, parsed.variant, parsed.minutes, parsed.step)
    path = parsed.output or results.FOLDER / result_name(report["gpus"])
    results.write(path, report)
    print(path)
    if any(step["verdict"] == "failed" for step in report["steps"].values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
