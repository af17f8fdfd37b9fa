"""The checkpoint's tokenizer: opened, and held against the text encoder, before it is built in."""

from __future__ import annotations

import json
from pathlib import Path

from t2v_rt.errors import CheckpointError
from t2v_rt.export.found_instead import found_instead

# A table may have rows that no token uses: sizes are padded for the hardware, and UMT5's file names 384 more than the
# pieces that it was trained with. Another model's tokenizer lacks tens of thousands.
SPARE_ROWS = 1024


def read_tokenizer(path: Path) -> str:
    """The text of a `tokenizer.json`, without a byte order mark; raises CheckpointError where it cannot be read."""
    try:
        raw = path.read_bytes()
        return raw.decode(json.detect_encoding(raw))
    except OSError as exc:
        raise CheckpointError(f"{path} cannot be read ({exc.strerror}); check its rights and its disk") from exc
    except ValueError as exc:
        raise CheckpointError(f"{path} cannot be read as text ({exc}); download it again") from exc


def check_tokenizer(text: str, path: Path, rows: int, end: int) -> None:
    """Opens a tokenizer and holds it against the text encoder.

    Args:
        text: of a `tokenizer.json`.
        path: of the file that it is from, for errors.
        rows: of the text encoder's table of token embeddings.
        end: the token that closes every prompt.

    Raises:
        CheckpointError: it cannot be opened, gives tokens that the table has no row for or lacks so many that it is
            another model's, or does not close prompts as the text encoder was trained.
    """
    from tokenizers import Tokenizer  # takes long to import, and only building needs it here

    try:
        tokenizer = Tokenizer.from_str(text)
        count = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        last = tokenizer.encode("").ids[-1:]
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as exc:  # tokenizers raises bare Exception, and where its Rust code panics not even that
        if (instead := found_instead(path)) is not None:
            raise CheckpointError(f"{path} {instead}") from exc
        raise CheckpointError(f"{path} cannot be read as a tokenizer ({exc}); download it again") from exc
    if not rows - SPARE_ROWS <= count <= rows:
        raise CheckpointError(
            f"{path} has {count} tokens, the text encoder's table {rows} rows; they do not belong together: take the "
            "tokenizer of the text encoder's own checkpoint"
        )
    if last != [end]:
        raise CheckpointError(
            f"{path} closes an empty prompt with {last or 'nothing'}, eos_token_id of the text encoder's config is "
            f"{end}; take the tokenizer of the text encoder's own checkpoint"
        )
