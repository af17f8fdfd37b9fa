"""What is printed: text that a stream cannot spell, streams that are not there, and results that nobody takes."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from t2v_rt import RequestError, TextToVideoPipeline, console
from t2v_rt.cli import main
from t2v_rt.commands.bars import Bars
from t2v_rt.runtime.prompts.tokenizer import check_text
from t2v_rt.runtime.video import read_metadata
from tests.conftest import Tiny

PROMPT = "一个红色的球 \U0001f534"
ENCODINGS = ("ascii", "cp1252", "cp936", "utf-8")
posix = pytest.mark.skipif(os.name != "posix", reason="closes streams as Unix shells do")


class Console:
    """Stands in for standard output and error: TextIOWrappers of an encoding over bytes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
        self.out, self.err = io.BytesIO(), io.BytesIO()
        self.encoding = encoding
        self.streams = [io.TextIOWrapper(target, encoding=encoding) for target in (self.out, self.err)]
        for name, stream in zip(("stdout", "stderr"), self.streams, strict=True):
            monkeypatch.setattr(sys, name, stream)

    def run(self, *arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        for stream in self.streams:
            stream.flush()
        return code, self.out.getvalue().decode(self.encoding), self.err.getvalue().decode(self.encoding)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_text_that_cannot_be_spelled(
    narrow: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    output, engines = tmp_path / "视频\U0001f3ac.gif", ("--engines", str(narrow.bundle), "--num-inference-steps", "1")
    with monkeypatch.context() as patch:
        code, out, err = Console(patch, encoding).run("generate", PROMPT, *engines, "--output", str(output))
    assert (code, err) == (0, "")
    assert out.splitlines()[0].startswith("output   ")
    assert encoding != "utf-8" or str(output) in out
    assert read_metadata(output)["prompt"] == PROMPT
    assert PROMPT in (tmp_path / f"{output.name}.json").read_text(encoding="utf-8")  # files are UTF-8 all the same
    with monkeypatch.context() as patch:
        code, out, err = Console(patch, encoding).run(
            "generate", "a", "--engines", "模型\U0001f534", "--output", "a.mp4"
        )
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert "no bundle.json there" in err
    with monkeypatch.context() as patch:
        code, out, err = Console(patch, encoding).run(
            "encode", PROMPT, "--engines", str(narrow.bundle), "--output", str(tmp_path / "嵌.npz"), "--json"
        )
    assert (code, err) == (0, "")
    assert out.isascii()
    assert json.loads(out)["prompt"] == PROMPT


@pytest.mark.parametrize("command", ["", "generate", "build-engines", "plan"])
def test_help_can_always_be_printed(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    with monkeypatch.context() as patch:
        printed = Console(patch, "ascii")
        with pytest.raises(SystemExit) as stop:
            main([*command.split(), "--help"])
        sys.stdout.flush()
    assert stop.value.code == 0
    assert b"example: t2v-rt" in printed.out.getvalue()


class Plain:
    """A stream that is none of Python's own, as programs with windows put in the place of one; takes ASCII only."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        text.encode("ascii")
        self.text += text
        return len(text)


def test_streams_of_other_kinds(narrow: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["inspect", str(narrow.bundle)]
    out, err = Plain(), Plain()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        assert main(arguments) == 0
        assert main([*arguments, "--json"]) == 0
        assert main(["inspect", "模型"]) == 2
        with Bars() as bars:
            bars.update("decode", 1, 2)
    assert out.text.startswith("bundle ")
    assert "\\u6a21\\u578b: no bundle.json" in err.text
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        patch.setattr(sys, "stderr", None)
        assert main(arguments) == 0
        assert main([*arguments, "--json"]) == 1
        assert main(["inspect", "none"]) == 2
        with Bars() as bars:
            bars.update("decode", 1, 2)


def test_only_the_command_line_touches_streams(narrow: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        Console(patch, "ascii")
        TextToVideoPipeline.from_pretrained(narrow.bundle)("a ball", num_inference_steps=1)
        assert sys.stdout.errors == "strict"
        console.prepare_streams()
        assert sys.stdout.errors == "backslashreplace"


def shell(line: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A line for the shell, in which "$@" is the program with arguments; streams are buffered as they usually are."""
    variables = {**os.environ, **environment}
    variables.pop("PYTHONUNBUFFERED", None)
    command = ["sh", "-c", line, "sh", sys.executable, "-m", "t2v_rt", *arguments]
    return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, env=variables)


@pytest.mark.slow
@posix
def test_closed_and_full_streams_of_a_process(narrow: Tiny, tmp_path: Path) -> None:
    inspect = ("inspect", str(narrow.bundle))
    for line, arguments, code, error in (
        ('"$@" 2>&-', inspect, 0, ""),
        ('"$@" >&- 2>&- <&-', inspect, 0, ""),
        ('"$@" >&-', (*inspect, "--json"), 1, "standard output is closed"),
        ('{ "$@"; echo $? >&2; } | true', (*inspect, "--json"), 0, "1\n"),
    ):
        done = shell(line, *arguments)
        assert done.returncode == code, line
        assert error in done.stderr
        assert "Traceback" not in done.stderr
        assert "Exception ignored" not in done.stderr
    if Path("/dev/full").exists():
        done = shell('"$@" >/dev/full', *inspect)
        assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
        assert "the result cannot be printed" in done.stderr
        assert shell('"$@" 2>/dev/full', "inspect", "none").returncode == 2


@posix
def test_what_native_code_prints_goes_into_no_file(tmp_path: Path) -> None:
    code = "import os; from t2v_rt import console; console.prepare_streams(); print(open(os.devnull).fileno())"
    command = ["sh", "-c", f"exec {sys.executable} -c '{code}' 0<&- 2>&-"]
    assert int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) > 2


@pytest.mark.skipif(sys.platform != "linux", reason="has another encoding of arguments")
def test_a_locale_without_the_characters(narrow: Tiny, tmp_path: Path) -> None:
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    output = tmp_path / "视频.npy"
    command = ("--engines", str(narrow.bundle), "--num-inference-steps", "1", "--output", str(output))
    done = shell('"$@"', "generate", PROMPT, *command, **plain)
    assert done.returncode == 2
    assert done.stderr.startswith(
        "t2v-rt: error: PROMPT has characters that the locale 'C' (ascii) cannot read; set LC_ALL"
    )
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())
    linked = tmp_path / "模型"
    linked.symlink_to(narrow.bundle)
    command = ("--engines", str(linked), "--num-inference-steps", "1", "--output", str(output))
    done = shell('"$@"', "generate", "a ball", *command, "--json", **plain)
    assert done.returncode == 0, done.stderr
    assert os.fsencode(json.loads(done.stdout)["output"]) == os.fsencode(output)
    assert output.is_file()


def test_text_that_is_none(pipe: TextToVideoPipeline) -> None:
    check_text("prompt", None)
    check_text("prompt", PROMPT)
    for text, message in (("a\udce4", "not UTF-8|locale"), ("a\ud83d", r"half a character \('\\ud83d' at 1\)")):
        with pytest.raises(RequestError, match=message):
            pipe(text, num_inference_steps=1)
        with pytest.raises(RequestError, match=message):
            pipe("a ball", negative_prompt=[text], num_inference_steps=1)
        with pytest.raises(RequestError, match=message):
            pipe.encode_prompt([text])
