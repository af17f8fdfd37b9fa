"""The documentation against the code: links, paths, names, and the picture of the floors."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SETUP = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "demo").glob("*.md")], key=str)
GUIDES = [
    *(ROOT / "docs" / name for name in ("architecture.md", "how-to-add.md", "proof.md")),
    *(ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md")),
]
BESIDE = ("t2v_rt.benchmarks.card", "t2v_rt.benchmarks.card_steps")  # scripts that run commands; nobody imports them
READ = (ast.ImportFrom, ast.Import, ast.Constant)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if "://" not in target and not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)
def test_paths_that_guides_name_are_there(page: Path) -> None:
    named = re.findall(r"`([\w./-]+(?:\.(?:py|md|toml|yaml|json)|/))`", page.read_text(encoding="utf-8"))
    elsewhere = {"bundle.json", "utils.py"}
    assert named
    assert [path for path in named if path not in elsewhere and not any(find(path, page))] == []


def find(path: str, page: Path) -> Iterator[Path]:
    """Where a guide's path may be: in the repository, or, in a table of folders, inside one of its line."""
    if (ROOT / path).exists():
        yield ROOT / path
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("| `") and f"`{path}`" in line:
            folder = ROOT / line.split("`")[1]
            if (folder / path).exists():
                yield folder / path


def test_names_that_a_list_tells_to_touch_are_in_the_files_it_names() -> None:
    text = (ROOT / "docs" / "how-to-add.md").read_text(encoding="utf-8")
    items = re.split(r"^\d+\. ", text, flags=re.MULTILINE)[1:]
    checked = 0
    for item in items:
        files = [ROOT / path for path in re.findall(r"`([\w./-]+\.(?:py|md|toml))`", item)]
        words = {word for file in files for word in re.findall(r"\w+", file.read_text(encoding="utf-8"))}
        names = set(re.findall(r"`(_?[A-Za-z]\w*)`", item.partition("\n\n")[0]))
        assert names <= words, item
        checked += len(names)
    assert checked > 50


def drawn() -> tuple[Mapping[str, str], list[tuple[str, str]]]:
    """The floors of the picture, id -> package or module, and its arrows."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    (picture,) = re.findall(r"```mermaid\n(.*?)```", text, re.DOTALL)
    floors = dict(re.findall(r'^ *(\w+)\["([\w.]+):', picture, re.MULTILINE))
    return floors, re.findall(r"^ *(\w+) --> (\w+)$", picture, re.MULTILINE)


def modules() -> dict[str, Path]:
    """Import name -> file of every module."""
    found = {}
    for package, folder in SETUP["package-dir"].items():
        for file in (ROOT / folder).glob("*.py"):
            found[package if file.stem == "__init__" else f"{package}.{file.stem}"] = file
    return found


@cache
def nodes(source: str) -> tuple[ast.AST, ...]:
    """All nodes of a module's source; kept, as many tests look at the same modules."""
    return tuple(node for node in ast.walk(ast.parse(source)) if isinstance(node, READ))


def imports(file: Path, known: Mapping[str, Path]) -> Iterator[str]:
    """The modules of the product that a module imports, wherever in it."""
    for node in nodes(file.read_text(encoding="utf-8")):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in known else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def floor_of(module: str, floors: Mapping[str, str]) -> str | None:
    """The floor that a module is on; None for what is not drawn, such as modules beside the parser."""
    below = [key for key, name in floors.items() if module == name or module.startswith(f"{name}.")]
    deepest = max(below, key=lambda key: len(floors[key]), default=None)
    return None if deepest is not None and floors[deepest] == "t2v_rt" != module else deepest


def reach(start: str, arrows: list[tuple[str, str]]) -> set[str]:
    """All floors that arrows lead to from one."""
    found: set[str] = set()
    queue = [start]
    while queue:
        here = queue.pop()
        following = {below for above, below in arrows if above == here} - found
        found |= following
        queue += following
    return found


def test_imports_go_down_the_arrows_of_the_picture() -> None:
    floors, arrows = drawn()
    known = modules()
    assert [name for name in SETUP["packages"] if floor_of(name, floors) is None] == []
    assert [floor for floor in floors if floor in reach(floor, arrows)] == []
    used = set()
    wrong = []
    assert [name for name in known if name not in BESIDE and {*BESIDE} & {*imports(known[name], known)}] == []
    for module, file in known.items():
        source = floor_of(module, floors)
        if source is None or module in BESIDE:
            continue
        for imported in imports(file, known):
            target = floor_of(imported, floors)
            if target is None or target == source:
                continue
            used.add((source, target))
            if target not in reach(source, arrows):
                wrong.append((module, imported))
    assert wrong == []
    assert [arrow for arrow in arrows if arrow not in used] == []
