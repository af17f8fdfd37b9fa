"""Checkpoints and bundles that many tests share; made once a session, never changed by a test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from t2v_rt import TextToVideoPipeline, build_engines
from tests.checkpoints import TINY, TinyWan, load_reference, make_checkpoint


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
    """A random tiny checkpoint and its bundle."""

    config: TinyWan
    checkpoint: Path
    bundle: Path

    @cached_property
    def reference(self) -> Any:
        """Diffusers' pipeline on the checkpoint."""
        return load_reference(self.checkpoint)


def make_tiny(config: TinyWan, folder: Path) -> Tiny:
    checkpoint, bundle = folder / config.name, folder / f"{config.name}-bundle"
    make_checkpoint(config, checkpoint)
    build_engines(checkpoint, bundle)
    return Tiny(config, checkpoint, bundle)


@pytest.fixture(scope="session", params=TINY, ids=lambda config: config.name)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Each of three configurations that differ in depth, heads, head size, VAE width and text width."""
    return make_tiny(request.param, tmp_path_factory.mktemp(request.param.name))


@pytest.fixture(scope="session")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """One tiny checkpoint, where the configuration does not matter."""
    return make_tiny(TINY[0], tmp_path_factory.mktemp("shared"))


@pytest.fixture(scope="session")
def pipe(narrow: Tiny) -> TextToVideoPipeline:
    """A pipeline on the shared bundle; tests give it back as they found it."""
    return TextToVideoPipeline.from_pretrained(narrow.bundle)
