"""Processes that are forked from one with an open pipeline: real forks, each in a program of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.demo_bundle import build_demo

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="there is no fork on Windows"),
]
LIMIT = 600  # seconds, a hundred times what any of it takes: a child that hangs would do so for ever
START = """
import hashlib, multiprocessing, os, sys, threading, warnings
warnings.filterwarnings("ignore", category=DeprecationWarning)  # of fork beside threads, from Python 3.12 on
from t2v_rt import EngineError, TextToVideoPipeline

pipe = TextToVideoPipeline.from_pretrained(sys.argv[1], threads=2, prompt_cache=False)

def make(prompt="a red ball", **settings):
    frames = pipe(prompt, seed=7, num_inference_steps=2, num_frames=5, output_type="uint8", **settings).frames
    return hashlib.sha256(frames.tobytes()).hexdigest()

def forked(work):
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        work()
        sys.exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

expected = make()
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_demo(tmp_path_factory.mktemp("fork"))


def run(bundle: Path, program: str) -> str:
    """What a program prints that goes on after START; it must end well and say nothing on standard error."""
    command = [sys.executable, "-c", START + program, str(bundle)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.stderr == ""
    assert done.returncode == 0
    return done.stdout


def test_a_child_that_does_nothing_ends(bundle: Path) -> None:
    assert run(bundle, "forked(lambda: None); print('done')") == "done\n"


def test_a_child_that_lets_go_of_the_pipeline_ends(bundle: Path) -> None:
    program = """
import gc
def drop():
    global pipe
    pipe.close()
    del pipe
    gc.collect()
forked(drop)
assert make() == expected  # the parent's engines are as they were
"""
    assert run(bundle, program) == ""


def test_a_child_makes_the_parents_video_and_so_does_its_own_child(bundle: Path) -> None:
    program = """
def work():
    assert make() == expected
    assert make("a blue square") != expected  # encodes a new prompt
    forked(lambda: print(make() == expected, flush=True))
forked(work)
print(make() == expected)
"""
    assert run(bundle, program) == "True\nTrue\n"


def test_processes_and_pools_of_multiprocessing_work(bundle: Path) -> None:
    program = """
context = multiprocessing.get_context("fork")
process = context.Process(target=make)
process.start()
process.join()
print(process.exitcode)
with context.Pool(2) as pool:
    print([found == expected for found in pool.map(make, ["a red ball"] * 3)])
"""
    assert run(bundle, program) == "0\n[True, True, True]\n"


def test_a_child_forked_in_a_step_callback_is_told_that_the_running_call_is_not_its_own(bundle: Path) -> None:
    program = """
children = []
def fork_once(pipe, step, t, tensors):
    if not children:
        children.append(os.fork())
try:
    found = make(callback_on_step_end=fork_once)
except EngineError as exc:
    assert children == [0]
    print(exc, flush=True)
    assert make() == expected
    sys.exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 0
print(found == expected)
"""
    told = "transformer: the engine belongs to the process that this one was forked from; call the pipeline anew\n"
    assert run(bundle, program) == f"{told}True\n"


def test_locks_that_other_threads_hold_at_the_fork_do_not_stop_a_child(bundle: Path) -> None:
    program = """
other = TextToVideoPipeline.from_pretrained(sys.argv[1], vram_budget=26_000_000, prompt_cache=False)
stop = threading.Event()
def load_and_encode(pipe):
    count = 0
    while not stop.is_set():
        count += 1
        pipe.encode_prompt([f"text {count}"])
        pipe.close()
threads = [threading.Thread(target=load_and_encode, args=(each,)) for each in (pipe, other)]
for thread in threads:
    thread.start()
def work():
    assert make() == expected
    other("a blue square", seed=1, num_inference_steps=1, num_frames=1)
for _ in range(8):
    forked(work)
stop.set()
for thread in threads:
    thread.join()
print("done")
"""
    assert run(bundle, program) == "done\n"


def test_a_child_does_not_wait_for_an_import_that_another_thread_was_in(bundle: Path) -> None:
    program = """
assert "ftfy" in sys.modules
for name in [name for name in sys.modules if name.partition(".")[0] in ("ftfy", "wcwidth")]:
    del sys.modules[name]  # as before the first call
thread = threading.Thread(target=pipe.encode_prompt, args=(["a"],))
thread.start()
while "ftfy" not in sys.modules:
    pass
forked(lambda: pipe.encode_prompt(["b"]))
thread.join()
print("done")
"""
    assert run(bundle, program) == "done\n"


def test_the_gpu_of_the_parent_is_refused_in_one_line(bundle: Path) -> None:
    program = """
from t2v_rt import BackendError
from t2v_rt.system.forked import claim_gpu
forked(claim_gpu)  # the parent does not use it
claim_gpu()
claim_gpu()
def work():
    try:
        claim_gpu()
    except BackendError as exc:
        print(exc, flush=True)
forked(work)
"""
    told = run(bundle, program)
    assert told.startswith("this process was forked from one that uses the GPU, which CUDA does not allow; start it by")
    assert told.count("\n") == 1
