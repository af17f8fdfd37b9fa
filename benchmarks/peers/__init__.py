"""Who is measured: t2v-rt itself and its peers, each behind the same small protocol.

A peer is one line in `PEERS`: its name, the module and the object there. Modules are imported in the process that runs
the peer and nowhere else, so what one of them needs is missing for that one alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

from t2v_rt.benchmarks.workloads import Job
from t2v_rt.errors import RequestError

OURS, YARDSTICK = "t2v-rt", "yardstick"
PEERS: Mapping[str, str] = {
    OURS: "t2v_rt.benchmarks.peers.ours:OURS",
    "openvino": "t2v_rt.benchmarks.peers.openvino_graphs:OPENVINO",
    "openvino-bf16": "t2v_rt.benchmarks.peers.openvino_graphs:OPENVINO_BF16",
    "diffusers": "t2v_rt.benchmarks.peers.diffusers_pipeline:EAGER",
    "diffusers-compiled": "t2v_rt.benchmarks.peers.diffusers_pipeline:COMPILED",
    "diffusers-bf16": "t2v_rt.benchmarks.peers.diffusers_pipeline:EAGER_BF16",
    "diffusers-bf16-compiled": "t2v_rt.benchmarks.peers.diffusers_pipeline:COMPILED_BF16",
    "stable-diffusion.cpp": "t2v_rt.benchmarks.peers.stable_diffusion_cpp:PEER",
    YARDSTICK: "t2v_rt.benchmarks.peers.yardstick:YARDSTICK",
}
OTHERS = tuple(name for name in PEERS if name not in (OURS, YARDSTICK))  # that may be asked for
Times = Mapping[str, Sequence[float]]


class Runner(Protocol):
    """A peer that is ready to do one kind of work again and again."""

    def prepare(self) -> None:
        """What has to be done before each run and is not measured."""
        ...

    def run(self) -> NDArray[Any]:
        """Does the work once; the result is float32."""
        ...

    def stages(self) -> Times:
        """Stage -> seconds in the last run, as far as the peer can tell; what is done after a run belongs here too."""
        ...

    def facts(self) -> Mapping[str, Any]:
        """What the report tells once: plain JSON values."""
        ...

    def close(self) -> None:
        """Gives everything back."""
        ...


class Peer(Protocol):
    """Somebody who can do the work."""

    @property
    def tolerance(self) -> float:
        """The relative error of its results up to which its times are compared; what its precision explains."""
        ...

    def missing(self, job: Job) -> str:
        """Why it cannot do a job here, and what to do; empty where it can."""
        ...

    def open(self, job: Job) -> Runner:
        """Gets ready, weights loaded as far as the peer loads them before its first run."""
        ...


def peer(name: str) -> Peer:
    """The peer of a name; raises RequestError for an unknown one."""
    if name not in PEERS:
        raise RequestError(f"peer {name!r} is unknown; expected one of {', '.join(PEERS)}")
    module, _, attribute = PEERS[name].partition(":")
    found: Peer = getattr(importlib.import_module(module), attribute)
    return found
