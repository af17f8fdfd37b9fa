"""Files that need the reference are known by their imports."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.marks import Absent, needs_reference

TESTS = Path(__file__).resolve().parent


@pytest.mark.parametrize(
    ("text", "needs"),
    [
        ("import torch", True),
        ("import numpy, transformers.models", True),
        ("from diffusers.utils import logging", True),
        ("from tests.support import differential", True),  # which imports diffusers
        ("from tests.support.differential import run", True),
        ("from train import load_state", True),  # of the demo
        ("def later():\n    import torch", False),
        ("if TYPE_CHECKING:\n    import torch", False),
        ("import torchless\nfrom tests.conftest import Tiny", False),
    ],
)
def test_imports_tell(tmp_path: Path, text: str, needs: bool) -> None:
    file = tmp_path / "test_x.py"
    file.write_text(text, encoding="utf-8")
    assert needs_reference(file) is needs


def test_files_of_both_kinds() -> None:
    assert needs_reference(TESTS / "runtime/test_parity.py")
    assert not needs_reference(TESTS / "runtime/test_pipeline.py")
    assert not needs_reference(TESTS / "conftest.py")


def test_what_is_left_out_is_refused() -> None:
    for name in ("torch", "torch.nn", "diffusers"):
        with pytest.raises(ModuleNotFoundError, match="import it at the top of the test's file"):
            Absent().find_spec(name)
    assert Absent().find_spec("torchless") is None
