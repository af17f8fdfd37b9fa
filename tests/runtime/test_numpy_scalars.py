"""NumPy's scalars and 0-d arrays are numbers wherever a number is taken, and what is kept of them is plain Python."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from t2v_rt import T2VError, TextToVideoPipeline, build_engines
from t2v_rt.engines.backends import get_backend
from t2v_rt.engines.bundle.manifest import to_plain
from t2v_rt.engines.bundle.profiles import parse_profiles
from t2v_rt.numbers import as_flag, as_integer, as_number
from t2v_rt.runtime.decode.tiles import parse_grid
from t2v_rt.runtime.memory.plan import parse_bytes
from t2v_rt.runtime.noise import Generator
from t2v_rt.runtime.options import CallOptions
from t2v_rt.runtime.request import make_request
from t2v_rt.runtime.schedulers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from t2v_rt.runtime.video import open_writer
from tests.support.demo_bundle import CHECKPOINT, build_demo

Kind = Callable[[Any], Any]
Entry = Callable[[TextToVideoPipeline, Any], Any]


def zero_d(value: Any) -> Any:
    return np.array(value)


INTEGERS: list[Kind] = [
    *(np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64),
    zero_d,
]
FLOATS: list[Kind] = [np.float16, np.float32, np.float64, np.longdouble]
NUMBERS: list[Kind] = [*FLOATS, np.int8, np.int64, np.uint64, lambda value: np.array(float(value)), zero_d]
FLAGS: list[Kind] = [np.bool_, zero_d]


def request(**settings: Any) -> Entry:
    """What a request keeps of settings."""

    def entry(pipe: TextToVideoPipeline, value: Any) -> Any:
        given = {name: fill(value) if callable(fill) else fill for name, fill in settings.items()}
        made = make_request(pipe.manifest, CallOptions(**{"prompt": "a", "seed": 1, **given}))
        return {**made.settings(pipe.scheduler.settings()), "batch": made.batch}

    return entry


def same(value: Any) -> Any:
    return value


def step(**settings: Any) -> Entry:
    def entry(pipe: TextToVideoPipeline, value: Any) -> Any:
        scheduler = EulerDiscreteScheduler() if "s_churn" in settings else DDIMScheduler()
        scheduler.set_timesteps(2)
        sample = np.ones((1, 4), np.float32)
        arguments = dict.fromkeys(settings, value)
        made = scheduler.step(sample, scheduler.timesteps[0], sample, generator=Generator(0), **arguments)
        return made.prev_sample.tolist()

    return entry


def steps_of(scheduler: Any, **arguments: Any) -> list[float]:
    scheduler.set_timesteps(**arguments)
    return [float(t) for t in scheduler.timesteps]


def shifted(value: Any) -> list[float]:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return steps_of(scheduler, num_inference_steps=3, mu=value)


def written(folder: Path, fps: Any) -> bytes:
    with open_writer(folder / "a.npy", fps=fps, width=64, height=64, num_frames=1, metadata={}) as writer:
        writer.write(np.zeros((64, 64, 3), np.uint8))
    return (folder / "a.npy").read_bytes()


INTEGER_ENTRIES: dict[str, tuple[int, Entry]] = {
    "height": (64, request(height=same)),
    "width": (64, request(width=same)),
    "num_frames": (5, request(num_frames=same)),
    "num_inference_steps": (3, request(num_inference_steps=same)),
    "num_videos_per_prompt": (2, request(num_videos_per_prompt=same)),
    "seed": (3, request(seed=same)),
    "seeds": (3, request(seed=lambda value: [value, 1], num_videos_per_prompt=2)),
    "zero_init_steps": (2, request(cfg_zero_star=True, zero_init_steps=same)),
    "Generator": (3, lambda pipe, value: [Generator(value).seed, Generator(value).randn(2).tolist()]),
    "randn": (3, lambda pipe, value: Generator(1).randn((value, value)).tolist()),
    "vram_budget": (100, lambda pipe, value: parse_bytes(value)),
    "vae_tiles": (2, lambda pipe, value: parse_grid((value, value))),
    "threads": (2, lambda pipe, value: vars(get_backend("onnxruntime", threads=value))["threads"]),
    "solver_order": (2, lambda pipe, value: UniPCMultistepScheduler(solver_order=value).settings()),
    "disable_corrector": (1, lambda pipe, value: UniPCMultistepScheduler(disable_corrector=[value]).settings()),
    "set_timesteps": (5, lambda pipe, value: steps_of(DDIMScheduler(), num_inference_steps=value)),
    "build sizes": (64, lambda pipe, value: to_plain(parse_profiles(value, value, 5, (1, 1, 1)))),
}
NUMBER_ENTRIES: dict[str, tuple[int, Entry]] = {
    "guidance_scale": (2, request(guidance_scale=same)),
    "guidance_rescale": (1, request(guidance_rescale=same)),
    "guidance_interval": (1, request(guidance_interval=lambda value: (0.0, value))),
    "step_cache": (1, request(step_cache=same)),
    "timesteps": (3, request(timesteps=lambda value: [value])),
    "sigmas": (1, request(sigmas=lambda value: [value, 0.5])),
    "flow_shift": (3, lambda pipe, value: UniPCMultistepScheduler(flow_shift=value).settings()),
    "mu": (1, lambda pipe, value: shifted(value)),
    "eta": (1, step(eta=same)),
    "s_churn": (1, step(s_churn=same)),
    "s_tmax": (1, step(s_churn=same, s_tmax=same)),
}
FLAG_ENTRIES: dict[str, Entry] = {
    "cfg_zero_star": request(cfg_zero_star=same),
    "guidance_batch": request(guidance_batch=same),
    "use_karras_sigmas": lambda pipe, value: DPMSolverMultistepScheduler(use_karras_sigmas=value).settings(),
}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> TextToVideoPipeline:
    return TextToVideoPipeline.from_pretrained(build_demo(tmp_path_factory.mktemp("scalars")), prompt_cache=False)


def plain(value: Any) -> bool:
    """Whether nothing of NumPy is left."""
    if isinstance(value, dict):
        return all(plain(item) for item in value.values())
    if isinstance(value, (list, tuple)):
        return all(plain(item) for item in value)
    return value is None or type(value) in (bool, int, float, str)


@pytest.mark.parametrize("name", sorted(INTEGER_ENTRIES))
def test_integers_of_every_width(pipe: TextToVideoPipeline, name: str) -> None:
    value, entry = INTEGER_ENTRIES[name]
    expected = entry(pipe, value)
    assert plain(expected)
    for kind in INTEGERS:
        found = entry(pipe, kind(value))
        assert plain(found)
        assert json.dumps(found) == json.dumps(expected)


@pytest.mark.parametrize("name", sorted(NUMBER_ENTRIES))
def test_numbers_of_every_kind(pipe: TextToVideoPipeline, name: str) -> None:
    value, entry = NUMBER_ENTRIES[name]
    expected = entry(pipe, float(value))
    assert plain(expected)
    for kind in NUMBERS:
        found = entry(pipe, kind(value))
        assert plain(found)
        assert json.dumps(found) == json.dumps(expected)


@pytest.mark.parametrize("name", sorted(FLAG_ENTRIES))
def test_flags(pipe: TextToVideoPipeline, name: str) -> None:
    for value in (True, False):
        expected = FLAG_ENTRIES[name](pipe, value)
        for kind in FLAGS:
            found = FLAG_ENTRIES[name](pipe, kind(value))
            assert plain(found)
            assert found == expected


@pytest.mark.parametrize("name", sorted(NUMBER_ENTRIES))
@pytest.mark.parametrize("text", ["inf", "-inf", "nan"])
def test_infinite_numbers_and_nan_are_refused_of_every_width(pipe: TextToVideoPipeline, name: str, text: str) -> None:
    if (name, text) == ("s_tmax", "inf"):
        pytest.skip("no limit is this setting's default")
    kinds: list[Kind] = [float, *FLOATS, lambda value: np.array(float(value))]
    for kind in kinds:
        with pytest.raises(T2VError):
            NUMBER_ENTRIES[name][1](pipe, kind(text))


@pytest.mark.parametrize("name", sorted(INTEGER_ENTRIES))
@pytest.mark.parametrize("value", [True, np.True_, 2.5, np.float32(2.5), "two", None, [2], np.array([2, 2, 2])])
def test_what_is_no_integer_is_refused(pipe: TextToVideoPipeline, name: str, value: Any) -> None:
    left_out = value is None and name in (
        *("height", "width", "num_frames", "num_inference_steps", "num_videos_per_prompt", "seed", "zero_init_steps"),
        *("threads", "build sizes"),
    )
    fraction, listed = isinstance(value, float | np.float32), isinstance(value, list)
    if left_out or (name == "vram_budget" and fraction) or (name == "seed" and listed):
        pytest.skip("it has a default, or may be a fraction or a list")
    with pytest.raises(T2VError):
        INTEGER_ENTRIES[name][1](pipe, value)


def test_frames_per_second_and_sizes_of_builds(tmp_path: Path) -> None:
    expected = written(tmp_path, 8)
    assert all(written(tmp_path, kind(8)) == expected for kind in NUMBERS)
    for bad in (np.float32("inf"), np.float16("nan"), np.True_, "8"):
        with pytest.raises(T2VError):
            written(tmp_path, bad)
    bundle = build_engines(CHECKPOINT, tmp_path / "built", height=np.int64(48), width=zero_d(80), num_frames=np.int8(9))  # type: ignore[arg-type]
    defaults = bundle.manifest.defaults
    assert (defaults.height, defaults.width, defaults.num_frames) == (48, 80, 9)


def test_a_whole_call_with_scalars_only(pipe: TextToVideoPipeline) -> None:
    plainly = pipe("a", height=64, width=64, num_frames=5, num_inference_steps=2, guidance_scale=3.0, seed=7)
    found = pipe(
        "a",
        height=np.uint8(64),  # type: ignore[arg-type]
        width=np.int8(64),  # type: ignore[arg-type]
        num_frames=np.int16(5),  # type: ignore[arg-type]
        num_inference_steps=zero_d(2),
        guidance_scale=np.float16(3.0),  # type: ignore[arg-type]
        num_videos_per_prompt=np.uint8(1),  # type: ignore[arg-type]
        seed=np.uint64(7),  # type: ignore[arg-type]
    )
    assert np.array_equal(found.frames, plainly.frames)
    assert json.dumps(dict(found.settings)) == json.dumps(dict(plainly.settings))
    assert type(found.seed) is int


def test_the_three_readers() -> None:
    assert as_integer(np.uint64(2**64 - 1)) == 2**64 - 1
    assert as_number(10**400) is None
    assert as_number(np.longdouble("1e400")) is None or np.longdouble is np.float64
    assert as_number(np.float16(0.1)) == float(np.float16(0.1))
    for other in (True, np.True_, "1", None, 1j, np.datetime64(1, "s"), np.array([1])):
        assert as_integer(other) is None
        assert as_number(other) is None
    for no_flag in (0, 1, np.int8(1), "True", None, np.array([True])):
        assert as_flag(no_flag) is None
