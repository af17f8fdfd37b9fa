"""What the true-size model takes: building its bundles, planning them, and its text encoder against the reference.

    python -m t2v_rt.benchmarks.make_checkpoint build/wan-full --text-encoder full
    python -m t2v_rt.benchmarks.true_size build build/wan-full build/true/plans --backend tensorrt-rtx
    python -m t2v_rt.benchmarks.true_size build build/wan-full build/true/graphs --backend onnxruntime
    python -m t2v_rt.benchmarks.true_size parity build/wan-full build/true/graphs
    python -m t2v_rt.benchmarks.true_size lengths build/true/graphs

Each writes its part of benchmarks/results/true_size.json. Building samples the whole process tree (Linux).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t2v_rt.benchmarks.process_tree import measure
from t2v_rt.benchmarks.results import FOLDER, read, with_machine, write
from t2v_rt.benchmarks.timing import alternate
from t2v_rt.engines.backends import get_backend
from t2v_rt.engines.bundle.store import open_bundle
from t2v_rt.engines.contract import Feeds
from t2v_rt.runtime.families import wan
from t2v_rt.runtime.memory.advice import plan_request
from t2v_rt.runtime.options import CallOptions
from t2v_rt.runtime.pipeline import TextToVideoPipeline

Array = NDArray[np.float32]
RESULTS = FOLDER / "true_size.json"
SIZE = ("--height", "480", "--width", "832", "--num-frames", "81")
BUDGETS = ("8GB", "6GB", "4GB", "2.5GB")  # the last for the VAE at its smallest
PROMPT_TOKENS = 40
LENGTHS = (10, 40, 200)
ROUNDS = 5  # of each length, in turn


def build(checkpoint: Path, bundle: Path, backend: str) -> dict[str, Any]:
    """Builds a bundle as the command does; its memory, disk, time, and the memory plans for several cards.

    Args:
        checkpoint: of true size.
        bundle: to write, in a folder of its own: disk is measured there.
        backend: `onnxruntime` or `tensorrt-rtx`.
    """
    command = [sys.executable, "-P", "-m", "t2v_rt", "build-engines", str(checkpoint), "--output", str(bundle)]
    command += ["--backend", backend, *SIZE]
    bundle.parent.mkdir(parents=True, exist_ok=True)
    report = measure(command, bundle.parent)
    size = sum(file.stat().st_size for file in bundle.rglob("*") if file.is_file())
    report |= {"bundle_bytes": size, "peak_disk_over_bundle": report["peak_disk_bytes"] / size}
    manifest = open_bundle(bundle).manifest
    components = manifest.components
    report["weights_bytes"] = {name: spec.weights_bytes for name, spec in components.items()}
    report["text_encoder"] = {
        role: {
            "weights_bytes": graph.weights_bytes,
            "context_bytes": None if graph.plan is None else graph.plan.profiles[0].context_bytes,
        }
        for role, graph in components["text_encoder"].graphs.items()
    }
    asked = CallOptions(prompt="", seed=0)
    report["plans"] = [
        {"bundle_id": manifest.bundle_id, **plan_request(manifest, asked, vram_budget=budget)} for budget in BUDGETS
    ]
    return report


def parity(checkpoint: Path, bundle: Path) -> dict[str, Any]:
    """Errors of one encoder block and of the whole encoder against transformers' own at float32, block by block.

    Args:
        checkpoint: of true size.
        bundle: of it, of ONNX Runtime at fp32.
    """
    from t2v_rt.benchmarks.reference_encoder import ReferenceEncoder
    from t2v_rt.export.checkpoint import open_checkpoint
    from t2v_rt.export.components import export_component
    from t2v_rt.export.wan.family import FAMILY

    reference = ReferenceEncoder(checkpoint / "text_encoder")
    pipe = TextToVideoPipeline.from_pretrained(bundle)
    text = " ".join(f"word{7 * i}" for i in range(PROMPT_TOKENS - 1))
    ids = pipe.stages.tokenizer.encode(text)
    source = open_checkpoint(checkpoint)
    configs = FAMILY.read_configs(source.configs, shard_bytes=1)  # an engine for each block
    middle = configs.text_encoder.layers // 2
    role = f"blocks_{middle}"
    states = reference.embed(ids)
    before = [states := reference.block(i, states) for i in range(middle)][-1]
    with tempfile.TemporaryDirectory(dir=bundle.parent) as folder:
        spec = export_component("text_encoder", source, configs, Path(folder), "fp32", roles=[role])
        with get_backend("onnxruntime").load(Path(folder), "text_encoder", spec) as component:
            feeds: Feeds = {"hidden_states": before, "relative_buckets": _buckets(pipe, len(ids))}
            (found,) = component[role].infer(feeds).values()
    states = reference.block(middle, before)
    block_error = relative(found, states)
    for i in range(middle + 1, configs.text_encoder.layers):
        states = reference.block(i, states)
    start = time.perf_counter()
    embeds = pipe.encode_prompt([text])[:, : len(ids)]
    seconds = time.perf_counter() - start
    return {
        "tokens": len(ids),
        "block": middle,
        "block_error": block_error,
        "encoder_error": relative(embeds, reference.finish(states)),
        "encode_seconds_loading_included": seconds,
        "largest_hidden_value": float(np.abs(states).max()),
    }


def lengths(bundle: Path) -> dict[str, Any]:
    """Time of the first engine's blocks at a prompt's own length against 512 tokens, in turn, weights loaded."""
    pipe = TextToVideoPipeline.from_pretrained(bundle)
    manifest = pipe.manifest
    part = manifest.components["text_encoder"].shards[0]
    (role,) = part.graphs
    padded = manifest.model.text.length
    rng = np.random.default_rng(0)
    with get_backend(manifest.backend).load(bundle, "text_encoder", part) as component:
        feeds: dict[int, Feeds] = {
            length: {
                "hidden_states": rng.standard_normal((1, length, manifest.model.text.dim), np.float32),
                "relative_buckets": _buckets(pipe, length),
            }
            for length in (*LENGTHS, padded)
        }

        def run(length: int) -> object:
            return component[role].infer(feeds[length])

        return {f"{length}": _in_turn(run, length, padded) for length in LENGTHS}


def _in_turn(run: Callable[[int], object], length: int, padded: int) -> dict[str, float]:
    ways = {str(size): partial(run, size) for size in (length, padded)}
    own, whole = (statistics.median(times) for times in alternate(ways, ROUNDS).values())
    return {"own_seconds": own, "padded_seconds": whole, "ratio": whole / own}


def _buckets(pipe: TextToVideoPipeline, length: int) -> NDArray[np.int64]:
    model = pipe.manifest.model
    return wan.relative_buckets(length, model.text.relative_buckets, model.text.relative_max_distance)


def relative(found: Array, expected: Array) -> float:
    """Largest difference over the largest expected value."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def store(part: str, report: Mapping[str, Any], path: Path = RESULTS) -> None:
    """Puts a part into the results, with the machine it was measured on; what has none is of the file's own."""
    found = read(path) if path.is_file() else {}
    write(path, {**found, part: with_machine(report)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["build", "parity", "lengths"])
    parser.add_argument("paths", nargs="+", type=Path, metavar="FOLDER", help="checkpoint and bundle, or the bundle")
    parser.add_argument("--backend", default="onnxruntime", help="onnxruntime or tensorrt-rtx")
    options = parser.parse_args()
    if options.what == "build":
        checkpoint, bundle = options.paths
        report = build(checkpoint, bundle, options.backend)
        store(f"build_{options.backend}", report)
    elif options.what == "parity":
        report = parity(*options.paths)
        store("parity", report)
    else:
        (bundle,) = options.paths
        report = lengths(bundle)
        store("lengths", report)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
