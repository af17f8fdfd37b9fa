"""Noise: the distance to torch's stream, and the same bytes at every SIMD level, with every NumPy and thread count.

    python -m t2v_rt.benchmarks.noise --python OTHER/bin/python --output benchmarks/results/noise.json

Torch's own values depend on the instructions that it picks, so it is asked at each of its levels. The bytes are taken
in child processes, once for each SIMD level that NumPy can be told to leave out; the other interpreters that
`--python` names need NumPy and nothing else.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import t2v_rt.errors
import t2v_rt.runtime.noise
from t2v_rt.benchmarks.results import finish
from t2v_rt.benchmarks.timing import alternate
from t2v_rt.runtime.noise import ANGLE_STEP, BLOCK, UNIFORM_STEP, WIDE_ROWS, Generator, _log, _sine_cosine

Draws = list[tuple[int, list[list[int]]]]  # of each seed, the shapes of its successive calls

PAIRS = 500
VIDEO_SHAPE = (1, 16, 21, 60, 104)  # Wan's latents of 81 frames at 480x832
# whole blocks of 16, none, several passes, a remainder, and values of a pair that are kept for the next call
HASHED: Draws = [
    (0, [[1, 16, 5, 30, 52]]),
    (1234, [[1, 16, 21, 60, 104]]),
    (2**32 + 7, [[3], [4], [5, 1000], [15], [16384 + 16], [1]]),
    (-1, [[17], [31], [16], [2, 16, 3, 5, 7]]),
    (2**64 - 1, [[100003], [7], [7]]),
]
TORCH_LEVELS = ("default", "avx2", "avx512")  # of ATEN_CPU_CAPABILITY; torch takes the nearest that the CPU has

# the package's own __init__ needs more than NumPy, so a bare package stands in for it
HASH_CHILD = """
import hashlib, importlib.util, json, os, sys, types
import numpy as np
try:
    from numpy._core import _multiarray_umath as core
except ImportError:  # before NumPy 2
    from numpy.core import _multiarray_umath as core
noise_file, package_folder, draws = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
package = types.ModuleType("t2v_rt")
package.__path__ = [package_folder]
sys.modules["t2v_rt"] = package
spec = importlib.util.spec_from_file_location("noise", noise_file)
noise = importlib.util.module_from_spec(spec)
spec.loader.exec_module(noise)
digest = hashlib.sha256()
for seed, shapes in draws:
    generator = noise.Generator(seed)
    for shape in shapes:
        digest.update(generator.randn(shape).astype("<f4").tobytes())
print(json.dumps({
    "numpy": np.__version__,
    "python": sys.version.split()[0],
    "simd": [name for name in core.__cpu_dispatch__ if core.__cpu_features__[name]],
    "threads": os.environ.get("OMP_NUM_THREADS"),
    "sha256": digest.hexdigest(),
}))
"""
TORCH_CHILD = """
import json, sys
import numpy as np
import torch
values = []
for seed, shapes in json.loads(sys.argv[2]):
    generator = torch.Generator("cpu").manual_seed(seed)
    values += [torch.randn(shape, generator=generator).numpy().reshape(-1) for shape in shapes]
