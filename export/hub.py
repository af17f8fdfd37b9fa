"""Checkpoints of the Hugging Face hub: only the files that are needed, into huggingface_hub's own cache."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from t2v_rt.errors import CheckpointError, InputError, RequestError
from t2v_rt.export.checkpoint import TOKENIZER, read_configs
from t2v_rt.export.config import INDEX, read_json
from t2v_rt.export.family import Family, family_of, networks_of
from t2v_rt.export.weight_names import PICKLED, choose_weights
from t2v_rt.system.files import free_disk_bytes, is_terminal

logger = logging.getLogger(__name__)
NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
CONFIGS = (INDEX, "generation_config.json", "scheduler/scheduler_config.json")


def is_hub_name(source: str | Path) -> bool:
    """Whether `source` is no folder here and has the form `owner/name`."""
    return not Path(source).exists() and NAME.fullmatch(str(source)) is not None


def fetch(repository: str, revision: str | None = None, *, download: bool = True) -> Path:
    """Brings a checkpoint in diffusers layout to this machine, or finds it in the cache.

    Configs come first, so that a model of another architecture is refused before its weights are downloaded.

    Args:
        repository: `owner/name`.
        revision: branch, tag or commit; None for the main branch.
        download: False looks in the cache only.

    Returns:
        Its folder in the cache.

    Raises:
        InputError: huggingface_hub is not installed.
        CheckpointError: no such repository or revision, no access to it, no network and nothing in the cache, or not a
            checkpoint that can be exported.
        RequestError: its files do not fit the disk.
    """
    try:
        import huggingface_hub
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError as exc:
        raise InputError(
            f"{repository} is not a folder here; to take it from the Hugging Face hub, install t2v-rt[hub]"
        ) from exc
    if not is_terminal(sys.stderr):  # its bars are for a person, as ours are
        huggingface_hub.utils.disable_progress_bars()
    if not download:
        return _from_cache(huggingface_hub, repository, revision, "nothing is downloaded for an estimate")
    sizes = _list_files(huggingface_hub, repository, revision)
    if sizes is None:
        folder = _from_cache(huggingface_hub, repository, revision, "the hub does not answer")
        logger.warning("the hub does not answer; %s is taken from the cache, %s", repository, folder)
        return folder
    if INDEX not in sizes:
        raise CheckpointError(f"{repository} has no {INDEX}; expected a checkpoint in diffusers layout")
    index = _download(huggingface_hub, repository, revision, [INDEX]) / INDEX
    family = family_of(read_json(index), repository)
    weights = needed_weights(repository, sizes, family)
    small = [*CONFIGS, *(f"{name}/config.json" for name in networks_of(family))]
    small += needed_tokenizer(repository, sizes, family)
    folder = _download(huggingface_hub, repository, revision, small)
    family.read_configs(read_configs(folder))
    _check_disk(repository, {name: sizes[name] for name in weights if not (folder / name).is_file()})
    return _download(huggingface_hub, repository, revision, [*small, *weights])


def needed_tokenizer(repository: str, names: Iterable[str], family: Family) -> list[str]:
    """The files of the tokenizer among a repository's.

    Raises:
        CheckpointError: one is not there.
    """
    have = set(names)
    choices = [[f"{TOKENIZER}/{name}" for name in choice] for choice in family.tokenizers]
    found = next((choice for choice in choices if have.issuperset(choice)), None)
    if found is None:
        missing = next(name for name in choices[0] if name not in have)
        raise CheckpointError(f"{repository} has no {missing}; expected a checkpoint in diffusers layout")
    return found


def needed_weights(repository: str, names: Iterable[str], family: Family) -> list[str]:
    """The weights among a repository's files, and the indexes of their shards.

    Raises:
        CheckpointError: a network has none that can be read.
    """
    have = set(names)
    needed = []
    for network in networks_of(family):
        files = [name.partition("/")[2] for name in have if name.startswith(f"{network}/")]
        chosen = choose_weights(files, f"{repository}/{network}")
        if chosen is None:
            pickles = any(PICKLED.fullmatch(name) for name in files)
            found = "only pickled weights, which can run code when loaded" if pickles else "no weights"
            raise CheckpointError(f"{repository}: {network}/ has {found}; expected .safetensors: choose another")
        needed += [f"{network}/{name}" for name in (*chosen.files, chosen.index) if name]
    return needed


def _list_files(hub: Any, repository: str, revision: str | None) -> Mapping[str, int] | None:
    """Name -> bytes of a repository's files; None where the hub does not answer."""
    try:
        info = hub.HfApi().model_info(repository, revision=revision, files_metadata=True)
    except hub.errors.GatedRepoError as exc:
        raise CheckpointError(
            f"{repository} is gated: accept its terms on its page and log in with `hf auth login`"
        ) from exc
    except hub.errors.RepositoryNotFoundError as exc:
        raise CheckpointError(
            f"{repository} is neither a folder here nor a repository of the hub; for a private one, log in with "
            "`hf auth login`"
        ) from exc
    except hub.errors.RevisionNotFoundError as exc:
        raise CheckpointError(f"{repository} has no revision {revision!r}; expected a branch, tag or commit") from exc
    except Exception as exc:  # the HTTP library's own errors, which differ between versions of huggingface_hub
        logger.info("the hub does not answer: %s: %s", type(exc).__name__, exc)
        return None
    return {file.rfilename: file.size or 0 for file in info.siblings or ()}


def _from_cache(hub: Any, repository: str, revision: str | None, reason: str) -> Path:
    try:  # what of it is missing, the opening tells; the cache would miss files that nobody needs, too
        return Path(hub.snapshot_download(repository, revision=revision, local_files_only=True, allow_patterns=INDEX))
    except hub.errors.LocalEntryNotFoundError as exc:
        raise CheckpointError(
            f"{repository} is not a folder here, {reason}, and it is not in the hub's cache; connect to the "
            "network, or give a folder"
        ) from exc


def _download(hub: Any, repository: str, revision: str | None, names: Iterable[str]) -> Path:
    try:
        return Path(hub.snapshot_download(repository, revision=revision, allow_patterns=list(names)))
    except Exception as exc:  # as above
        raise CheckpointError(
            f"{repository}: the download broke off ({type(exc).__name__}); run the command again, it continues"
        ) from exc


def _check_disk(repository: str, sizes: Mapping[str, int]) -> None:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    needed, free = sum(sizes.values()), free_disk_bytes(cache)
    if needed > free:
        raise RequestError(
            f"{repository}: {needed / 1e9:.3g} GB are to be downloaded, {free / 1e9:.3g} GB are free at {cache}; make "
            "room, or set HF_HOME to a larger disk"
        )
