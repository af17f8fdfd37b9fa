"""Threads: never more than the processors that a process may use; and seeds that are drawn."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from t2v_rt import RequestError, TextToVideoPipeline
from t2v_rt.cli import main
from t2v_rt.engines.backends import get_backend
from t2v_rt.runtime.noise import Generator
from t2v_rt.runtime.options import CallOptions
from t2v_rt.runtime.request import CallArrays, make_request
from t2v_rt.system import cgroups, resources
from t2v_rt.system.resources import usable_processors
from tests.conftest import Tiny


@pytest.mark.parametrize(("usable", "cores"), [(2, 2), (2, 64), (1, 2)])
def test_threads_are_capped(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, usable: int, cores: int
) -> None:
    monkeypatch.setattr(resources, "usable_processors", lambda: usable)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)

    def threads(asked: int | None) -> object:
        return vars(get_backend("onnxruntime", threads=asked))["threads"]

    assert threads(None) == (None if usable == cores else usable)  # the library's own choice, where it has all
    assert threads(1) == 1
    assert threads(usable) == usable
    assert not caplog.records
    assert threads(64) == usable
    (record,) = caplog.records
    assert record.getMessage() == f"threads is 64, and this process may use {usable} processors: {usable} are used"


def test_a_request_for_too_many_threads_is_told_once(
    narrow: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    command = ["generate", "a ball", "--engines", str(narrow.bundle), "--output", str(tmp_path / "a.npy")]
    assert main([*command, "--num-inference-steps", "1", "--threads", "100000"]) == 0
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_processors_of_this_process() -> None:
    usable = usable_processors()
    assert 1 <= usable <= (os.cpu_count() or 1)
    if sys.platform == "linux":
        code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        code += "from t2v_rt.system.resources import usable_processors; print(usable_processors())"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout == "1\n"


@pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")
@pytest.mark.parametrize(("quota", "usable"), [(None, 4), (0.25, 1), (1.0, 1), (1.5, 2), (9.0, 4)])
def test_a_part_of_a_processor_counts_as_one(monkeypatch: pytest.MonkeyPatch, quota: float | None, usable: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2, 3})
    monkeypatch.setattr(cgroups, "processor_quota", lambda: quota)
    assert usable_processors() == usable


def test_quotas_of_groups(tmp_path: Path) -> None:
    root, own = tmp_path / "cgroup", tmp_path / "own"

    def quota(text: str) -> float | None:
        own.write_text(text)
        return cgroups.processor_quota(root, own)

    def group(path: str, **files: str) -> None:
        (root / path).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (root / path / name.replace("cpu_", "cpu.", 1)).write_text(f"{content}\n")

    assert cgroups.processor_quota(root, own) is None  # another kind of system
    assert quota("0::/a/b\n") is None
    group("a/b", cpu_max="max 100000")
    assert quota("0::/a/b\n") is None
    group("a", cpu_max="150000 100000")
    assert quota("0::/a/b\n") == 1.5  # a limit further up counts
    group("a/b", cpu_max="50000 100000")
    assert quota("0::/a/b\n") == 0.5
    assert quota("0::/../other\n") is None
    for spoilt in ("", "1", "much 100000", "100000 0"):
        group("a/b", cpu_max=spoilt)
        assert quota("0::/a/b\n") == 1.5
    group("cpu,cpuacct/docker/c", cpu_cfs_quota_us="200000", cpu_cfs_period_us="100000")
    group("cpu,cpuacct", cpu_cfs_quota_us="-1", cpu_cfs_period_us="100000")
    assert quota("4:memory:/x\n3:cpu,cpuacct:/docker/c\n") == 2.0
    assert quota("3:cpuacct:/docker/c\n2:cpuset:/\n") is None
    group("cpu", cpu_cfs_quota_us="300000", cpu_cfs_period_us="100000")  # a container's own group, mounted as the root
    assert quota("3:cpu:/docker/d\n") == 3.0


def test_a_seed_of_minus_one_is_drawn_and_told(narrow: Tiny, pipe: TextToVideoPipeline, tmp_path: Path) -> None:
    def seeds(**settings: object) -> tuple[int, ...]:
        arrays = CallArrays(settings.pop("generator", None))  # type: ignore[arg-type]
        return make_request(narrow_manifest, CallOptions(prompt=["a", "b"], **settings), arrays).seeds  # type: ignore[arg-type]

    narrow_manifest = pipe.manifest
    drawn = [seeds(seed=-1)[0], seeds(seed=np.int64(-1))[0], *seeds(seed=[-1, -1])]
    assert len(set(drawn)) == 4
    assert all(0 <= seed < 2**32 for seed in drawn)
    assert seeds(seed=[-1, 7])[1] == 7
    assert seeds(seed=-2) == (-2,)  # a seed, as torch's generators take it
    assert seeds(generator=Generator(0)) == ()
    with pytest.raises(RequestError, match="generator"):
        seeds(seed=-1, generator=Generator(0))
    assert Generator(-1).randn(3).tolist() == Generator(2**32 - 1).randn(3).tolist()
    with pytest.raises(RequestError, match="seed"):
        seeds(seed=-1.0)
    out = pipe("a ball", seed=-1, num_inference_steps=1)
    assert out.seed == out.settings["seed"] != -1
    assert np.array_equal(out.frames, pipe("a ball", seed=out.seed, num_inference_steps=1).frames)
