"""What `make` installs is pinned, and the pins are among what users may have."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def requirements() -> list[Requirement]:
    """Those of the package and of the extras that the Makefile installs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = re.findall(r'--editable "\.\[([^]]+)\]"', MAKEFILE)
    extras = {extra for extras in named for extra in extras.split(",")}
    assert extras > {"build", "dev", "export"}
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    found = [Requirement(line) for line in lines]
    return [requirement for requirement in found if requirement.name != "t2v-rt"]


def test_every_requirement_is_pinned_to_one_that_it_allows() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    torch = re.search(r"^TORCH := torch==(\S+)$", MAKEFILE, re.MULTILINE)
    assert torch is not None
    pins["torch"] = torch[1]
    for requirement in requirements():
        name = canonicalize_name(requirement.name)
        assert name in pins, f"{name} is not in constraints.txt"
        assert requirement.specifier.contains(pins[name]), f"{requirement} does not allow {pins[name]}"
