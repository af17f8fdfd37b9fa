"""Builds the API reference of the public modules from their docstrings, into build/docs, without a network.

`make docs` runs it; it needs the extra `docs` (pdoc).
"""

from __future__ import annotations

import importlib
from pathlib import Path

MODULES = ("t2v_rt", "t2v_rt.runtime.schedulers", "t2v_rt.runtime.noise", "t2v_rt.runtime.video")
FOLDER = Path(__file__).resolve().parent.parent / "build" / "docs"


def main() -> None:
    import pdoc  # here, so that tests can read the list above where it is not installed

    names = []
    for name in MODULES:
        module = importlib.import_module(name)
        for member in module.__all__:  # pdoc does not find those that are imported when they are first asked for
            setattr(module, member, getattr(module, member))
        names += [name, rf"!{name}[.].*"]  # and none of what lies below
    pdoc.render.configure(docformat="google", show_source=False)
    pdoc.pdoc(*names, output_directory=FOLDER)


if __name__ == "__main__":
    main()
