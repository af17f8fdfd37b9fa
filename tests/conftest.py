"""Checkpoints and bundles that many tests share; made once a session, never changed by a test."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from t2v_rt import TextToVideoPipeline, build_engines

if TYPE_CHECKING:
    from tests.checkpoints import TinyWan


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Hash stamps go to a folder of the session, not to the user's cache."""
    old = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if old is None:
        del os.environ["XDG_CACHE_HOME"]
    else:
        os.environ["XDG_CACHE_HOME"] = old


@dataclass(frozen=True)
class Tiny:
    """A random tiny checkpoint, its bundle, and diffusers' pipeline on it."""

    config: TinyWan
    checkpoint: Path
    bundle: Path
    reference: Any


def make_tiny(config: TinyWan, folder: Path) -> Tiny:
    from tests.checkpoints import load_reference, make_checkpoint

    logging.getLogger("diffusers").setLevel(logging.ERROR)
    with warnings.catch_warnings():  # diffusers' and transformers' own, on import and load
        warnings.simplefilter("ignore")
        checkpoint = make_checkpoint(config, folder / config.name)
        reference = load_reference(checkpoint)
    bundle = folder / f"{config.name}-bundle"
    build_engines(checkpoint, bundle)
    return Tiny(config, checkpoint, bundle, reference)


@pytest.fixture(scope="session", params=["narrow", "one-head", "deep"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Each of three configurations that differ in depth, heads, head size, VAE width and text width."""
    from tests.checkpoints import TINY

    config = next(config for config in TINY if config.name == request.param)
    return make_tiny(config, tmp_path_factory.mktemp(config.name))


@pytest.fixture(scope="session")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """One tiny checkpoint, where the configuration does not matter."""
    from tests.checkpoints import TINY

    return make_tiny(TINY[0], tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="session")
def pipe(narrow: Tiny) -> TextToVideoPipeline:
    """A pipeline on the shared bundle; tests give it back as they found it."""
    return TextToVideoPipeline.from_pretrained(narrow.bundle)
