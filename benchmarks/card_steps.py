"""The steps of `card`, each a question that only a card can answer.

A step returns figures, raises `LeftOutError` where the machine cannot take it, and anything else where the answer is
no. They go through the command line where they can: what it says and does on a card is part of what is asked.
"""

from __future__ import annotations

import faulthandler
import io
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from t2v_rt.benchmarks.cards import CardMemory
from t2v_rt.cli import main as command_line
from t2v_rt.commands.doctor import examine
from t2v_rt.engines.backend_info import RTX
from t2v_rt.engines.backends import load_shards
from t2v_rt.engines.bundle.store import open_bundle
from t2v_rt.engines.specs import TensorSpec
from t2v_rt.engines.tensorrt.cuda import Cuda
from t2v_rt.engines.tensorrt.device_state import StateGroup, new_states
from t2v_rt.engines.tensorrt.engine import TensorRTEngine
from t2v_rt.errors import BackendError, CancelledError, OutOfMemoryError
from t2v_rt.runtime.denoise.denoiser import Denoiser, Prompts
from t2v_rt.runtime.noise import Generator
from t2v_rt.runtime.pipeline import TextToVideoPipeline
from t2v_rt.system.user_cache import UserCache

Figures = dict[str, Any]
BLOCK = 256 << 20  # bytes that are copied both ways
CALLS = 3  # of a denoiser, after the first
PROMPT, TOKENS, TIMESTEP = "a red ball bouncing on a blue background", 40, 700.0
NUM_STEPS = 2  # of a video: each is the same, and what they cost is known from one
SMALL_BUDGET = "4GiB"
SLACK = 64 << 20  # bytes that a driver keeps of what was given back
LOOK = 0.05  # seconds between looks at a card's memory
LEFT_FREE = 3 << 30  # bytes of a card that is nearly full
HANG = 5  # seconds before the end of a step's time at which it tells where it is


class LeftOutError(Exception):
    """A step that this machine cannot take; the text says why."""


@dataclass(frozen=True)
class Step:
    """One step.

    Args:
        name: of it.
        question: that it answers.
        seconds: that it may take.
        take: bundle and variants -> figures.
    """

    name: str
    question: str
    seconds: float
    take: Callable[[Path, Sequence[Path]], Figures]


# -- what they are made of -------------------------------------------------------------------------------------------


def card() -> Cuda:
    """The machine's card; raises LeftOutError where there is none."""
    try:
        return Cuda(RTX.extra)
    except BackendError as exc:
        raise LeftOutError(str(exc)) from exc


def command(*arguments: str) -> Figures:
    """Runs a command as a user would and returns its JSON; `said` is what it told on standard error.

    Raises:
        AssertionError: it failed; with what it said.
    """
    printed, said = io.StringIO(), io.StringIO()
    with redirect_stdout(printed), redirect_stderr(said):
        code = command_line([*arguments, "--json"])
    assert code == 0, said.getvalue().strip()
    return {**json.loads(printed.getvalue()), "said": said.getvalue().strip()}


def video(bundle: Path, folder: Path, *options: str) -> Figures:
    """Makes a short video; returns what was told of it, and the most of the card that was in use meanwhile."""
    return told_of(bundle, folder, PROMPT, "--num-inference-steps", str(NUM_STEPS), "--seed", "0", *options)


def told_of(bundle: Path, folder: Path, *arguments: str) -> Figures:
    """Runs generate with these arguments; returns what `video` does."""
    with memory_watch() as used:
        told = command(
            "generate", *arguments, "--engines", str(bundle), "--output", str(folder / "video.npy"), "--trust"
        )
    kept = ("frames_sha256", "stage_seconds", "said")
    return {**{name: told[name] for name in kept}, "peak_card_bytes": used.peak_bytes}


def memory_watch() -> CardMemory:
    """Looks at what of the card is taken, by whomever, while a block runs."""
    cuda = card()
    return CardMemory((lambda: cuda.info.memory_bytes - cuda.free_bytes(), LOOK))


def read_plan(bundle: Path, *options: str) -> Figures:
    """What `plan` foretells."""
    return command("plan", str(bundle), *options)


