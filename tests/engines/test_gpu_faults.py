"""What goes wrong on a GPU, on a card in host memory: memory that runs out, faults, plans that are not taken."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from t2v_rt import BackendError, EngineError, TextToVideoPipeline
from t2v_rt.engines.bundle.store import Bundle
from t2v_rt.engines.devices import ALREADY_IN_USE
from t2v_rt.engines.tensorrt.backend import TensorRTBackend
from t2v_rt.errors import OutOfMemoryError
from t2v_rt.runtime.noise import Generator
from tests.conftest import Tiny
from tests.support.card_slot import Readable, build_plans, card_slot, readable_plans
from tests.support.host_card import HostContext, HostLibrary, Reason
from tests.support.host_cuda import HostCuda

pytestmark = pytest.mark.slow  # builds plans

SIZE: dict[str, Any] = {"height": 128, "width": 192, "num_frames": 5}
REQUEST: dict[str, Any] = {"seed": 1, "num_inference_steps": 1, **SIZE}
SHAPE = (1, 4, 2, 16, 24)  # of the latents
ROOM = 10**9
SAME_VIDEO = 2e-2  # mean difference of frames in [0, 1]: half operands, summed in another order
ILLEGAL_ADDRESS = 700  # of cudaError_t
# as full TensorRT tells that memory ran out: that some call of CUDA failed, then what it was for
FULL_TENSORRT = (
    "IExecutionContext::executeV3: Error Code 1: Cuda Runtime (In allocate at common/dispatch/mem.cpp:123)",
    "[runner.cpp::execute] Error Code 2: OutOfMemory (Requested size was 123456 bytes.)",
)
Insert = Callable[..., HostLibrary]


@pytest.fixture(scope="module")
def plans(narrow: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return build_plans(narrow.checkpoint, tmp_path_factory, SIZE)


@pytest.fixture(scope="module")
def readable(plans: Bundle, narrow: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Readable:
    """The plans that the library can read."""
    return readable_plans(plans, narrow.checkpoint, tmp_path_factory, SIZE)


@pytest.fixture
def insert(plans: Bundle, readable: Readable, monkeypatch: pytest.MonkeyPatch) -> Iterator[Insert]:
    """Puts cards of so many bytes into the machine; all of them are given back in the end, but of one that faulted."""
    with card_slot(monkeypatch, but_faulted=True) as slot:
        yield lambda capacity=ROOM, devices=1: slot.insert(plans, readable, capacity, devices)


def open_pipe(plans: Bundle, **settings: Any) -> TextToVideoPipeline:
    return TextToVideoPipeline.from_pretrained(plans.folder, prompt_cache=False, **settings)


# -- memory --


def test_memory_that_runs_out_is_seen_in_whatever_line_the_library_tells_it(
    plans: Bundle, insert: Insert, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    insert()
    latents = Generator(0).randn(SHAPE)
    with open_pipe(plans, vae_tiles="1x1") as pipe:
        expected = np.concatenate(list(pipe.decode(latents)))

    execute = HostContext.execute_async_v3

    def run_out(context: Any, stream: int) -> bool:
        whole = context.engine.told.profiles[0].sizes
        if context.engine.graph.stem == "tail" and context.shapes["features"][-1] == whole["width"].max:
            for line in FULL_TENSORRT:
                context.engine.runtime.log.log(1, line)
            return False
        return execute(context, stream)

    monkeypatch.setattr("tests.support.host_card.HostContext.execute_async_v3", run_out)
    with open_pipe(plans) as pipe, caplog.at_level(logging.WARNING):
        found = np.concatenate(list(pipe.decode(latents)))
    assert caplog.text.count("decoding again in") == 1
    assert np.abs(found - expected).max() < SAME_VIDEO


def test_trouble_that_was_overcome_is_not_blamed_later(
    plans: Bundle, insert: Insert, monkeypatch: pytest.MonkeyPatch
) -> None:
    insert()
    with open_pipe(plans) as pipe:
        pipe("a red ball", **REQUEST)
        backend = pipe.backend
        assert isinstance(backend, TensorRTBackend)
        backend._gpu.log.log(1, "OutOfMemory: of a graph that could not be recorded")

        def fail(context: Any, stream: int) -> bool:
            context.engine.runtime.log.log(1, "the tensor is not there")
            return False

        monkeypatch.setattr("tests.support.host_card.HostContext.execute_async_v3", fail)
        with pytest.raises(EngineError, match="tensorrt-rtx failed: the tensor is not there") as caught:
            pipe("a red ball", **REQUEST)
        assert not isinstance(caught.value, OutOfMemoryError)
        del caught


def test_a_card_that_others_have_filled_is_told_of_with_what_is_free(plans: Bundle, insert: Insert) -> None:
    library = insert()
    with open_pipe(plans, vram_budget=ROOM) as pipe:
        library.cuda.capacity = 1000
        with pytest.raises(
            OutOfMemoryError, match=r"cannot be loaded: .*OutOfMemory.*; 0\.0 of 1\.0 GB are free, close other programs"
        ):
            pipe.stages.components.get("transformer")


def test_a_card_without_room_for_another_program_is_one_line(
    plans: Bundle, insert: Insert, monkeypatch: pytest.MonkeyPatch
) -> None:
    insert()
    monkeypatch.setattr("tests.support.host_card.HostCuda.cudaSetDevice", _full)
    with pytest.raises(OutOfMemoryError, match="no room for another program; close others that use it"):
        open_pipe(plans)


def _full(cuda: HostCuda, index: int) -> tuple[int]:
    return (2,)


# -- faults --


def test_after_a_fault_everything_is_let_go_of_and_the_program_must_be_restarted(
    plans: Bundle, insert: Insert, caplog: pytest.LogCaptureFixture
) -> None:
    library = insert()
    pipe = open_pipe(plans, vram_budget=ROOM)
    pipe("a red ball", **REQUEST)
    loaded = [pipe.stages.components.get(name) for name in pipe.stages.components.loaded]
    assert len(loaded) >= 2
    engines = [engine for component in loaded for engine in component.engines.values()]
    library.cuda.fault = ILLEGAL_ADDRESS
    line = r"the GPU faulted \(CUDA error 700, an error\), and whatever .* now fails; restart the program$"
    with pytest.raises(EngineError, match=line):
        pipe("a red ball", **REQUEST)
    with caplog.at_level(logging.WARNING):
        pipe.close()
        pipe.close()
    assert pipe.stages.components.loaded == ()
    assert caplog.text.count("let go of all the same") == 1
    assert all(engine._engine is None for engine in engines)  # type: ignore[attr-defined]
    with pytest.raises(EngineError, match=line):  # the old one's GPU
        open_pipe(plans)
    del pipe, loaded, engines
    gc.collect()
    with pytest.raises(EngineError, match=line):  # a new one
        open_pipe(plans)


def test_a_fault_in_a_call_is_told_as_such_and_not_in_the_library_s_words(
    plans: Bundle, insert: Insert, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = insert()
    with open_pipe(plans) as pipe:
        pipe("a red ball", **REQUEST)

        def fault(context: Any, stream: int) -> bool:
            library.cuda.fault = ILLEGAL_ADDRESS
            context.engine.runtime.log.log(1, "Error Code 1: Cuda Runtime (In enqueueV3)")
            return False

        monkeypatch.setattr("tests.support.host_card.HostContext.execute_async_v3", fault)
        with pytest.raises(EngineError, match=r"^[a-z_.0-9]+: the GPU faulted .* restart the program$"):
            pipe("a red ball", **REQUEST)


# -- plans that are not taken --


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        ("VERSION_MISMATCH", "built by another version of tensorrt-rtx; build it again with t2v-rt build-engines"),
        ("UNSUPPORTED_CC", "it has no kernels for this GPU; build it again .* or use --backend onnxruntime"),
        (
            "OLD_CUDA_DRIVER",
            'CUDA 13.0, .*install driver R580 or newer, or pip install tensorrt-rtx-cu12 "cuda',
        ),
        ("OLD_CUDA_RUNTIME", r"needs a newer CUDA runtime; pip install --upgrade t2v-rt\[tensorrt-rtx\]"),
        ("INSUFFICIENT_GPU_MEMORY", "too little memory for it; t2v-rt plan tells what would fit"),
        ("MALFORMED_ENGINE", "it is no plan of tensorrt-rtx; build it again"),
        ("CUDA_ERROR", "the NVIDIA driver does not answer; t2v-rt doctor tells more"),
    ],
)
def test_why_a_plan_is_not_taken_is_told_with_what_to_do(plans: Bundle, insert: Insert, reason: str, told: str) -> None:
    library = insert()
    with open_pipe(plans) as pipe:
        library.refusal = Reason[reason].value
        with pytest.raises(
            EngineError, match=f"transformer: model.plan cannot be loaded: .*the plan is not taken; .*{told}"
        ):
            pipe.stages.components.get("transformer")


# -- one GPU for all --


def test_pipelines_of_a_process_share_one_gpu_until_the_last_lets_go_of_it(plans: Bundle, insert: Insert) -> None:
    insert()
    backends: list[TensorRTBackend] = []

    def open_one() -> None:
        backends.append(TensorRTBackend(plans))

    threads = [threading.Thread(target=open_one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(backend._gpu) for backend in backends}) == 1
    assert {backend.device_key for backend in backends} == {"cuda:0"}
    gpu = weakref.ref(backends[0]._gpu)
    del backends[1:]
    gc.collect()
    assert gpu() is not None
    backends.clear()
    gc.collect()
    assert gpu() is None


def test_a_video_of_two_pipelines_in_turn_is_that_of_one(plans: Bundle, insert: Insert) -> None:
    insert()
    with open_pipe(plans) as one, open_pipe(plans) as other:
        expected = one("a red ball", **REQUEST).frames
        assert np.array_equal(other("a red ball", **REQUEST).frames, expected)
        other.close()
        assert np.array_equal(one("a red ball", **REQUEST).frames, expected)


def test_a_gpu_is_chosen_by_its_index(plans: Bundle, insert: Insert) -> None:
    library = insert(devices=2)
    with open_pipe(plans) as first, open_pipe(plans, device=1) as second:
        expected = first("a red ball", **REQUEST).frames
        held = library.cuda.used("d", 0)
        assert library.cuda.used("d", 1) == 0
        assert np.array_equal(second("a red ball", **REQUEST).frames, expected)
        assert library.cuda.used("d", 0) == held
        assert library.cuda.used("d", 1) > 0
        keys = [pipe.backend.device_key for pipe in (first, second)]
        assert keys == ["cuda:0", "cuda:1"]
        assert second.backend.free_bytes() == ROOM - library.cuda.used("d", 1)
        assert np.array_equal(first("a red ball", **REQUEST).frames, expected)


@pytest.mark.parametrize(
    ("device", "told"),
    [
        (2, r"^there is no GPU 2; expected 0 \(host 0\), 1 \(host 1\)$"),
        (-1, "^device is -1; expected the index of a GPU, 0 or more$"),
        ("x", "^device is 'x'; expected the index of a GPU, 0 or more$"),
        (True, "^device is True; expected the index of a GPU, 0 or more$"),
    ],
)
def test_a_gpu_that_is_not_there_is_refused(plans: Bundle, insert: Insert, device: Any, told: str) -> None:
    insert(devices=2)
    with pytest.raises(BackendError, match=told):
        open_pipe(plans, device=device)


def test_a_device_that_others_use_already_is_waited_for_as_they_chose(
    plans: Bundle, insert: Insert, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = insert()

    def refuse(cuda: HostCuda, flags: int) -> tuple[int]:
        return (ALREADY_IN_USE,)

    library.cuda.flags[0] = 4  # as they chose too
    monkeypatch.setattr("tests.support.host_card.HostCuda.cudaSetDeviceFlags", refuse)
    with open_pipe(plans) as pipe:
        assert pipe("a red ball", **REQUEST).frames.size


# -- kernels --


def test_no_kernel_is_compiled_behind_a_call(plans: Bundle, insert: Insert) -> None:
    library = insert()
    with open_pipe(plans) as pipe:
        pipe("a red ball", **REQUEST)
    assert library.strategies == {"blocks_0": "none"}  # each prompt has another length
