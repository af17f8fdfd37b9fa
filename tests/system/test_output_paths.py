"""What a command may write to: nothing is lost that is not its own, and every output is a file of its own."""

from __future__ import annotations

import os
import re
import socket
import stat
import sys
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from t2v_rt import BundleError, RequestError, build_engines
from t2v_rt.cli import main
from t2v_rt.commands.encode import encode
from t2v_rt.commands.plan import write_picture
from t2v_rt.engines.bundle.store import check_replaceable
from t2v_rt.runtime.array_file import load_arrays, save_arrays
from t2v_rt.runtime.video import check_output, open_writer, read_metadata, write_png
from t2v_rt.system.outputs import _is_mounted, check_apart, check_file
from tests.conftest import Tiny

posix = pytest.mark.skipif(os.name != "posix", reason="such files are Unix's")
IMAGE: NDArray[np.uint8] = np.zeros((16, 16, 3), np.uint8)
STAGE = {"name": "encode", "total_bytes": 1, "weights_bytes": 1, "context_bytes": 0, "state_bytes": 0, "io_bytes": 0}


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)  # which must be short


MADE: dict[str, Callable[[Path], object]] = {}
if sys.platform != "win32":
    MADE = {
        "a pipe": os.mkfifo,
        "a socket": make_socket,
        "a device": lambda path: os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3)),
        "a folder": Path.mkdir,
        "a file": Path.touch,
    }