np.save(sys.argv[1], np.concatenate(values))
print(torch.backends.cpu.get_cpu_capability())
"""


def pairs_to_compare(count: int = PAIRS) -> Draws:
    """`count` pairs of seed and shape, up to three in a row from one generator, of all ranges and sizes."""
    source = random.Random(0)
    draws: Draws = []
    left = count
    while left:
        seed = source.choice(
            [source.randrange(100), source.randrange(2**32, 2**64), source.randrange(-(2**63), 0), 2**32 - 1]
        )
        shapes = []
        for _ in range(min(left, source.randint(1, 3))):
            few, small = [source.randint(1, 15)], [source.randint(1, 9) for _ in range(source.randint(1, 4))]
            odd, video = [source.randint(16, 10**5)], [1, 16, source.randint(1, 5), 14, source.randint(1, 26)]
            shapes.append(source.choice([few, small, odd, video]))
        left -= len(shapes)
        draws.append((seed, shapes))
    return draws


def our_values(draws: Draws) -> list[NDArray[np.float32]]:
    """The float32 values of each pair, flat."""
    values = []
    for seed, shapes in draws:
        generator = Generator(seed)
        values += [generator.randn(shape).reshape(-1) for shape in shapes]
    return values


def hash_here(draws: Draws) -> str:
    """The sha256 over all draws, little-endian float32, computed in this process."""
    digest = hashlib.sha256()
    for values in our_values(draws):
        digest.update(values.astype("<f4").tobytes())
    return digest.hexdigest()


def run_child(command: Sequence[str], settings: Mapping[str, str]) -> str:
    """Standard output of a process that must succeed, with `settings` as the only ones of their kind."""
    kept = {k: v for k, v in os.environ.items() if k not in {"NPY_DISABLE_CPU_FEATURES", "NPY_ENABLE_CPU_FEATURES"}}
    result = subprocess.run(command, env=kept | dict(settings), capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{command[0]} failed with {dict(settings)}: {result.stderr[-2000:]}")
    return result.stdout


def hash_in_child(python: str, draws: Draws, off: Sequence[str] = (), threads: int = 1) -> dict[str, Any]:
    """The sha256 over all draws, computed by another interpreter.

    Args:
        python: the interpreter; NumPy is all that it needs.
        draws: seeds and the shapes of their successive calls.
        off: names of the SIMD levels that its NumPy shall leave out, of those that it reports as "simd".
        threads: OMP_NUM_THREADS.

    Returns:
        "numpy", "python", "simd" (the levels above NumPy's baseline that were in use), "threads" and "sha256".

    Raises:
        RuntimeError: the child failed, or its NumPy used a level that was to be left out.
    """
    files = [t2v_rt.runtime.noise.__file__, str(Path(t2v_rt.errors.__file__).parent)]
    settings = {"OMP_NUM_THREADS": str(threads)}
    if off:
        settings["NPY_DISABLE_CPU_FEATURES"] = " ".join(off)
    # -I: the working folder and PYTHONPATH must not lend it another NumPy
    command = [python, "-I", "-c", HASH_CHILD, *files, json.dumps(draws)]
    found: dict[str, Any] = json.loads(run_child(command, settings))
    if still_on := sorted(set(off) & set(found["simd"])):
        raise RuntimeError(f"NumPy {found['numpy']} of {python} still uses {still_on}")
    return found


def hashes(pythons: Sequence[str], draws: Draws) -> list[dict[str, Any]]:
    """The hash at every SIMD level of every interpreter's NumPy, and with one and two threads.

    Levels build upon each other in the order in which NumPy lists them, so they are left out from the last one on.
    """
    rows = []
    for python in pythons:
        everything = hash_in_child(python, draws)
        rows += [everything, hash_in_child(python, draws, threads=2)]
        levels = everything["simd"]
        rows += [hash_in_child(python, draws, levels[count:]) for count in reversed(range(len(levels)))]
    return [row | {"simd": " ".join(row["simd"])} for row in rows]


def torch_values(draws: Draws) -> dict[str, NDArray[np.float32]]:
    """All values of torch.randn, flat, by the instructions that torch says it used."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for level in TORCH_LEVELS:
            file = str(Path(folder) / f"{level}.npy")
            command = [sys.executable, "-W", "ignore", "-c", TORCH_CHILD, file, json.dumps(draws)]
            name = run_child(command, {"ATEN_CPU_CAPABILITY": level}).strip()
            found[name] = np.load(file)
    return found


def distance(found: Sequence[NDArray[np.float32]], expected: Sequence[NDArray[np.float32]]) -> dict[str, float]:
    """How far two lists of arrays are apart."""
    differences = [np.abs(x.astype(np.float64) - y) for x, y in zip(found, expected, strict=True)]
    return {
        "largest absolute difference": max(float(difference.max()) for difference in differences),
        "pairs that differ": sum(bool(difference.any()) for difference in differences),
        "pairs under 16 values that differ": sum(bool(d.any()) for d in differences if d.size < BLOCK),
        "values that differ": sum(int(np.count_nonzero(difference)) for difference in differences),
    }


def compare_with_torch(draws: Draws) -> dict[str, Any]:
    """Our values against torch's, and torch's at one level against those at another."""
    ours = our_values(draws)
    ends = np.cumsum([len(values) for values in ours])
    theirs = {name: np.split(values, ends[:-1]) for name, values in torch_values(draws).items()}
    report: dict[str, Any] = {
        "pairs": len(ours),
        "pairs under 16 values": sum(values.size < BLOCK for values in ours),
        "values": int(ends[-1]),
    }
    report |= {f"t2v_rt, torch {name}": distance(ours, values) for name, values in theirs.items()}
    for one, other in itertools.combinations(theirs, 2):
        report[f"torch {one}, torch {other}"] = distance(theirs[one], theirs[other])
    return report


def wrong_roundings() -> dict[str, int] | None:
    """Of all 2^24 uniforms, how many give another float32 than the C library's long double; None where it has none."""
    if np.finfo(np.longdouble).nmant <= np.finfo(np.float64).nmant:
        return None
    size = 1 << 19
    wide = np.empty((WIDE_ROWS, size))
    wrong = dict.fromkeys(("log", "sine", "cosine"), 0)
    for start in range(0, 1 << 24, size):
        uniforms = np.arange(start, start + size, dtype=np.float64)
        x = 1.0 - uniforms * UNIFORM_STEP
        angle = (uniforms.astype(np.float32) * ANGLE_STEP).astype(np.float64)
        x_long, angle_long = x.astype(np.longdouble), angle.astype(np.longdouble)
        expected = np.log(x_long), np.sin(angle_long), np.cos(angle_long)
        found = _log(x, wide), *_sine_cosine(angle, wide)
        for name, ours, theirs in zip(wrong, found, expected, strict=True):
            wrong[name] += int(np.count_nonzero(ours.astype(np.float32) != theirs.astype(np.float32)))
    return wrong


def compare_speed(rounds: int) -> dict[str, Any]:
    """Seconds for one video's noise, in turn: medians, and ours over torch's."""
    import torch

    theirs = torch.Generator("cpu").manual_seed(0)
    ways = {
        "ours": lambda: Generator(0).randn(VIDEO_SHAPE),
        "torch": lambda: torch.randn(VIDEO_SHAPE, generator=theirs),
    }
    ours, reference = (statistics.median(times) for times in alternate(ways, rounds).values())
    return {"shape": VIDEO_SHAPE, "t2v_rt": ours, "torch": reference, "ratio": ours / reference}


def measure(pythons: Sequence[str], rounds: int) -> dict[str, Any]:
    """All figures."""
    here = hash_here(HASHED)
    rows = hashes([sys.executable, *pythons], HASHED)
    return {
        "against torch.randn": compare_with_torch(pairs_to_compare()),
        "of all 2^24 uniforms, wrongly rounded": wrong_roundings(),
        "draws": [f"seed {seed}, shapes {shapes}" for seed, shapes in HASHED],
        "sha256 in this process": here,
        "in other processes": rows,
        "same bytes everywhere": all(row["sha256"] == here for row in rows),
        "seconds": compare_speed(rounds),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", action="append", default=[], help="an interpreter with another NumPy; repeatable")
    parser.add_argument("--rounds", type=int, default=15, help="timed draws")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    if util.find_spec("torch") is None:
        parser.error('torch is not installed; install it with pip install "t2v-rt[export]"')
    report = measure(options.python, options.rounds)
    finish(report, options.output)
    return 0 if report["same bytes everywhere"] else 1


if __name__ == "__main__":
    sys.exit(main())