# -- the steps -------------------------------------------------------------------------------------------------------


def doctor(bundle: Path, variants: Sequence[Path]) -> Figures:
    """What doctor tells; the card must be one that plans run on."""
    card()
    report = examine()
    verdict = report["backends"]["tensorrt-rtx"]
    assert verdict["usable"], f"{verdict['why']}; {verdict['todo']}"
    return report


def memory(bundle: Path, variants: Sequence[Path]) -> Figures:
    """Allocates, copies both ways and compares, asks for more than there is, and lets everything go again."""
    cuda = card()
    free, total = cuda.free_bytes(), cuda.info.memory_bytes
    try:
        cuda.allocate(2 * total)
    except OutOfMemoryError:
        pass
    else:
        raise AssertionError("twice the card's memory was given; the driver lends the machine's")
    rates = copy_rates(cuda)
    back = cuda.free_bytes()
    assert back >= free - SLACK, f"{free - back} bytes did not come back"
    return {"card": cuda.info.name, "total_bytes": total, "free_bytes": free, "gb_per_second": rates}


def copy_rates(cuda: Cuda) -> dict[str, float]:
    """GB a second to the card, on it and back; what comes back must be what was sent."""
    values = np.random.default_rng(0).integers(0, 256, BLOCK, np.uint8)
    pinned, back = (cuda.host_array((BLOCK,), np.dtype(np.uint8)) for _ in range(2))
    pinned[:] = values
    buffer, other = cuda.allocate(BLOCK), cuda.allocate(BLOCK)
    copies: dict[str, Callable[[], None]] = {
        "up": partial(cuda.upload, pinned, buffer),
        "across": partial(cuda.copy, buffer, other, BLOCK),
        "down": partial(cuda.download, other, back),
    }
    rates = {}
    for name, copy in copies.items():
        copy()
        cuda.synchronize()
        start = time.perf_counter()
        copy()
        cuda.synchronize()
        rates[name] = BLOCK / (time.perf_counter() - start) / 1e9
    assert np.array_equal(back, values), "what came back is not what was sent"
    return rates


def states(bundle: Path, variants: Sequence[Path]) -> Figures:
    """States that wait in host memory for their turn come back as they were."""
    cuda = card()
    tensors = (TensorSpec("cache", "float16", ("height", "width", 64)),)
    group = StateGroup(cuda, tensors, (), {"height": 240, "width": 416}, 4, 1)
    made = new_states(group, 4)
    values = [np.random.default_rng(i).integers(0, 1000, (240, 416, 64)).astype(np.float16) for i in range(4)]
    pinned = cuda.host_array(values[0].shape, values[0].dtype)
    for state, array in zip(made, values, strict=True):
        np.copyto(pinned, array)
        cuda.upload(pinned, group.activate(state)["cache"])
        cuda.synchronize()
    for state, array in zip(made, values, strict=True):
        assert np.array_equal(state.to_host()["cache"], array), "a state that was parked came back changed"
    return {"states": len(made), "bytes": values[0].nbytes}


def plans(bundle: Path, variants: Sequence[Path]) -> Figures:
    """Loads every plan; the memory that each asks for is what the manifest says."""
    card()
    told: Figures = {}
    with TextToVideoPipeline.from_pretrained(bundle, trust=True) as pipe:
        for name, spec in pipe.manifest.components.items():
            for shard in load_shards(pipe.backend, pipe.bundle.folder, name, spec):
                for role, engine in shard.engines.items():
                    assert isinstance(engine, TensorRTEngine)
                    assert engine.spec.plan is not None
                    expected = [profile.context_bytes for profile in engine.spec.plan.profiles]
                    found = [engine.profile_bytes(i) for i in range(len(expected))]
                    assert found == expected, f"{name}.{role} asks for {found}, the manifest says {expected}"
                    told[f"{name}.{role}"] = found
    return {"context_bytes": told}