COMMANDS = {  # that write to a name, and what must not be there; the bundle is not there, so no work can have begun
    "video.mp4": (["generate", "a", "--engines", "none", "--output"], ["a folder"]),
    "video.gif": (["generate", "a", "--engines", "none", "--output"], ["a folder"]),
    "frames": (["generate", "a", "--engines", "none", "--output"], ["a file"]),
    "frames.png": (["generate", "a", "--engines", "none", "--output"], ["a file"]),
    "latents.npz": (["generate", "a", "--engines", "none", "--save-latents"], ["a folder"]),
    "sheet.png": (["generate", "a", "--engines", "none", "--output", "v.mp4", "--contact-sheet"], ["a folder"]),
    "preview.png": (["generate", "a", "--engines", "none", "--output", "v.mp4", "--preview"], ["a folder"]),
    "embeds.npz": (["encode", "a", "--engines", "none", "--output"], ["a folder"]),
    "plan.svg": (["plan", "none", "--picture"], ["a folder"]),
    "bundle": (["build-engines", "none", "--output"], ["a file"]),
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: Path | str, **changes: Any) -> None:
    settings: dict[str, Any] = {"fps": 8, "width": 16, "height": 16, "num_frames": 2, "metadata": {"seed": 1}}
    with open_writer(path, **{**settings, **changes}) as writer:
        for _ in range(2):
            writer.write(IMAGE)


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Kind and content of all there is."""

    def entries() -> Iterator[tuple[str, tuple[int, bytes]]]:
        for path in sorted(folder.rglob("*")):
            mode = path.lstat().st_mode
            yield (
                path.relative_to(folder).as_posix(),
                (stat.S_IFMT(mode), path.read_bytes() if stat.S_ISREG(mode) else b""),
            )

    return dict(entries())


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.strip().splitlines()
    assert captured.out == ""
    return line


@posix
@pytest.mark.parametrize("name", list(COMMANDS))
def test_what_is_not_ours_is_never_replaced(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command, more = COMMANDS[name]
    for kind in ("a pipe", "a socket", "a device", *more):
        path = here / kind.split()[1] / name
        path.parent.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(path.parent)
            try:
                MADE[kind](path)
            except PermissionError:  # only the administrator makes devices
                continue
        before = tree(here)
        assert f"is {kind} and not" in refused(capsys, *command, str(path))
        assert tree(here) == before


@posix
def test_where_metadata_goes_counts_too(here: Path) -> None:
    os.mkfifo("a.gif.json")
    os.mkfifo("frames.json")
    for name in ("a.gif", "frames"):
        with pytest.raises(RequestError, match=r"\.json is a pipe and not"):
            check_output(name)
    Path("b.npy.json").write_text('{"a": 1}')  # not as metadata is written: somebody else's
    with pytest.raises(RequestError, match=r"b\.npy\.json was not written here"):
        check_output("b.npy")
    write("c.npy")
    Path("c.npy").unlink()
    write("c.npy")  # over the metadata that was left


def test_a_folder_is_replaced_only_where_nothing_is_lost(here: Path) -> None:
    write("frames")
    before = tree(here)
    write("frames", num_frames=2)
    assert tree(here) == before
    Path("empty").mkdir()
    write("empty")
    spoilt: dict[str, Callable[[Path], object]] = {
        "a stray file": lambda folder: (folder / "frame_of_my_life.png").write_bytes(b"mine"),
        "a folder like a frame": lambda folder: (folder / "frame_00009.png").mkdir(),
        "no metadata": lambda folder: folder.with_name(f"{folder.name}.json").unlink(),
    }
    if os.name == "posix":
        spoilt["a link like a frame"] = lambda folder: (folder / "frame_00009.png").symlink_to("/")
    for name, spoil in spoilt.items():
        write(name)
        spoil(Path(name))
        with pytest.raises(RequestError, match="not a folder of frames that was written here"):
            write(name)
        assert len(list(Path(name).iterdir())) >= 2


def test_a_bundle_is_replaced_only_where_nothing_is_lost(narrow: Tiny, tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    build_engines(narrow.checkpoint, target)
    (target / "video.mp4").write_bytes(b"mine")
    with pytest.raises(BundleError, match=r"holds video\.mp4, which is not of the bundle"):
        build_engines(narrow.checkpoint, target, precision="fp16")
    assert (target / "video.mp4").read_bytes() == b"mine"
    build_engines(narrow.checkpoint, target)  # where nothing is written, nothing is lost
    other = tmp_path / "other"
    other.mkdir()
    (other / "bundle.json").write_text('{"entry": "main.js"}')
    with pytest.raises(BundleError, match=r"no bundle\.json that can be read"):
        check_replaceable(other)


@posix
def test_links_are_written_through(here: Path) -> None:
    (here / "far").mkdir()
    for name in ("a.mp4", "a.gif", "a.npy"):
        (here / "far" / name).write_bytes(b"old")
        (here / name).symlink_to(here / "far" / name)
        write(name)
        assert (here / name).is_symlink()
        assert read_metadata(name) == read_metadata(here / "far" / name) == {"seed": 1}
    (here / "far" / "frames").mkdir()
    (here / "frames").symlink_to("far/frames")
    write("frames")
    assert (here / "frames").is_symlink()
    assert len(list((here / "far" / "frames").iterdir())) == 2
    for name in ("i.png", "l.npz", "p.svg"):
        (here / "far" / name).write_bytes(b"old")
        (here / name).symlink_to(here / "far" / name)
    write_png("i.png", IMAGE)
    save_arrays("l.npz", "latents", {"latents": IMAGE}, {})
    write_picture({"stages": [STAGE], "budget_bytes": None}, "p.svg")
    assert load_arrays("l.npz", "latents", ("latents",), "", dict)[0][0].shape == IMAGE.shape
    for name in ("i.png", "l.npz", "p.svg"):
        assert (here / name).is_symlink()
        assert (here / "far" / name).read_bytes() != b"old"
    assert not list(here.rglob(".*"))
    assert {path.name for path in here.iterdir() if not path.is_symlink()} == {"far"}


@posix
def test_links_that_are_refused(here: Path) -> None:
    Path("dangling.mp4").symlink_to("nowhere.mp4")
    Path("circle.mp4").symlink_to("circle.mp4")
    Path("other.gif").touch()
    Path("suffix.mp4").symlink_to("other.gif")
    os.mkfifo("pipe.mp4")
    Path("topipe.mp4").symlink_to("pipe.mp4")
    before = tree(here)
    for name, message in (
        ("dangling.mp4", "which is not there"),
        ("circle.mp4", "which is not there"),
        ("suffix.mp4", "ends otherwise"),
        ("topipe.mp4", "a link to .* is a pipe"),
    ):
        with pytest.raises(RequestError, match=message):
            check_output(name)
    assert tree(here) == before


def test_names_that_are_none(here: Path) -> None:
    Path("file").touch()
    for name, message in (
        ("-", "none goes to standard output"),
        ("", "no name of its own"),
        (".", "no name of its own"),
        (" a.mp4", "white space"),
        ("a.mp4 ", "unknown video format"),
        ("frames ", "white space"),
        ("file/a.mp4", "a file has that name"),
        ("file/b/a.mp4", "does not exist"),
    ):
        with pytest.raises(RequestError, match=message):
            check_output(name)
    for name in ("a.jpg", "a", "a.png/", "-"):
        with pytest.raises(RequestError, match=r"ends in \.png"):
            check_file(name, ".png", "a contact sheet")
    assert check_file("a.PNG", ".png", "a contact sheet").name == "a.PNG"
    assert [path.name for path in here.iterdir()] == ["file"]


@pytest.mark.skipif(sys.platform != "linux", reason="finds what is mounted in /proc")
def test_what_is_mounted_by_itself_stays(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    assert "/proc" in places
    assert all(_is_mounted(Path(place)) for place in places if "\\" not in place)
    assert not _is_mounted(here)
    Path("a.mp4").touch()
    check_output("a.mp4")
    monkeypatch.setattr("t2v_rt.system.outputs._is_mounted", lambda path: True)
    with pytest.raises(RequestError, match=r"a\.mp4 is mounted there by itself"):
        check_output("a.mp4")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="nothing is protected from the administrator")
def test_what_is_write_protected_stays(here: Path) -> None:
    Path("a.mp4").touch(mode=0o444)
    with pytest.raises(RequestError, match="write-protected"):
        check_output("a.mp4")


GENERATE = ["generate", "a", "--engines", "none"]
CLASHES = {
    "one name": ["--output", "a.png", "--contact-sheet", "a.png"],
    "two spellings": ["--output", "v.mp4", "--contact-sheet", "a.png", "--preview", "./b/../a.png"],
    "upper and lower case": ["--output", "v.mp4", "--contact-sheet", "A.png", "--preview", "a.png"],
    "two forms of a letter": [
        *("--output", "v.mp4", "--contact-sheet", unicodedata.normalize("NFC", "é.png")),
        *("--preview", unicodedata.normalize("NFD", "é.png")),
    ],
    "hard links": ["--output", "v.mp4", "--contact-sheet", "h1.png", "--preview", "h2.png"],
    "a link": ["--output", "v.mp4", "--contact-sheet", "h1.png", "--preview", "l.png"],
    "inside a folder of frames": ["--output", "frames", "--contact-sheet", "frames/a.png"],
}


@posix
@pytest.mark.parametrize("name", list(CLASHES))
def test_every_output_is_a_file_of_its_own(name: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("b").mkdir()
    Path("frames").mkdir()
    Path("h1.png").touch()
    Path("h2.png").hardlink_to("h1.png")
    Path("l.png").symlink_to("h1.png")
    before = tree(here)
    line = refused(capsys, *GENERATE, *CLASHES[name])
    assert "are the same file" in line or "--contact-sheet lies in --output" in line
    assert tree(here) == before


def test_outputs_are_no_inputs(narrow: Tiny, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = str(narrow.bundle)
    save_arrays("x.npz", "latents", {"latents": IMAGE}, {})
    before, inside = tree(here), tree(narrow.bundle)
    reads = "--save-latents would replace .*, which --prompt-embeds reads"
    for arguments, message in (
        (["--prompt-embeds", "x.npz", "--save-latents", "x.npz", "--engines", bundle], reads),
        (["a", "--output", f"{bundle}/a.mp4", "--engines", bundle], "--output lies in the bundle"),
        (["a", "--output", f"{bundle}/vae_decoder/frames", "--engines", bundle], "--output lies in the bundle"),
    ):
        assert re.search(message, refused(capsys, "generate", *arguments))
    assert "--picture lies in the bundle" in refused(capsys, "plan", bundle, "--picture", f"{bundle}/p.svg")
    with pytest.raises(RequestError, match="the output lies in the bundle"):
        encode("a", narrow.bundle / "e.npz", narrow.bundle)
    with pytest.raises(RequestError, match=r"would replace .*, which --engines reads"):
        check_apart({"--output": narrow.bundle.parent.resolve()}, {"--engines": narrow.bundle})
    check_apart({"--output": here.resolve() / "a"}, {"--engines": narrow.bundle, "--from-latents": None, "x": "a/b"})
    assert (tree(here), tree(narrow.bundle)) == (before, inside)
