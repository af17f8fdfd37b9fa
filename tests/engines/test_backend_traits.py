"""What is known of each backend, and that what it lacks is refused and what it has decides."""

from __future__ import annotations

import json
import re
import shutil
import sys
import tomllib
from dataclasses import dataclass, replace
from importlib import util
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from t2v_rt import BackendError, RequestError, TextToVideoPipeline, build_engines
from t2v_rt.cli import main
from t2v_rt.engines import devices
from t2v_rt.engines.backend_info import BACKENDS, OPTIONS, BackendInfo, check_options
from t2v_rt.engines.backends import Backend, backend_of, get_backend
from t2v_rt.engines.bundle.manifest import ComponentSpec
from t2v_rt.engines.bundle.store import Bundle, open_bundle, read_manifest, write_manifest
from t2v_rt.engines.contract import Component
from t2v_rt.engines.onnxruntime.backend import PROVIDERS, OnnxRuntimeBackend
from t2v_rt.engines.onnxruntime.imported import ort
from t2v_rt.engines.tensorrt.libraries import check_targets
from t2v_rt.export.precision import PRECISIONS
from t2v_rt.runtime.memory.plan import CARD_RESERVE
from t2v_rt.runtime.options import CallOptions
from t2v_rt.runtime.request import make_request
from t2v_rt.system import forked
from t2v_rt.system.outputs import MANIFEST_NAME
from tests.conftest import Tiny
from tests.support.host_cuda import HostCuda

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDERS = ("t2v_rt", "export", "engines", "runtime", "benchmarks")
GIVEN: dict[str, Any] = {
    "device": 1,
    "provider": "cpu",
    "threads": 1,
    "trust": True,
    "gpus": "sm86",
    "attention_accumulation": "fp16",
}
LACKING = [(name, option) for name, info in BACKENDS.items() for option in OPTIONS if option not in info.options]
BUILDS = ("gpus", "attention_accumulation")
CALLS = [(name, option) for name, option in LACKING if option not in BUILDS]  # options of those who open a bundle
LARGE: dict[str, Any] = {"height": 64, "width": 96, "num_frames": 9}


@dataclass
class OnCard:
    """ONNX Runtime on the CPU, said to be a card with memory of its own."""

    backend: Backend
    memory_bytes: int | None
    own_memory: bool = True
    device: str = ""
    identity: str = "card"
    device_key: str | None = None

    def free_bytes(self) -> int | None:
        return None

    def buffer_bytes(self) -> int | None:
        return None

    def load(self, folder: Path, name: str, spec: ComponentSpec) -> Component:
        return self.backend.load(folder, name, spec)


def on_card(narrow: Tiny, memory_bytes: int | None, budget: int | None = None) -> TextToVideoPipeline:
    backend = OnCard(get_backend("onnxruntime"), memory_bytes)
    return TextToVideoPipeline(open_bundle(narrow.bundle), backend, budget)


def built_for(backend: str, narrow: Tiny, folder: Path) -> Bundle:
    """A bundle that says that it was built for another backend; nothing of it can be run."""
    shutil.copytree(narrow.bundle, folder)
    manifest = replace(read_manifest(folder), backend=backend, files={})
    (folder / MANIFEST_NAME).unlink()
    write_manifest(folder, manifest)
    return open_bundle(folder)


# -- the table --


@pytest.mark.parametrize("info", BACKENDS.values(), ids=BACKENDS)
def test_what_is_known_of_a_backend_agrees_with_itself_and_with_the_code(info: BackendInfo) -> None:
    assert set(info.precisions) <= set(PRECISIONS)
    assert info.options <= set(OPTIONS)
    assert info.native_code == ("trust" in info.options)
    assert bool(info.providers) == ("provider" in info.options)
    assert info.has_own_memory() == (info.own_memory or any(list(info.providers.values())[:1]))
    assert info.ahead_of_time or info.providers
    assert not info.parks_states or info.own_memory
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = extras["optional-dependencies"][info.extra] if info.extra else extras["dependencies"]
    assert info.module in {Requirement(line).name.replace("-", "_") for line in lines}


def test_every_provider_is_known_to_its_backend_and_to_the_table() -> None:
    assert list(BACKENDS["onnxruntime"].providers) == list(PROVIDERS)
    with pytest.raises(BackendError, match="unknown provider 'rocm'; expected one of cpu, cuda"):
        BACKENDS["onnxruntime"].has_own_memory("rocm")


