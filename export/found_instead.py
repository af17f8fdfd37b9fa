"""What a file is that is not what its name says: told by its first bytes, so that a user learns what to do about it."""

from __future__ import annotations

import re
from pathlib import Path

HEAD = 512  # bytes that tell
SHOWN = 40  # characters of a text, in an error
APPLE_DOUBLE = "._"  # begins the names of macOS's own notes on files, left where it copied to other disks
NETWORK = "expected the network as .safetensors in fp16, bf16 or fp32"
KINDS: tuple[tuple[re.Pattern[bytes], str], ...] = tuple(
    (re.compile(pattern, re.DOTALL | re.IGNORECASE), meaning)
    for pattern, meaning in (
        (rb"GGUF", f"is a GGUF file, whose weights are quantized; {NETWORK}"),
        (
            rb"version https://(git-lfs|hawser)\.github\.com",
            "is a git-lfs pointer, not the file that it stands for; fetch that: git lfs pull",
        ),
        (rb"/?(\.\./)*(\.git/)?annex/objects/", "is a git-annex pointer, not the file; fetch that: git annex get"),
        (
            rb"\s*(<!doctype html|<html|<\?xml|<!--)",
            "is a web page, saved in place of the file; download the file itself, logged in where the page asks for it",
        ),
        (rb"PK\x03\x04", f"is a zip archive, as pickles of PyTorch are, which can run code when loaded; {NETWORK}"),
        (rb"\x80[\x02-\x05][c\x8a\x95}\](]", f"is a pickle, which can run code when it is loaded; {NETWORK}"),
        (rb"\x00\x05\x16\x07", "is an AppleDouble file, macOS's notes on another; take the file itself"),
    )
)


def found_instead(file: Path) -> str | None:
    """What a file is that could not be read as what it should be.

    Args:
        file: a regular file.

    Returns:
        The rest of a sentence that begins with its name, with what to do; None where its first bytes tell nothing.
    """
    with file.open("rb") as stream:
        head = stream.read(HEAD)
    if not head:
        return "is empty; download it again"
    start = head.removeprefix(b"\xef\xbb\xbf")
    return next((meaning for pattern, meaning in KINDS if pattern.match(start)), None)


def text_instead(file: Path) -> str | None:
    """What was found in the place of a file that should be no text: a text, such as a server answers."""
    with file.open("rb") as stream:
        head = stream.read(HEAD)
    try:
        text = head[:SHOWN].decode("ascii").strip()
    except UnicodeDecodeError:
        return None
    return f"is a text that begins {text!r}; download the file itself again" if text.isprintable() else None


def absent(file: Path) -> str:
    """What was found in the place of a regular file."""
    if file.is_symlink() and not file.exists():
        return f"is a link to {file.readlink()}, which is not there; download the file again"
    return "is missing" if not file.exists() else "is not a file"
