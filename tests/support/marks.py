"""Which files of the tests need the reference, read from their imports, so that nobody has to mark them."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = (ROOT, ROOT / "demo")  # what modules are imported from, as pytest's `pythonpath` has it
REFERENCE = frozenset({"accelerate", "diffusers", "torch", "transformers"})


@cache
def needs_reference(file: Path) -> bool:
    """Whether a file imports the reference at its top, itself or through another file of the tests or the demo."""
    return any(
        name.partition(".")[0] in REFERENCE or any(map(needs_reference, _files(name))) for name in _imported(file)
    )


def _imported(file: Path) -> Iterator[str]:
    """Modules that are imported where the file is: what a function imports, or a type alone, is not."""
    for statement in ast.parse(file.read_bytes()).body:
        if isinstance(statement, ast.Import):
            yield from (item.name for item in statement.names)
        elif isinstance(statement, ast.ImportFrom) and statement.module:
            yield statement.module
            yield from (f"{statement.module}.{item.name}" for item in statement.names)


def _files(module: str) -> Iterator[Path]:
    for folder in FOLDERS:
        file = folder / f"{module.replace('.', '/')}.py"
        if file.is_file():
            yield file


class Absent:
    """Refuses the reference to whoever imports it, as on a machine without it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name.partition(".")[0] in REFERENCE:
            raise ModuleNotFoundError(
                f"{name} is imported in a test that is not marked `reference`; import it at the top of the test's file",
                name=name,
            )
        return None


def refuse_reference() -> None:
    """From here on nothing of the reference can be imported."""
    sys.meta_path.insert(0, Absent())
