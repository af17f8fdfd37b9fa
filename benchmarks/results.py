"""The one place that writes results: JSON that names the machine, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from t2v_rt.benchmarks.machine import describe_machine
from t2v_rt.errors import RequestError
from t2v_rt.system.files import writing

FOLDER = Path(__file__).parent / "results"


def with_machine(report: Mapping[str, Any]) -> dict[str, Any]:
    """A report with the machine that it was measured on, first."""
    return {"machine": describe_machine(), **{name: value for name, value in report.items() if name != "machine"}}


def write(path: str | Path, report: Mapping[str, Any]) -> None:
    """Writes a report as JSON; it has the machine's name."""
    text = json.dumps(report if "machine" in report else with_machine(report), indent=1, ensure_ascii=False)
    with writing(Path(path)) as stream:
        stream.write(f"{text}\n".encode())


def read(path: str | Path) -> dict[str, Any]:
    """Reads a report.

    Raises:
        RequestError: no such file, or no JSON object.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as exc:
        raise RequestError(f"{path} cannot be read ({exc.strerror}); give a file that t2v-rt bench wrote") from exc
    except ValueError as exc:
        raise RequestError(f"{path} is no JSON ({exc}); give a file that t2v-rt bench wrote") from exc
    if not isinstance(content, dict):
        raise RequestError(f"{path} holds no JSON object; give a file that t2v-rt bench wrote")
    return content


def finish(report: Mapping[str, Any], path: str | Path | None) -> None:
    """Ends a script: its report, machine included, printed, and written where a file is named."""
    whole = with_machine(report)
    if path is not None:
        write(path, whole)
    print(json.dumps(whole, indent=1, ensure_ascii=False))
