"""A checkpoint on disk: its files found and checked before any work begins."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from t2v_rt.engines.bundle.store import Stamps
from t2v_rt.errors import CheckpointError
from t2v_rt.export.altering import refuse_quantized
from t2v_rt.export.config import INDEX, CheckpointConfigs, read_json
from t2v_rt.export.family import TEXT_ENCODER, Family, families, family_of, networks_of
from t2v_rt.export.found_instead import absent
from t2v_rt.export.single_files import Found, SingleFiles, files_below
from t2v_rt.export.tensors import CheckpointWeights

TOKENIZER = "tokenizer"  # its folder, and the option that takes its place
Files = Mapping[str, str | Path]


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    Args:
        family: of its model.
        configs: of its networks.
        weights: tensors of each network.
        tokenizer: files that its tokenizer is made of.
    """

    family: Family
    configs: CheckpointConfigs
    weights: Mapping[str, CheckpointWeights]
    tokenizer: tuple[Path, ...]

    def weights_of(self, component: str) -> CheckpointWeights:
        """Tensors of a component's network."""
        return self.weights[self.family.networks[component]]

    def digest(self) -> str:
        """One hash over all that an export reads."""
        configs = {name: value for name, value in vars(self.configs).items() if name != "origin"}
        content = {
            "configs": configs,
            "tokenizer": _hashes(self.tokenizer),
            "weights": {name: _hashes(weights.files) for name, weights in self.weights.items()},
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def encoder_digest(self) -> str:
        """A hash over what decides a prompt's embeddings: the text encoder and its tokenizer."""
        content = {
            "config": self.configs.networks[self.family.networks[TEXT_ENCODER]],
            "tokenizer": _hashes(self.tokenizer),
            "weights": _hashes(self.weights_of(TEXT_ENCODER).files),
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _hashes(files: Sequence[Path]) -> list[str]:
    """Hashes of files of one folder."""
    stamps = Stamps(files[0].parent)
    result = [stamps.sha256(file.name) for file in files]
    stamps.save()
    return result


def read_configs(folder: Path) -> CheckpointConfigs:
    """Reads the configs of a checkpoint in diffusers layout.

    Raises:
        CheckpointError: one is missing or damaged, or no family has its pipeline.
    """
    index = read_json(folder / INDEX)
    names = networks_of(family_of(index, folder))
    folders = (*names, TOKENIZER, "scheduler")
    for name in folders:
        if not (folder / name).is_dir():
            raise CheckpointError(f"{folder}: the folder {name}/ is missing; expected {', '.join(folders)}")
    networks = {name: read_json(folder / name / "config.json") for name in names}
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
            file for each network, under the names of its own code; None where `files` has all.
        files: network -> single safetensors file, and `tokenizer` (`tokenizer.json` or its folder), that take the place
            of those in the folder.

    Returns:
        The checkpoint, its configs read and the headers of its weight files checked. Without a folder in diffusers
        layout, the configs are those that its family was published with.

    Raises:
        CheckpointError: a part is missing or damaged, or weights are pickled.
    """
    given = {name: Path(file) for name, file in (files or {}).items()}
    if folder is None:
        family, kind = _family_of_files(Found.among(file for file in given.values() if file.is_file()))
        _check_known(family, given)
        missing = [name for name in (*networks_of(family), TOKENIZER) if name not in given]
        if missing:
            options = ", ".join("--" + name.replace("_", "-") for name in missing)
            raise CheckpointError(f"no checkpoint given; expected a folder, or the missing files too: {options}")
        return _from_files(family, kind.configs, given)
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; expected a checkpoint in diffusers layout")
    if not _in_diffusers_layout(folder):
        found = Found.among(files_below(folder))
        family, kind = _family_of_files(found)
        _check_known(family, given)
        return _from_files(family, kind.configs, {**_find_files(folder, found, family, kind, given), **given})
    configs = read_configs(folder)
    family = family_of(configs.index, folder)
    _check_known(family, given)
    return _from_files(family, configs, {TOKENIZER: folder / TOKENIZER, **given}, folder)


def _in_diffusers_layout(folder: Path) -> bool:
    """Whether a folder has an index, or lacks it and has the config of a network."""
    names = {name for family in families() for name in networks_of(family)}
    return (folder / INDEX).is_file() or any((folder / name / "config.json").is_file() for name in names)


def _check_known(family: Family, given: Iterable[str]) -> None:
    known = (*networks_of(family), TOKENIZER)
    if unknown := sorted(set(given) - set(known)):
        raise CheckpointError(f"a file is given for {unknown[0]!r}; expected one of {', '.join(known)}")


def _family_of_files(found: Found) -> tuple[Family, SingleFiles]:
    """The family that knows the most networks among files, the first where none knows any."""
    known = [(family, family.single_files) for family in families() if family.single_files is not None]
    return max(known, key=lambda pair: len({pair[1].identify(names) for names in found.tensors.values()} - {None}))


def _find_files(
    folder: Path, found: Found, family: Family, kind: SingleFiles, given: Mapping[str, Path]
) -> dict[str, Path]:
    networks = kind.find(folder, [name for name in networks_of(family) if name not in given], found)
    if TOKENIZER in given:
        return networks
    name = family.tokenizers[0][0]
    tokenizers = [file for file in found.files if file.name == name]
    if len(tokenizers) != 1:
        raise CheckpointError(
            f"{folder}: {len(tokenizers)} files {name}; expected that of the checkpoint {kind.repository}: name it, "
            "--tokenizer FILE"
        )
    return {**networks, TOKENIZER: tokenizers[0]}


def _from_files(
    family: Family, configs: CheckpointConfigs, files: Mapping[str, Path], folder: Path | None = None
) -> Checkpoint:
    """The checkpoint of single files and, for networks that have none, of the folders of their names."""
    weights = {}
    for name in networks_of(family):
        if name in files and family.single_files is not None:
            weights[name] = family.single_files.open(files[name], name)
        elif name in files:
            raise CheckpointError(f"{files[name]}: this model is not known in single files; give its folder alone")
        else:
            assert folder is not None
            weights[name] = CheckpointWeights.open(folder / name)
    return Checkpoint(family, configs, weights, _tokenizer_files(files[TOKENIZER], family))


def _tokenizer_files(place: Path, family: Family) -> tuple[Path, ...]:
    """The files of a tokenizer, from their folder or one of them."""
    known = {name for names in family.tokenizers for name in names}
    folder = place.parent if place.name in known and not place.is_dir() else place
    choices = [tuple(folder / name for name in names) for names in family.tokenizers]
    for files in choices:
        if all(file.is_file() for file in files):
            return files
    missing = next(file for file in choices[0] if not file.is_file())
    raise CheckpointError(
        f"{missing} {absent(missing)}; expected a fast tokenizer: load the tokenizer with transformers and save it "
        "again"
    )