def tests(bundle: Path, variants: Sequence[Path]) -> Figures:
    """The tests that are marked `gpu`."""
    card()
    root = Path(__file__).resolve().parent.parent
    if not (root / "tests").is_dir():
        raise LeftOutError("the tests are not installed; run this in a clone")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "gpu", "-q"], cwd=root, capture_output=True, text=True, check=False
    )
    last = (done.stdout.strip().splitlines() or [done.stderr.strip()[-200:]])[-1]
    assert done.returncode == 0, last
    return {"told": last}


def verify(bundle: Path, variants: Sequence[Path]) -> Figures:
    """The self-test of every engine and shape profile; kernels are compiled for the card meanwhile."""
    card()
    start = time.perf_counter()
    report = command("verify", str(bundle), "--trust")
    return {**report, "seconds_with_compiling": time.perf_counter() - start}


def calls(bundle: Path, variants: Sequence[Path]) -> Figures:
    """One call of the denoiser of each bundle, timed: seconds for all layers, and for one."""
    card()
    return {place.name: denoiser_call(place) for place in (bundle, *variants)}


def denoiser_call(bundle: Path) -> Figures:
    """The median time of a denoiser's call."""
    with TextToVideoPipeline.from_pretrained(bundle, trust=True) as pipe:
        model = pipe.manifest.model
        defaults = pipe.manifest.defaults
        noise = Generator(0)
        latents = noise.randn(model.latent_shape(1, defaults.height, defaults.width, defaults.num_frames))
        embeds = np.zeros((1, model.text.length, model.text.dim), np.float32)
        embeds[:, :TOKENS] = noise.randn((1, TOKENS, model.text.dim))
        denoiser = Denoiser(pipe.stages.components.get("transformer"), pipe.stages.text, Prompts(embeds, None), False)
        seconds = []
        for _ in range(1 + CALLS):
            start = time.perf_counter()
            (predicted,) = denoiser.predict(latents, TIMESTEP, 1)
            seconds.append(time.perf_counter() - start)
        assert np.isfinite(predicted).all(), "the prediction is not finite"
    return {"first_seconds": seconds[0], "seconds": statistics.median(seconds[1:])}


def videos(bundle: Path, variants: Sequence[Path]) -> Figures:
    """A video twice, then encoded anew, then in small tiles under a small budget: the same frames, as planned."""
    card()
    with tempfile.TemporaryDirectory() as folder:
        made = {
            "first": video(bundle, Path(folder)),
            "second": video(bundle, Path(folder)),
            "encoded anew": video(bundle, Path(folder), "--no-prompt-cache"),
            "small": video(bundle, Path(folder), "--vram-budget", SMALL_BUDGET, *smallest_tiles(bundle)),
        }
    frames = {name: item["frames_sha256"] for name, item in made.items()}
    planned = {"first": read_plan(bundle), "small": read_plan(bundle, "--vram-budget", SMALL_BUDGET)}
    result = {**made, "planned_bytes": {name: item["peak_bytes"] for name, item in planned.items()}}
    assert len(set(frames.values())) == 1, f"not the same frames: {frames}"
    return result


def smallest_tiles(bundle: Path) -> tuple[str, ...]:
    """The option for the smallest tiles that a bundle's decoder was built for; none where it works on the whole."""
    tiles = open_bundle(bundle).manifest.components["vae_decoder"].tiles
    return () if tiles is None or not tiles.grids else ("--vae-tiles", "{}x{}".format(*tiles.grids[-1]))


def warm(bundle: Path, variants: Sequence[Path]) -> Figures:
    """The same video in a new process, whose kernels were kept."""
    card()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        made = video(bundle, Path(folder))
        return {**made, "seconds_in_all": time.perf_counter() - start, "kernel_bytes": kernel_bytes()}


def kernel_bytes() -> int:
    """Of the kernels that the user's cache keeps."""
    folder = UserCache("kernels").folder
    return 0 if folder is None else sum(file.stat().st_size for file in folder.iterdir())


