"""A diffusers-layout checkpoint on disk: its parts found and checked before any work begins."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t2v_rt.engines.bundle import Stamps
from t2v_rt.errors import CheckpointError
from t2v_rt.export.config import read_json
from t2v_rt.export.weights import CheckpointWeights

NETWORKS = ("text_encoder", "transformer", "vae")
FOLDERS = (*NETWORKS, "tokenizer", "scheduler")


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    Args:
        folder: of the checkpoint.
        pipeline: class name in `model_index.json`.
        configs: `config.json` of each network.
        weights: tensors of each network.
        scheduler: `scheduler_config.json`.
        tokenizer: path of `tokenizer.json`.
        generation: `generation_config.json`, empty where there is none.
    """

    folder: Path
    pipeline: str
    configs: Mapping[str, Mapping[str, Any]]
    weights: Mapping[str, CheckpointWeights]
    scheduler: Mapping[str, Any]
    tokenizer: Path
    generation: Mapping[str, Any]

    def digest(self) -> str:
        """One hash over the content of every file that an export reads."""
        stamps = Stamps(self.folder)
        files = [self.tokenizer, *(file for weights in self.weights.values() for file in weights.files)]
        files += [self.folder / name / "config.json" for name in NETWORKS]
        files += [self.folder / "scheduler" / "scheduler_config.json", self.folder / "model_index.json"]
        files += [path for path in [self.folder / "generation_config.json"] if path.is_file()]
        names = sorted(file.relative_to(self.folder).as_posix() for file in files)
        result = hashlib.sha256("".join(f"{name} {stamps.sha256(name)}\n" for name in names).encode())
        stamps.save()
        return result.hexdigest()


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Opens a checkpoint in diffusers layout.

    Args:
        folder: holds `model_index.json` and a folder per component.

    Returns:
        The checkpoint, its configs read and the headers of its weight files checked.

    Raises:
        CheckpointError: a part is missing or damaged, or weights are pickled.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; expected a checkpoint in diffusers layout")
    index = read_json(folder / "model_index.json")
    for name in FOLDERS:
        if not (folder / name).is_dir():
            raise CheckpointError(f"{folder}: the folder {name}/ is missing; expected {', '.join(FOLDERS)}")
    tokenizer = folder / "tokenizer" / "tokenizer.json"
    if not tokenizer.is_file():
        raise CheckpointError(
            f"{tokenizer} is missing; expected a fast tokenizer: load the tokenizer with transformers and save it again"
        )
    generation = folder / "generation_config.json"
    return Checkpoint(
        folder=folder,
        pipeline=str(index.get("_class_name")),
        configs={name: read_json(folder / name / "config.json") for name in NETWORKS},
        weights={name: CheckpointWeights(folder / name) for name in NETWORKS},
        scheduler=read_json(folder / "scheduler" / "scheduler_config.json"),
        tokenizer=tokenizer,
        generation=read_json(generation) if generation.is_file() else {},
    )