def test_the_doctor_tells_of_every_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)["backends"]
    assert list(report) == ["onnxruntime", "onnxruntime, cuda", "tensorrt-rtx", "tensorrt"]
    for name, info in BACKENDS.items():
        if util.find_spec(info.module) is None:
            assert f"t2v-rt[{info.extra}]" in report[name]["todo"]


# -- options --


@pytest.mark.parametrize(("name", "option"), LACKING)
def test_an_option_that_a_backend_lacks_is_refused_and_who_has_it_is_told(name: str, option: str) -> None:
    flag, _ = OPTIONS[option]
    having = " and ".join(other for other, info in BACKENDS.items() if option in info.options)
    with pytest.raises(
        BackendError, match=rf"^backend {name} .+; leave {flag} .+ out, which is for {having}$"
    ) as caught:
        check_options(name, {option: GIVEN[option]})
    assert "\n" not in str(caught.value)
    check_options(name, {option: None})


@pytest.mark.parametrize(("name", "option"), CALLS)
def test_calls_and_commands_refuse_it(
    narrow: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, option: str
) -> None:
    bundle = built_for(name, narrow, tmp_path / "bundle")
    given = {option: GIVEN[option]}
    with pytest.raises(BackendError, match=f"backend {name} "):
        backend_of(bundle, **given)
    with pytest.raises(BackendError, match=f"backend {name} "):
        TextToVideoPipeline.from_pretrained(bundle.folder, **given)
    flag = [OPTIONS[option][0], *([] if option == "trust" else [str(GIVEN[option])])]
    commands = [["verify", str(bundle.folder)]]
    for command, output in (("generate", "out.mp4"), ("encode", "out.npz")):
        commands.append([command, "a ball", "--engines", str(bundle.folder), "--output", str(tmp_path / output)])
    if option == "provider":
        commands.append(["plan", str(bundle.folder)])
    for arguments in commands:
        assert main([*arguments, *flag]) == 2
        printed = capsys.readouterr()
        assert (printed.out, printed.err.count("\n")) == ("", 1)
        assert f"leave {OPTIONS[option][0]} ({option}=) out" in printed.err


@pytest.mark.parametrize("name", [name for name, info in BACKENDS.items() if "gpus" not in info.options])
def test_a_build_for_named_gpus_is_refused_where_there_is_none(narrow: Tiny, tmp_path: Path, name: str) -> None:
    assert check_targets(name, None) == ()
    with pytest.raises(BackendError, match=r"does not build for named GPUs; leave --gpu \(gpus=\) out, which is for"):
        build_engines(narrow.checkpoint, tmp_path / "bundle", backend=name, gpus="sm86")
    assert not list(tmp_path.iterdir())


def test_options_that_a_backend_has_are_taken(narrow: Tiny) -> None:
    taken = backend_of(open_bundle(narrow.bundle), provider="cpu", threads=1)
    assert vars(taken) == {"provider": "cpu", "threads": 1, "index": None, "spinning": True}
    with pytest.raises(BackendError, match="unknown provider ''"):
        TextToVideoPipeline.from_pretrained(narrow.bundle, provider="")


# -- memory --