def full(bundle: Path, variants: Sequence[Path]) -> Figures:
    """A card that is nearly full: a smaller decode, or one line that says why not; and memory comes back."""
    cuda = card()
    free = cuda.free_bytes()
    if free <= LEFT_FREE:
        raise LeftOutError(f"{free / 1e9:.1f} GB are free already")
    held = cuda.allocate(free - LEFT_FREE)
    with tempfile.TemporaryDirectory() as folder:
        said = io.StringIO()
        output = ["--output", str(Path(folder) / "video.npy"), "--num-inference-steps", "1", "--seed", "0", "--trust"]
        with redirect_stdout(io.StringIO()), redirect_stderr(said):
            code = command_line(["generate", PROMPT, "--engines", str(bundle), *output])
    del held
    back = cuda.free_bytes()
    lines = said.getvalue().strip().splitlines()
    assert code in (0, 2), lines[-1:]
    assert back >= free - SLACK, f"{(free - back) / 1e9:.2f} GB did not come back"
    return {"exit_code": code, "said": lines[-3:]}


def extras(bundle: Path, variants: Sequence[Path]) -> Figures:
    """Previews, latents that are kept and decoded again, and a run that is cancelled after its first step."""
    card()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        plain = video(bundle, folder, "--save-latents", str(folder / "latents.npz"))
        seen = video(bundle, folder, "--preview", str(folder / "preview.png"))
        again = told_of(bundle, folder, "--from-latents", str(folder / "latents.npz"))
        images = (folder / "preview.png").stat().st_size
    assert plain["frames_sha256"] == seen["frames_sha256"] == again["frames_sha256"], "not the same frames"
    return {"preview_bytes": images, "said": seen["said"], "cancelled": cancelled(bundle)}


def cancelled(bundle: Path) -> Figures:
    """Cancels after the first step; the pipeline works on."""
    with TextToVideoPipeline.from_pretrained(bundle, trust=True) as pipe:
        stop = threading.Event()
        start = time.perf_counter()
        try:
            pipe(PROMPT, seed=0, num_inference_steps=NUM_STEPS, cancel=stop, callback_on_step_end=_sets(stop))
        except CancelledError as exc:
            said = str(exc)
        else:
            raise AssertionError("the run went on")
        seconds = time.perf_counter() - start
        pipe(PROMPT, seed=0, num_inference_steps=1, output_type="latent")
    return {"seconds": seconds, "said": said}


def _sets(stop: threading.Event) -> Callable[..., dict[str, Any]]:
    def callback(pipe: object, step: int, timestep: float, tensors: dict[str, Any]) -> dict[str, Any]:
        stop.set()
        return {}

    return callback


STEPS = (
    Step("doctor", "is this a card that plans run on?", 60, doctor),
    Step("memory", "do allocations, copies and their errors work?", 120, memory),
    Step("states", "do parked states come back unchanged?", 60, states),
    Step("plans", "does the card load the plans, and ask for the memory that was foretold?", 120, plans),
    Step("tests", "do the tests that need a card pass?", 240, tests),
    Step("verify", "do the engines compute what their float32 reference does?", 300, verify),
    Step("calls", "how long does a denoiser's call take, by how attention accumulates?", 300, calls),
    Step("videos", "is a video made, twice the same, in the memory that was planned?", 400, videos),
    Step("warm", "how soon is a video made in a new process?", 180, warm),
    Step("full", "what happens on a card that is nearly full?", 180, full),
    Step("extras", "do previews, kept latents and cancelling work?", 300, extras),
)


def take(name: str, bundle: Path, variants: Sequence[Path]) -> Figures:
    """Takes a step; returns its verdict and figures."""
    step = next(step for step in STEPS if step.name == name)
    try:
        open_bundle(bundle)
        return {"verdict": "passed", **step.take(bundle, variants)}
    except LeftOutError as exc:
        return {"verdict": "left out", "why": str(exc)}
    except Exception as exc:  # whatever goes wrong on a card is what is asked
        return {"verdict": "failed", "why": f"{type(exc).__name__}: {' '.join(str(exc).split())}"}


def main() -> None:
    """Takes the step that the parent asks for, and prints its result."""
    name, bundle, seconds, *variants = sys.argv[1:]
    faulthandler.dump_traceback_later(max(1.0, float(seconds) - HANG))
    print(json.dumps(take(name, Path(bundle), [Path(item) for item in variants])), flush=True)


if __name__ == "__main__":
    main()
