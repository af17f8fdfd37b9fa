"""diffusers as a peer: each kind of work gives what t2v-rt gives, so that times can be compared."""

from __future__ import annotations

from dataclasses import replace

import diffusers
import numpy as np
import pytest

from t2v_rt.benchmarks.peers.diffusers_pipeline import EAGER, EAGER_BF16
from t2v_rt.benchmarks.peers.ours import OURS, RUNNERS
from t2v_rt.benchmarks.workloads import relative_error
from tests.benchmarks.test_peers import job
from tests.conftest import Tiny

# the older word is the one that all versions from the oldest that is allowed on know
pytestmark = pytest.mark.filterwarnings("ignore:.*torch_dtype:FutureWarning")


@pytest.mark.parametrize("kind", RUNNERS)
def test_each_kind_of_work_gives_what_ours_gives(narrow: Tiny, kind: str) -> None:
    results = []
    for peer in (OURS, EAGER):
        assert peer.missing(job(narrow, kind)) == ""
        runner = peer.open(job(narrow, kind))
        for _ in range(2):
            runner.prepare()
            result = runner.run()
        results.append(result)
        runner.close()
    assert relative_error(results[1], results[0]) < 1e-4


def test_bfloat16_is_told_from_float32_by_its_error_and_passes_its_own_tolerance(narrow: Tiny) -> None:
    ours, half = (peer.open(job(narrow, "denoiser")).run() for peer in (OURS, EAGER_BF16))
    assert EAGER.tolerance < relative_error(half, ours) < EAGER_BF16.tolerance
    assert half.dtype == np.float32


def test_diffusers_says_what_it_lacks(narrow: Tiny) -> None:
    assert diffusers.__version__
    assert "give --checkpoint FOLDER" in EAGER.missing(job(narrow, "call", checkpoint=False))
    wrong = replace(job(narrow, "call"), checkpoint=str(narrow.bundle))
    assert "no model_index.json" in EAGER.missing(wrong)
