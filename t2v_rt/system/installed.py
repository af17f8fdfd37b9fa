"""What is installed on this machine: versions of packages, and what NVIDIA's driver tells of its cards."""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
from collections.abc import Sequence
from importlib import metadata

ANSWER_SECONDS = 20  # a card that is going wrong can make nvidia-smi hang


def installed_version(package: str) -> str | None:
    """The version of a package; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def query_driver(fields: Sequence[str]) -> tuple[str, str]:
    """Asks nvidia-smi for some fields of each card.

    Args:
        fields: as it names them, such as `memory.total`.

    Returns:
        (what it prints, as `read_rows` reads it, numbers without units; why there is no answer, or "").
    """
    command = shutil.which("nvidia-smi")
    if command is None:
        return "", "no NVIDIA driver is installed: nvidia-smi is not found"
    arguments = [command, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        result = subprocess.run(arguments, capture_output=True, text=True, timeout=ANSWER_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as exc:
        return "", f"nvidia-smi does not answer ({type(exc).__name__})"
    if result.returncode != 0:
        said = " ".join((result.stdout or result.stderr).split())[:200]
        return "", f"nvidia-smi failed: {said}"
    return result.stdout, ""


def read_rows(text: str, count: int) -> list[list[str]]:
    """The words of each card in what nvidia-smi prints, so many of each; lines of other numbers are left out."""
    return [row for row in csv.reader(io.StringIO(text), skipinitialspace=True) if len(row) == count]
