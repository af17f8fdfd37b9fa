"""Bundles of plans for tests, and a slot of the machine that cards in host memory are put into (see `host_card`)."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from t2v_rt import build_engines
from t2v_rt.engines.bundle.profiles import PlanSpec
from t2v_rt.engines.bundle.store import Bundle
from tests.support.host_card import HostLibrary, export_graphs, plans_by_hash
from tests.support.host_cuda import HostCuda

RTX = "tensorrt-rtx"
Readable = dict[str, tuple[Path, PlanSpec]]  # sha256 of a plan -> its graph, and what the builder told


def build_plans(checkpoint: Path, folders: pytest.TempPathFactory, sizes: Mapping[str, Any]) -> Bundle:
    """Plans for the GPU that the card in host memory is; skips the test where their library is not installed."""
    pytest.importorskip("tensorrt_rtx", reason="needs t2v-rt[tensorrt-rtx]")
    return build_engines(checkpoint, folders.mktemp("plans") / "bundle", backend=RTX, gpus="sm86", **sizes)


def readable_plans(
    bundle: Bundle, checkpoint: Path, folders: pytest.TempPathFactory, sizes: Mapping[str, Any]
) -> Readable:
    """What the library in host memory knows of a bundle's plans.

    Args:
        bundle: of plans.
        checkpoint: that it was built from.
        folders: for the graphs.
        sizes: height, width and number of frames that it was built for.
    """
    return plans_by_hash(bundle, export_graphs(checkpoint, tuple(sizes.values()), folders.mktemp("graphs")))


class Slot:
    """Where cards are put into the machine, one in the place of the other.

    Args:
        monkeypatch: takes them out again.
        cache: folder of the user's cache meanwhile; None for the one there is.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cache: Path | None = None) -> None:
        self._monkeypatch, self._cache = monkeypatch, cache
        self.cards: list[HostCuda] = []

    def put(self, library: HostLibrary) -> HostLibrary:
        """Puts a card with its library into the machine."""
        self._monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", library.cuda)
        self._monkeypatch.setitem(sys.modules, "tensorrt_rtx", library)
        if self._cache is not None:
            self._monkeypatch.setenv("XDG_CACHE_HOME", str(self._cache))
        self.cards.append(library.cuda)
        return library

    def insert(
        self, bundle: Bundle, readable: Mapping[str, tuple[Path, PlanSpec]], capacity: int, devices: int = 1
    ) -> HostLibrary:
        """Puts a card of so many bytes into the machine, whose library is the one that built a bundle."""
        return self.put(HostLibrary(HostCuda(capacity, devices), bundle.manifest.builder[RTX], readable))


@contextmanager
def card_slot(
    monkeypatch: pytest.MonkeyPatch, cache: Path | None = None, *, but_faulted: bool = False
) -> Iterator[Slot]:
    """A slot, all of whose cards must have been given back their memory in the end.

    Args:
        monkeypatch: of the test.
        cache: as `Slot` takes it.
        but_faulted: whether cards that faulted need not.
    """
    slot = Slot(monkeypatch, cache)
    yield slot
    gc.collect()
    cards = [cuda for cuda in slot.cards if not (but_faulted and cuda.fault)]
    assert all(cuda.used("d") == cuda.used("h") == 0 for cuda in cards)
