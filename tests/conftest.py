"""Checkpoints and bundles that many tests share, made once a session and changed by no test; marks of tests."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import pytest

from t2v_rt import TextToVideoPipeline, build_engines
from t2v_rt.engines.bundle.store import Bundle
from tests.support.checkpoints import TINY, TinyWan, load_reference, make_checkpoint
from tests.support.marks import needs_reference, refuse_reference

ONE_EACH = "1MB"  # a budget that leaves room for one block of a tiny text encoder only


def without_reference(config: pytest.Config) -> bool:
    return re.search(r"\bnot reference\b", config.option.markexpr) is not None


def pytest_configure(config: pytest.Config) -> None:
    if without_reference(config):
        refuse_reference()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Files that need the reference are not even imported where it is left out."""
    if collection_path.suffix == ".py" and without_reference(config) and needs_reference(collection_path):
        return True
    return None  # as pytest would decide


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if needs_reference(item.path):
            item.add_marker("reference")


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


@pytest.fixture(scope="session")
def make_tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[TinyWan], Tiny]:
    """Each configuration is made once, however often tests come back to it."""
    folder = tmp_path_factory.mktemp("tiny")

    @cache
    def make(config: TinyWan) -> Tiny:
        checkpoint = make_checkpoint(config, folder / config.name)
        bundle = build_engines(checkpoint, folder / f"{config.name}-bundle")
        return Tiny(config, checkpoint, bundle.folder)

    return make


@pytest.fixture(scope="session", params=TINY, ids=lambda config: config.name)
def tiny(request: pytest.FixtureRequest, make_tiny: Callable[[TinyWan], Tiny]) -> Tiny:
    """Each of three configurations that differ in depth, heads, head size, VAE width and text width."""
    return make_tiny(request.param)


@pytest.fixture(scope="session")
def narrow(make_tiny: Callable[[TinyWan], Tiny]) -> Tiny:
    """One tiny checkpoint, where the configuration does not matter."""
    return make_tiny(TINY[0])


@pytest.fixture(scope="session")
def make_sharded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Tiny], Bundle]:
    folder = tmp_path_factory.mktemp("sharded")
    return cache(lambda tiny: build_engines(tiny.checkpoint, folder / tiny.config.name, vram_budget=ONE_EACH))


@pytest.fixture(scope="session")
def sharded(tiny: Tiny, make_sharded: Callable[[Tiny], Bundle]) -> Bundle:
    """A bundle whose text encoder has an engine for each block."""
    return make_sharded(tiny)


@pytest.fixture(scope="session")
def plans(narrow: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The shared checkpoint, as plans for all GPUs."""
    pytest.importorskip("tensorrt_rtx", reason="needs t2v-rt[tensorrt-rtx]")
    return build_engines(narrow.checkpoint, tmp_path_factory.mktemp("plans") / "bundle", backend="tensorrt-rtx")


@pytest.fixture(scope="session")
def pipe(narrow: Tiny) -> TextToVideoPipeline:
    """A pipeline on the shared bundle; tests give it back as they found it."""
    return TextToVideoPipeline.from_pretrained(narrow.bundle)