def test_a_card_of_its_own_is_planned_against_its_memory_and_not_the_machine_s(
    narrow: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("t2v_rt.runtime.memory.planner.available_memory_bytes", lambda: 1)
    with pytest.raises(RequestError, match="the memory available is"):
        TextToVideoPipeline.from_pretrained(narrow.bundle)("a ball", seed=1, **LARGE)
    pipe = on_card(narrow, CARD_RESERVE + 100_000_000)
    assert pipe.vram_budget == CARD_RESERVE + 100_000_000
    plan = pipe.plan(make_request(pipe.manifest, CallOptions(prompt="a ball", seed=1, **LARGE)))
    assert (plan.reserve_bytes, plan.results_bytes, plan.parked_bytes) == (CARD_RESERVE, 0, 0)
    assert not plan.one_batch
    assert len(list(pipe.stream("a ball", seed=1, **LARGE))) == 9


def test_what_does_not_fit_the_card_is_refused_before_anything_is_loaded(narrow: Tiny) -> None:
    pipe = on_card(narrow, CARD_RESERVE + 1_000)
    with pytest.raises(RequestError, match=r"the budget is 0\.6 GB; no video of this model fits"):
        pipe("a ball", seed=1, **LARGE)
    assert pipe.stages.components.loaded == ()
    least = (
        on_card(narrow, None, budget=1)
        .plan(make_request(pipe.manifest, CallOptions(prompt="", seed=1, **LARGE)))
        .least_bytes
    )
    with pytest.raises(RequestError, match=r"the budget is .+; \d+x\d+ with \d frames would fit"):
        on_card(narrow, least - 1)("a ball", seed=1, **LARGE)


def test_caches_are_parked_only_where_the_backend_can(narrow: Tiny) -> None:
    pipe = on_card(narrow, None, budget=1)
    plan = pipe.plan(make_request(pipe.manifest, CallOptions(prompt="", seed=1, **LARGE)))
    assert plan.grid != (1, 1)
    assert not any(parks for _, parks in plan.ways)


def test_a_card_whose_memory_is_not_known_is_without_limit(narrow: Tiny) -> None:
    pipe = on_card(narrow, None)
    assert pipe.vram_budget is None
    assert pipe("a ball", seed=1, num_inference_steps=1).frames.size


def test_the_same_plan_is_told_for_a_provider_that_is_not_here(
    narrow: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["plan", str(narrow.bundle), "--vram-budget", "8GB", "--json"]
    reports = []
    for more in ([], ["--provider", "cpu"], ["--provider", "cuda"]):
        assert main([*command, *more]) == 0
        reports.append(json.loads(capsys.readouterr().out))
    default, cpu, card = reports
    assert default == cpu
    assert (cpu["reserve_bytes"], card["reserve_bytes"]) == (0, CARD_RESERVE)
    assert main([*command, "--provider", "rocm"]) == 2
    assert "unknown provider 'rocm'; expected one of cpu, cuda" in capsys.readouterr().err


# -- the card of ONNX Runtime --


@pytest.fixture
def with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """An ONNX Runtime that says it has CUDA."""
    names = list(PROVIDERS.values())
    monkeypatch.setattr(ort, "get_available_providers", lambda: names)
    monkeypatch.setattr(forked, "claim_gpu", lambda: None)  # it would be this process's for good
    devices._tell_unknown.cache_clear()


@pytest.mark.usefixtures("with_cuda")
def test_cuda_tells_the_memory_of_the_card_that_onnx_runtime_works_on(
    narrow: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", HostCuda(8 * 10**9))
    card = OnnxRuntimeBackend("cuda")
    assert (card.memory_bytes, card.free_bytes(), card.device_key) == (8 * 10**9, 8 * 10**9, "cuda:0")
    pipe = TextToVideoPipeline.from_pretrained(narrow.bundle, provider="cuda")
    assert (pipe.backend.own_memory, pipe.vram_budget) == (True, 8 * 10**9)
    cpu = TextToVideoPipeline.from_pretrained(narrow.bundle)
    assert (cpu.backend.own_memory, cpu.backend.memory_bytes, cpu.vram_budget) == (False, None, None)
    assert (cpu.backend.free_bytes(), cpu.backend.device_key) == (None, None)


@pytest.mark.usefixtures("with_cuda")
def test_where_cuda_cannot_be_asked_it_is_said_once(
    narrow: Tiny, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    for _ in range(2):
        assert TextToVideoPipeline.from_pretrained(narrow.bundle, provider="cuda").vram_budget is None
    (line,) = [record.getMessage() for record in caplog.records]
    assert "the GPU's memory is not known" in line
    assert "install t2v-rt[cuda]" in line
    assert TextToVideoPipeline.from_pretrained(narrow.bundle, vram_budget=10**9, provider="cuda").vram_budget == 10**9
    assert len(caplog.records) == 1


# -- who asks --


def test_nobody_compares_a_backend_s_name_to_learn_what_it_can_do() -> None:
    names = "|".join(BACKENDS)
    asked = re.compile(rf'[!=]= *"({names})"|"({names})" *[!=]=|\bin [\[({{]"({names})"|\.get\(\w*backend\b')
    files = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 100
    assert asked.search('if job.backend != "onnxruntime":')
    assert [str(file) for file in files if asked.search(file.read_text(encoding="utf-8"))] == []
