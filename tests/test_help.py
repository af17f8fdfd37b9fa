"""Help and docstrings: each line about an option or an argument stands alone, and each option has one."""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from docs.api import MODULES
from t2v_rt.benchmarks.options import BenchOptions
from t2v_rt.build import build_engines
from t2v_rt.build.options import BuildOptions
from t2v_rt.cli import make_parser
from t2v_rt.commands import COMMANDS
from t2v_rt.commands.build_engines import BuildCommand
from t2v_rt.commands.encode import EncodeOptions
from t2v_rt.commands.generate import GenerateOptions
from t2v_rt.commands.plan import PlanOptions
from t2v_rt.commands.verify import VerifyOptions
from t2v_rt.options import options_of, texts_of
from t2v_rt.runtime.options import BackendOptions, CallOptions
from t2v_rt.runtime.pipeline import TextToVideoPipeline
from t2v_rt.runtime.request import CallArrays
from t2v_rt.runtime.run import CallHooks
from tests.test_public_surface import public

ROOT = Path(__file__).resolve().parent.parent
SETUP = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
# what sends the reader of one line to another one
ELSEWHERE = re.compile(
    r"\b(likewise|ditto|as there(?! are)|as (?:above|below|before)|see (?:above|below)|; see there|"
    r"as in the call|those that follow|of the others|as for `\w+`(?=\.|$))",
    re.IGNORECASE,
)
FRAGMENT = re.compile(r"(of|that|which|than|and|or|with|for|by|as|to)\b")  # begins the rest of a sentence
DATACLASSES = (
    *(BuildOptions, BuildCommand, CallOptions, CallArrays, CallHooks, BackendOptions),
    *(GenerateOptions, EncodeOptions, PlanOptions, VerifyOptions, BenchOptions),
)


def helps(command: str) -> Iterator[tuple[str, str]]:
    """The options of a command and their help."""
    (commands,) = make_parser([command])._subparsers._group_actions  # type: ignore[union-attr]
    assert isinstance(commands, argparse._SubParsersAction)
    for action in commands.choices[command]._actions:
        yield " ".join(action.option_strings) or action.dest, action.help or ""


def argument_lines(doc: str) -> Iterator[tuple[str, str]]:
    """Names and texts of a docstring's `Args`."""
    section = re.search(r"^Args:\n((?: .*\n?|\n)*)", inspect.cleandoc(doc), re.MULTILINE)
    for entry in re.finditer(r"^ {4}(\w+): (.*(?:\n {5,}.*)*)", "" if section is None else section[1], re.MULTILINE):
        yield entry[1], " ".join(entry[2].split())


def docstrings() -> Iterator[tuple[str, str]]:
    """All docstrings of public modules, classes and functions, and where they are."""
    for folder in SETUP["package-dir"].values():
        for file in (ROOT / folder).glob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                    yield f"{file.relative_to(ROOT)}:{node.name}", ast.get_docstring(node) or ""


@pytest.mark.parametrize("command", COMMANDS)
def test_each_option_has_a_help_that_stands_alone(command: str) -> None:
    told = dict(helps(command))
    assert len(told) >= 3
    for name, text in told.items():
        assert text, name
        assert not ELSEWHERE.search(text), name
        assert not FRAGMENT.match(text), name
        assert "`" not in text, name


def test_docstrings_send_nobody_elsewhere() -> None:
    found = dict(docstrings())
    assert len(found) > 500
    assert [place for place, text in found.items() if ELSEWHERE.search(text)] == []


@pytest.mark.parametrize("module_name", MODULES)
def test_arguments_of_public_names_stand_alone(module_name: str) -> None:
    seen, wrong = 0, []
    for name, item in public(module_name):
        for argument, text in argument_lines(inspect.getdoc(item) or ""):
            seen += 1
            if ELSEWHERE.search(text) or FRAGMENT.match(text):
                wrong.append(f"{name}({argument}): {text}")
    assert seen
    assert wrong == []


def test_the_words_are_found() -> None:
    for text in ("likewise, as noise levels", "as there.", "as in the call; checked", "of the others", "see above."):
        assert ELSEWHERE.search(text) or FRAGMENT.match(text)
    for text in ("one frame for as many as there are", "one of the other's", "height in pixels"):
        assert not ELSEWHERE.search(text)
        assert not FRAGMENT.match(text)


@pytest.mark.parametrize("options", DATACLASSES)
def test_each_field_is_described_once(options: type) -> None:
    names = [item.name for item in fields(options)]
    assert set(texts_of(options)) == set(names)
    own = [name for base in options.__mro__ for name, _ in argument_lines(base.__dict__.get("__doc__") or "")]
    assert sorted(own) == sorted(set(own))


def test_calls_take_all_options_and_tell_their_texts() -> None:
    pipe = TextToVideoPipeline
    for call, sources in (
        (pipe.__call__, (CallOptions, CallArrays, CallHooks)),
        (pipe.stream, (CallOptions, CallArrays, CallHooks)),
        (build_engines, (BuildOptions,)),
    ):
        parameters = inspect.signature(call).parameters
        texts = dict(argument_lines(call.__doc__ or ""))
        assert list(texts) == [name for name in parameters if name != "self"]
        for source in sources:
            for field in fields(source):
                assert parameters[field.name].default == field.default or field.name == "checkpoint"
                assert texts[field.name] == texts_of(source)[field.name] or (call, field.name) == (
                    pipe.stream,
                    "output_type",
                )


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("build-engines", BuildCommand),
        ("generate", GenerateOptions),
        ("encode", EncodeOptions),
        ("plan", PlanOptions),
        ("verify", VerifyOptions),
        ("bench", BenchOptions),
    ],
)
def test_the_parser_has_each_option_of_the_dataclass(command: str, options: type) -> None:
    told = list(helps(command))
    for field, option in options_of(options):
        name = field.name if option.positional else option.flag or "--" + field.name.replace("_", "-")
        assert [text for found, text in told if found == name], name
