"""Who may import whom: families behind their two registries, floors downwards only, and no circles."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from t2v_rt.export import family as export_border
from t2v_rt.runtime import families as runtime_border
from tests.test_docs import BESIDE, imports, modules, nodes

KNOWN = modules()
REGISTRIES = ("t2v_rt.export.family", "t2v_rt.runtime.families")
# the packages and modules that are a family's own
OWN = {
    *(module.rpartition(".")[0] for module in export_border.FAMILIES.values()),
    *runtime_border.MODULES.values(),
}
FREE = ("t2v_rt.benchmarks",)  # has a table for each family
# what is on a floor -> beginnings of what it must not import; more general ones are in tests/test_docs.py
FORBIDDEN: Mapping[str, tuple[str, ...]] = {
    "t2v_rt.system": (
        *("t2v_rt.engines", "t2v_rt.runtime", "t2v_rt.export", "t2v_rt.build", "t2v_rt.commands", "t2v_rt.cli"),
        "t2v_rt.console",
    ),
    "t2v_rt.engines": ("t2v_rt.runtime", "t2v_rt.export", "t2v_rt.build", "t2v_rt.commands", "t2v_rt.cli"),
    "t2v_rt.runtime": ("t2v_rt.export", "t2v_rt.build", "t2v_rt.commands", "t2v_rt.cli"),
    "t2v_rt.export": (
        *("t2v_rt.runtime", "t2v_rt.build", "t2v_rt.commands", "t2v_rt.cli"),
        *("t2v_rt.engines.backends", "t2v_rt.engines.onnxruntime", "t2v_rt.engines.tensorrt"),
    ),
}


def within(module: str, place: str) -> bool:
    return module == place or module.startswith(f"{place}.")


def family_imports(files: Mapping[str, Path]) -> list[tuple[str, str]]:
    """Imports of a family's modules, and strings that name one, by others than the family and the registries."""
    found = []
    for module, file in files.items():
        if module.startswith(FREE):
            continue
        named = set(imports(file, {**KNOWN, **files}))
        if module not in REGISTRIES:
            source = nodes(file.read_text(encoding="utf-8"))
            named |= {node.value for node in source if isinstance(node, ast.Constant) and node.value in KNOWN}
        for target in sorted(map(str, named)):
            own = next((place for place in OWN if within(target, place)), None)
            if own is not None and not within(module, own):
                found.append((module, target))
    return found


def imports_upwards(files: Mapping[str, Path]) -> list[tuple[str, str]]:
    """Imports that `FORBIDDEN` forbids."""
    return [
        (module, target)
        for module, file in files.items()
        for floor, forbidden in FORBIDDEN.items()
        if within(module, floor)
        for target in sorted(set(imports(file, {**KNOWN, **files})))
        if any(within(target, place) for place in forbidden)
    ]


def circle(arrows: Mapping[str, set[str]]) -> list[str]:
    """Some way that leads round, or none."""
    done: set[str] = set()

    def walk(path: list[str]) -> Iterator[list[str]]:
        for target in sorted(arrows.get(path[-1], ())):
            if target in path:
                yield path[path.index(target) :]
            elif target not in done:
                yield from walk([*path, target])
        done.add(path[-1])

    return next((found for start in sorted(arrows) if start not in done for found in walk([start])), [])


def arrows_between(files: Mapping[str, Path], depth: int) -> dict[str, set[str]]:
    """Import arrows between modules, whose names are cut to so many words; all imports count, wherever they are."""

    def cut(module: str) -> str:
        return ".".join(module.split(".")[:depth])

    arrows: dict[str, set[str]] = {}
    for module, file in files.items():
        targets = {cut(target) for target in imports(file, {**KNOWN, **files}) if target in KNOWN or target in files}
        arrows.setdefault(cut(module), set()).update(targets - {cut(module)})
    return arrows


def test_only_a_family_and_the_registries_name_it() -> None:
    assert len(OWN) == len(export_border.FAMILIES) + len(runtime_border.MODULES)
    assert all(place in KNOWN for place in OWN)
    assert family_imports(KNOWN) == []


def test_the_registries_name_what_is_there() -> None:
    for module in export_border.FAMILIES.values():
        family: export_border.Family = importlib.import_module(module).FAMILY
        assert export_border.TEXT_ENCODER in family.networks
    for module in runtime_border.MODULES.values():
        assert importlib.import_module(module).FAMILY.text is not None
    assert len(export_border.families()) == len(export_border.FAMILIES)


def test_floors_import_downwards() -> None:
    assert all(any(within(module, floor) for module in KNOWN) for floor in FORBIDDEN)
    assert imports_upwards(KNOWN) == []


@pytest.mark.parametrize("depth", [2, 9], ids=["folders", "modules"])
def test_no_imports_lead_round(depth: int) -> None:
    assert circle(arrows_between({name: file for name, file in KNOWN.items() if name not in BESIDE}, depth)) == []


def test_imports_name_whole_paths() -> None:
    """What the tests here read: a relative import would pass them by."""
    for file in KNOWN.values():
        source = nodes(file.read_text(encoding="utf-8"))
        assert all(node.level == 0 for node in source if isinstance(node, ast.ImportFrom)), file


MADE_UP: dict[str, tuple[str, str, tuple[str, str]]] = {
    "a family in a build": (
        "t2v_rt.build.extra",
        "def f():\n    from t2v_rt.export.wan import family\n",
        ("t2v_rt.build.extra", "t2v_rt.export.wan.family"),
    ),
    "a family's network in the exporter": (
        "t2v_rt.export.extra",
        "from t2v_rt.export.wan.vae import VaeConfig\n",
        ("t2v_rt.export.extra", "t2v_rt.export.wan.vae"),
    ),
    "a family at run time": (
        "t2v_rt.runtime.extra",
        "import t2v_rt.runtime.families.wan\n",
        ("t2v_rt.runtime.extra", "t2v_rt.runtime.families.wan"),
    ),
    "a family by its name": (
        "t2v_rt.commands.extra",
        "import importlib\nm = importlib.import_module('t2v_rt.export.wan.names')\n",
        ("t2v_rt.commands.extra", "t2v_rt.export.wan.names"),
    ),
    "a family of the exporter in that of the runtime": (
        "t2v_rt.runtime.families.wan.extra",
        "from t2v_rt.export.wan import published\n",
        ("t2v_rt.runtime.families.wan.extra", "t2v_rt.export.wan.published"),
    ),
}


@pytest.mark.parametrize("name", list(MADE_UP))
def test_a_made_up_import_is_found(name: str, tmp_path: Path) -> None:
    module, source, expected = MADE_UP[name]
    file = tmp_path / "extra.py"
    file.write_text(source, encoding="utf-8")
    assert family_imports({**KNOWN, module: file}) == [expected]


def test_a_made_up_import_upwards_is_found(tmp_path: Path) -> None:
    file = tmp_path / "extra.py"
    for floor, forbidden in FORBIDDEN.items():
        for target in forbidden:
            file.write_text(f"def f():\n    import {target}\n", encoding="utf-8")
            assert imports_upwards({**KNOWN, f"{floor}.extra": file}) == [(f"{floor}.extra", target)]


def test_a_made_up_circle_is_found(tmp_path: Path) -> None:
    file = tmp_path / "extra.py"
    file.write_text("if True:\n    from t2v_rt.build.job import BuildJob\n", encoding="utf-8")
    assert circle(arrows_between({**KNOWN, "t2v_rt.export.components": file}, 9)) != []
    assert circle(arrows_between({**KNOWN, "t2v_rt.export.components": file}, 2)) == ["t2v_rt.build", "t2v_rt.export"]
