"""NVIDIA cards as the driver tells of them: what they are, how fast they run, what of their memory is taken.

NVML's bindings are used where they are installed (`pynvml`), else `nvidia-smi` is asked, which takes longer.
"""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
import threading
from collections.abc import Callable
from importlib import import_module
from typing import Any, Self

MIB = 2**20
ANSWER_SECONDS = 20  # a card that is going wrong can make nvidia-smi hang
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
    return read_cards(_ask(",".join(FIELDS.values())) or "")


def read_cards(text: str) -> list[dict[str, Any]]:
    """Reads what nvidia-smi prints for `FIELDS`, one card a line; what a card does not tell is None."""
    cards = []
    for row in csv.reader(io.StringIO(text), skipinitialspace=True):
        if len(row) == len(FIELDS):
            cards.append({name: _value(word) for name, word in zip(FIELDS, row, strict=True)})
    return cards


def _value(word: str) -> str | float | None:
    if word.strip("[]") in ("N/A", "Not Supported", "Unknown Error"):
        return None
    try:
        return float(word)
    except ValueError:
        return word


def _ask(query: str) -> str | None:
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    arguments = [command, f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=ANSWER_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def used_bytes() -> tuple[Callable[[], int], float] | None:
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
    if not (_ask("memory.used") or "").split():
        return None
    return (lambda: int((_ask("memory.used") or "0").split()[0]) * MIB), SMI_INTERVAL


class CardMemory:
    """The most that was taken of the first card while the block ran; `peak_bytes` is None where there is no card."""

    def __init__(self) -> None:
        self.peak_bytes: int | None = None
        self.before_bytes: int | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        found = used_bytes()
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
