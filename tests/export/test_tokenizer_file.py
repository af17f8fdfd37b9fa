"""The tokenizer of a checkpoint is opened, and held against the text encoder, before a build begins."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from t2v_rt import CheckpointError, build_engines
from t2v_rt.build.dry_run import dry_run
from t2v_rt.build.options import BuildOptions
from t2v_rt.export.tokenizer import SPARE_ROWS, check_tokenizer, read_tokenizer
from tests.conftest import Tiny

TOKENIZER = "tokenizer/tokenizer.json"
Content = dict[str, Any]


@pytest.fixture
def checkpoint(narrow: Tiny, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(narrow.checkpoint, tmp_path / "checkpoint"))


def _edit(change: Callable[[Content], Any]) -> Callable[[bytes], bytes]:
    def spoil(raw: bytes) -> bytes:
        content: Content = json.loads(raw)
        change(content)
        return json.dumps(content).encode()

    return spoil


def _more_words(content: Content) -> None:
    vocabulary = content["model"]["vocab"]
    vocabulary |= {f"word{i}": len(vocabulary) + i for i in range(3)}


BROKEN: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "git-lfs pointer": (
        lambda raw: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 16837417\n",
        "is a git-lfs pointer, not the file that it stands for; fetch that: git lfs pull",
    ),
    "web page": (lambda raw: b"<html><body>Log in</body></html>", "is a web page"),
    "truncated": (lambda raw: raw[: len(raw) // 2], "cannot be read as a tokenizer"),
    "empty": (lambda raw: b"", "is empty"),
    "not text": (lambda raw: b"\xff\x00\xff\x00\xff", "cannot be read"),
    "other json": (lambda raw: b'{"model_max_length": 512}', "cannot be read as a tokenizer"),
    "without a model": (_edit(lambda content: content.pop("model")), "cannot be read as a tokenizer"),
    "one word more than rows": (_edit(_more_words), "tokens, the text encoder's table"),
    "prompts are not closed": (
        _edit(lambda content: content.update(post_processor=None)),
        "closes an empty prompt with nothing, eos_token_id of the text encoder's config is 1",
    ),
    "prompts are closed otherwise": (
        _edit(lambda content: content["post_processor"]["special_tokens"]["</s>"].update(ids=[3])),
        "closes an empty prompt with [3], eos_token_id",
    ),
}


@pytest.mark.parametrize("name", list(BROKEN))
def test_a_broken_tokenizer_is_refused_before_the_build(checkpoint: Path, name: str) -> None:
    spoil, message = BROKEN[name]
    file = checkpoint / TOKENIZER
    file.write_bytes(spoil(file.read_bytes()))
    for run in (
        lambda: dry_run(BuildOptions(checkpoint)),
        lambda: build_engines(checkpoint, checkpoint.parent / "bundle"),
        lambda: build_engines(checkpoint, checkpoint.parent / "bundle", with_text_encoder=False),
    ):
        with pytest.raises(CheckpointError) as error:
            run()
        assert str(error.value).startswith(str(file))
        assert message in str(error.value)
    assert [path.name for path in checkpoint.parent.iterdir()] == ["checkpoint"]


@pytest.mark.filterwarnings("ignore")
def test_a_panic_of_the_library_is_one_error(checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = checkpoint / TOKENIZER
    file.write_bytes(_edit(lambda content: content["post_processor"].update(special_tokens={}))(file.read_bytes()))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read as a tokenizer"):
        build_engines(checkpoint, checkpoint.parent / "bundle")
    capfd.readouterr()  # what Rust itself prints


def test_the_table_may_have_some_rows_that_no_token_uses(narrow: Tiny) -> None:
    file = narrow.checkpoint / TOKENIZER
    text = read_tokenizer(file)
    count = len(json.loads(text)["model"]["vocab"])
    for rows in (count, count + SPARE_ROWS):
        check_tokenizer(text, file, rows, end=1)
    for rows in (count - 1, count + SPARE_ROWS + 1):
        with pytest.raises(CheckpointError, match=f"has {count} tokens, the text encoder's table {rows} rows"):
            check_tokenizer(text, file, rows, end=1)


def test_a_config_names_another_end(checkpoint: Path) -> None:
    config = checkpoint / "text_encoder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "eos_token_id": 7}))
    with pytest.raises(CheckpointError, match=r"closes an empty prompt with \[1\], .* config is 7"):
        build_engines(checkpoint, checkpoint.parent / "bundle")
