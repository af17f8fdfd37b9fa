"""A checkpoint on disk: its parts found and checked before any work begins."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t2v_rt.engines.bundle.store import Stamps
from t2v_rt.errors import CheckpointError
from t2v_rt.export.altering import refuse_quantized
from t2v_rt.export.config import read_json
from t2v_rt.export.found_instead import absent
from t2v_rt.export.tensors import CheckpointWeights
from t2v_rt.export.wan import published as wan_published
from t2v_rt.export.wan.names import files_below, find_single_files, open_single_file

NETWORKS = ("text_encoder", "transformer", "vae")
FOLDERS = (*NETWORKS, "tokenizer", "scheduler")
INDEX = "model_index.json"
TOKENIZER = "tokenizer.json"
Files = Mapping[str, str | Path]


@dataclass(frozen=True)
class CheckpointConfigs:
    """What a checkpoint says of itself.

    Args:
        origin: where it is from, for errors.
        index: `model_index.json`.
        networks: `config.json` of each network.
        scheduler: `scheduler_config.json`.
        generation: `generation_config.json`, empty where there is none.
    """

    origin: str
    index: Mapping[str, Any]
    networks: Mapping[str, Mapping[str, Any]]
    scheduler: Mapping[str, Any]
    generation: Mapping[str, Any]


PUBLISHED = CheckpointConfigs(
    "Wan2.1-T2V-1.3B", wan_published.INDEX, wan_published.CONFIGS, wan_published.SCHEDULER, {}
)


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    Args:
        configs: of its networks.
        weights: tensors of each network.
        tokenizer: path of `tokenizer.json`.
    """

    configs: CheckpointConfigs
    weights: Mapping[str, CheckpointWeights]
    tokenizer: Path

    def digest(self) -> str:
        """One hash over all that an export reads."""
        configs = {name: value for name, value in vars(self.configs).items() if name != "origin"}
        content = {
            "configs": configs,
            "tokenizer": _hashes([self.tokenizer]),
            "weights": {name: _hashes(weights.files) for name, weights in self.weights.items()},
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def encoder_digest(self) -> str:
        """A hash over what decides a prompt's embeddings: the text encoder and its tokenizer."""
        content = {
            "config": self.configs.networks["text_encoder"],
            "tokenizer": _hashes([self.tokenizer]),
            "weights": _hashes(self.weights["text_encoder"].files),
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _hashes(files: Sequence[Path]) -> list[str]:
    """Hashes of files of one folder."""
    stamps = Stamps(files[0].parent)
    result = [stamps.sha256(file.name) for file in files]
    stamps.save()
    return result


def read_configs(folder: Path) -> CheckpointConfigs:
    """Reads the configs of a checkpoint in diffusers layout; raises CheckpointError where one is missing or damaged."""
    index = read_json(folder / INDEX)
    for name in FOLDERS:
        if not (folder / name).is_dir():
            raise CheckpointError(f"{folder}: the folder {name}/ is missing; expected {', '.join(FOLDERS)}")
    networks = {name: read_json(folder / name / "config.json") for name in NETWORKS}
    for name, config in networks.items():
        refuse_quantized(config, f"{folder / name / 'config.json'}")
    generation = folder / "generation_config.json"
    return CheckpointConfigs(
        str(folder),
        index,
        networks,
        read_json(folder / "scheduler" / "scheduler_config.json"),
        read_json(generation) if generation.is_file() else {},
    )


def open_checkpoint(folder: str | Path | None, files: Files | None = None) -> Checkpoint:
    """Opens a checkpoint.

    Args:
        folder: in diffusers layout, with `model_index.json` and a folder per component; or with a single safetensors
            file for each network, in Wan's own names; None where `files` has all.
        files: `transformer`, `vae`, `text_encoder` (single safetensors files) and `tokenizer` (`tokenizer.json` or
            its folder) that take the place of those in the folder.

    Returns:
        The checkpoint, its configs read and the headers of its weight files checked. Without a folder in diffusers
        layout, the configs are those of Wan2.1-T2V-1.3B.

    Raises:
        CheckpointError: a part is missing or damaged, or weights are pickled.
    """
    given = {name: Path(file) for name, file in (files or {}).items()}
    if unknown := sorted(given.keys() - {*NETWORKS, "tokenizer"}):
        raise CheckpointError(f"a file is given for {unknown[0]!r}; expected one of {', '.join(NETWORKS)}, tokenizer")
    if folder is None:
        missing = [name for name in (*NETWORKS, "tokenizer") if name not in given]
        if missing:
            options = ", ".join("--" + name.replace("_", "-") for name in missing)
            raise CheckpointError(f"no checkpoint given; expected a folder, or the missing files too: {options}")
        return _from_files(PUBLISHED, given)
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; expected a checkpoint in diffusers layout")
    if not (folder / INDEX).is_file() and not any((folder / name / "config.json").is_file() for name in NETWORKS):
        return _from_files(PUBLISHED, {**_find_files(folder, given), **given})
    configs = read_configs(folder)
    return _from_files(configs, {"tokenizer": folder / "tokenizer", **given}, folder)


def _find_files(folder: Path, given: Mapping[str, Path]) -> dict[str, Path]:
    found = find_single_files(folder, [name for name in NETWORKS if name not in given])
    tokenizers = [file for file in files_below(folder) if file.name == TOKENIZER]
    if "tokenizer" not in given and len(tokenizers) != 1:
        raise CheckpointError(
            f"{folder}: {len(tokenizers)} files {TOKENIZER}; expected that of the checkpoint "
            "Wan-AI/Wan2.1-T2V-1.3B-Diffusers: name it, --tokenizer FILE"
        )
    return found if "tokenizer" in given else {**found, "tokenizer": tokenizers[0]}


def _from_files(configs: CheckpointConfigs, files: Mapping[str, Path], folder: Path | None = None) -> Checkpoint:
    """The checkpoint of single files and, for networks that have none, of the folders of their names."""
    weights = {}
    for name in NETWORKS:
        if name in files:
            weights[name] = open_single_file(files[name], name)
        else:
            assert folder is not None
            weights[name] = CheckpointWeights.open(folder / name)
    tokenizer = files["tokenizer"]
    tokenizer = tokenizer / TOKENIZER if tokenizer.is_dir() or tokenizer.name != TOKENIZER else tokenizer
    if not tokenizer.is_file():
        raise CheckpointError(
            f"{tokenizer} {absent(tokenizer)}; expected a fast tokenizer: load the tokenizer with transformers and "
            "save it again"
        )
    return Checkpoint(configs, weights, tokenizer)
