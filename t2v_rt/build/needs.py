"""What a build needs of disk and memory, told before it begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from t2v_rt.errors import RequestError
from t2v_rt.system.files import free_disk_bytes
from t2v_rt.system.resources import available_memory_bytes

if TYPE_CHECKING:
    from t2v_rt.build.job import BuildJob
    from t2v_rt.engines.bundle.manifest import ComponentSpec

MARGIN = 1.02  # of the weights' bytes: graphs, padding and what a builder adds come on top
OVERHEAD = 10_000_000  # bytes on disk that do not grow with the weights, of the bundle and of each plan
PROCESS = 500_000_000  # bytes of memory of the command itself
FULL = 4  # bytes of a float32
TENSOR_COPIES = 3  # of the largest tensor as float32: as read, as transformed, as stored
BUILDER_GROWTH = 3.3  # memory of TensorRT-RTX's builder over the weights of the plan it builds, as measured


@dataclass(frozen=True)
class Needs:
    """Estimates of what a build takes.

    Args:
        disk_bytes: at its output, at most, the bundle included.
        memory_bytes: of all its processes, at most.
    """

    disk_bytes: int
    memory_bytes: int

    def check(self, target: Path, finished: int = 0) -> None:
        """Refuses a build that disk or memory cannot take.

        Args:
            target: the bundle.
            finished: bytes that are on the disk already.

        Raises:
            RequestError: it does not fit.
        """
        free, available = free_disk_bytes(target.absolute().parent), available_memory_bytes()
        needed = self.disk_bytes - finished
        if needed > free:
            raise RequestError(
                f"{target}: the build needs about {needed / 1e9:.3g} GB of disk, {free / 1e9:.3g} GB are free; make "
                "room first"
            )
        if self.memory_bytes > available:
            raise RequestError(
                f"{target}: the build needs about {self.memory_bytes / 1e9:.3g} GB of memory, {available / 1e9:.3g} GB "
                "are available; close other programs, or build on another machine"
            )


def estimate_needs(job: BuildJob, outline: Sequence[ComponentSpec]) -> Needs:
    """Estimates them from the headers of the checkpoint's files.

    Args:
        job: the build.
        outline: of each of its units.
    """
    encoder = job.source.weights_of("text_encoder")
    table, _ = job.configs.embedding(encoder)
    fixed = (encoder.copied_bytes(table) if job.with_text_encoder else 0) + OVERHEAD
    if job.makes_plans:  # a unit's graphs lie beside its plans while those are built; plans share no weights
        graphs = [graph.weights_bytes for unit in outline for graph in unit.graphs.values()]
        exported = max(unit.weights_bytes for unit in outline)
        return Needs(
            int(MARGIN * sum(graphs)) + len(graphs) * OVERHEAD + exported + fixed,
            PROCESS + int(BUILDER_GROWTH * max(graphs)),
        )
    weights = sum(unit.weights_bytes for unit in outline)
    networks = job.source.weights.values()
    tensors = {name: tensor for network in networks for name, tensor in network.tensors.items()}
    largest = max(prod(tensor.shape) for name, tensor in tensors.items() if name != table)  # which is copied in pieces
    return Needs(int(MARGIN * weights) + fixed, PROCESS + TENSOR_COPIES * FULL * largest)
