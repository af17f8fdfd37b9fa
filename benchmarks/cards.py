"""NVIDIA cards as the driver tells of them: what they are, how fast they run, what of their memory is taken.

NVML's bindings are used where they are installed (`pynvml`), else `nvidia-smi` is asked, which takes longer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from importlib import import_module
from typing import Any, Self

from t2v_rt.system.installed import query_driver, read_rows

Source = tuple[Callable[[], int], float]  # asks for bytes that are taken, and seconds between two questions
MIB = 2**20
USED = ("memory.used",)  # as the driver calls it
NVML_INTERVAL, SMI_INTERVAL = 0.02, 0.5  # seconds between looks at the memory: what an answer takes, many times over
# what a result names -> how the driver calls it
FIELDS = {
    "name": "name",
    "driver": "driver_version",
    "memory_mib": "memory.total",
    "power_limit_watts": "power.limit",
    "sm_clock_mhz": "clocks.current.sm",
    "most_sm_clock_mhz": "clocks.max.sm",
    "memory_clock_mhz": "clocks.current.memory",
    "most_memory_clock_mhz": "clocks.max.memory",
    "temperature_celsius": "temperature.gpu",
}


def describe_cards() -> list[dict[str, Any]]:
    """Name, driver, memory, power limit and clocks of each card, as they are now; none without a driver."""
    text, _ = query_driver(tuple(FIELDS.values()))
    return read_cards(text)


def read_cards(text: str) -> list[dict[str, Any]]:
    """Reads what nvidia-smi prints for `FIELDS`, one card a line; what a card does not tell is None."""
    rows = read_rows(text, len(FIELDS))
    return [{name: _value(word) for name, word in zip(FIELDS, row, strict=True)} for row in rows]


def _value(word: str) -> str | float | None:
    if word.strip("[]") in ("N/A", "Not Supported", "Unknown Error"):
        return None
    try:
        return float(word)
    except ValueError:
        return word


def used_bytes() -> Source | None:
    """How to ask for the bytes taken of the first card, and how often that may be done; None without a card."""
    try:
        nvml = import_module("pynvml")
        nvml.nvmlInit()
        card = nvml.nvmlDeviceGetHandleByIndex(0)
        return (lambda: int(nvml.nvmlDeviceGetMemoryInfo(card).used)), NVML_INTERVAL
    except ImportError:
        pass
    except Exception:  # NVML's own, as where there is no driver
        return None
    return (_used_by_driver, SMI_INTERVAL) if query_driver(USED)[0].split() else None


def _used_by_driver() -> int:
    words = query_driver(USED)[0].split()
    return int(words[0]) * MIB if words else 0


class CardMemory:
    """The most that was taken of a card while the block ran; `peak_bytes` is None where there is no card.

    Args:
        source: as of `used_bytes`, which finds it where this is None.
    """

    def __init__(self, source: Source | None = None) -> None:
        self._source = source
        self.peak_bytes: int | None = None
        self.before_bytes: int | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        found = used_bytes() if self._source is None else self._source
        if found is not None:
            ask, interval = found
            self.before_bytes = self.peak_bytes = ask()
            self._thread = threading.Thread(target=self._watch, args=(ask, interval), daemon=True)
            self._thread.start()
        return self

    def _watch(self, ask: Callable[[], int], interval: float) -> None:
        while not self._ended.wait(interval):
            self.peak_bytes = max(self.peak_bytes or 0, ask())

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
