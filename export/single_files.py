"""Networks in single safetensors files, without configs and under names of their own code, as ComfyUI keeps them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from t2v_rt.errors import CheckpointError
from t2v_rt.export.altering import refuse_altering
from t2v_rt.export.config import CheckpointConfigs
from t2v_rt.export.found_instead import APPLE_DOUBLE, absent, found_instead
from t2v_rt.export.tensor_file import read_header
from t2v_rt.export.tensors import CheckpointWeights
from t2v_rt.export.weight_names import PICKLES

logger = logging.getLogger(__name__)
WRAPPING = "model.diffusion_model."  # before each name where a denoiser was saved from within a training program
NAMED = 3  # of files or unknown tensors, in an error


@dataclass(frozen=True)
class SingleFiles:
    """A family's networks in single files.

    Args:
        model: that such files are of.
        configs: that it was published with, as the files have none.
        repository: that has it in diffusers layout.
        examples: network -> name of a file that would do.
        marks: network -> a tensor that tells it: under the code's names, and under those that need no change.
        others: what begins a tensor's name -> the model beside this one that it belongs to.
        no_weights: tensors to pass over.
        renamed: network and names of all tensors -> each name with diffusers' for it, None where it is not known.
    """

    model: str
    configs: CheckpointConfigs
    repository: str
    examples: Mapping[str, str]
    marks: Mapping[str, tuple[str, str]]
    others: Mapping[str, str]
    no_weights: tuple[str, ...]
    renamed: Callable[[str, Iterable[str]], Mapping[str, str | None]]

    def identify(self, names: Iterable[str]) -> str | None:
        """The network that tensors of these names belong to, or None."""
        known = set(names)
        return next((network for network, marks in self.marks.items() if not known.isdisjoint(marks)), None)

    def open(self, file: Path, network: str) -> CheckpointWeights:
        """Opens a network's weights, its tensors under diffusers' names.

        Args:
            file: a safetensors file.
            network: one of `examples`.

        Raises:
            CheckpointError: no such file, a pickle, damaged, quantized, of another network or model, or with names that
                are not known.
        """
        example = self.examples[network]
        if file.suffix in PICKLES:
            raise CheckpointError(self._refused_pickle(file, network))
        if not file.is_file():
            raise CheckpointError(f"{file} {absent(file)}; expected the weights of the {network} as .safetensors")
        tensors = {name.removeprefix(WRAPPING): tensor for name, tensor in read_header(file).items()}
        refuse_altering(tensors, example)
        found = self.identify(tensors)
        starts = ((start, model) for start, model in self.others.items() if any(n.startswith(start) for n in tensors))
        if (other := next(starts, None)) is not None:
            raise CheckpointError(f"{file} is of {other[1]}; supported: {self.model} text-to-video, such as {example}")
        if found not in (network, None):
            raise CheckpointError(f"{file} holds the {found}; expected the {network}, such as {example}")
        kept = {name: tensor for name, tensor in tensors.items() if name not in self.no_weights}
        names = self.renamed(network, kept)
        unknown = [name for name, new in names.items() if new is None]
        if found is None or unknown:
            listed = ", ".join(repr(name) for name in (unknown or list(names))[:NAMED])
            raise CheckpointError(
                f"{file}: {len(unknown or names)} tensors are not known as {self.model}'s {network}: {listed} …; "
                f"expected a file such as {example}"
            )
        return CheckpointWeights(file, [file], {str(new): kept[name] for name, new in names.items()})

    def find(self, folder: Path, networks: Collection[str], found: Found) -> dict[str, Path]:
        """The single file of each network among those of a folder.

        Args:
            folder: such as ComfyUI's `models`, or what one downloaded of its repackaged files.
            networks: to look for.
            found: what is in the folder and below it.

        Returns:
            Network -> file, for all of them.

        Raises:
            CheckpointError: a network has no file that can be read, several, or only a pickle.
        """
        candidates: dict[str, list[Path]] = {network: [] for network in networks}
        for file, names in found.tensors.items():
            network = self.identify(names)
            if network in candidates:
                candidates[network].append(file)
        for network, files in candidates.items():
            if len(files) > 1:
                listed = ", ".join(str(file.relative_to(folder)) for file in files[:NAMED])
                option = network.replace("_", "-")
                raise CheckpointError(
                    f"{folder}: {len(files)} files hold a {network} ({listed}); name one: --{option} FILE"
                )
        missing = [network for network, files in candidates.items() if not files]
        if missing:
            raise CheckpointError(self._nothing_found(folder, found, missing, only_some=len(missing) < len(candidates)))
        for reason in found.unreadable:
            logger.info("passed over: %s", reason)
        return {network: files[0] for network, files in candidates.items()}

    def _nothing_found(self, folder: Path, found: Found, missing: list[str], *, only_some: bool) -> str:
        """Why a folder has no file of a network, as far as its other files tell."""
        first, unreadable = missing[0], found.unreadable
        if unreadable:
            more = f" ({len(unreadable) - 1} other files cannot be read either)" if len(unreadable) > 1 else ""
            return f"{folder}: no single file of the {first} can be read: {unreadable[0]}{more}"
        for file in found.files:
            if only_some and file.suffix in PICKLES:
                return self._refused_pickle(file, first)
            if file.suffix == ".gguf" and file.is_file() and (instead := found_instead(file)) is not None:
                return f"{file} {instead}, such as {self.examples[first]}"
        return (
            f"{folder}: no model_index.json, and no single file of the {first}; expected a checkpoint in diffusers "
            f"layout, or files such as {', '.join(self.examples[network] for network in missing)}"
        )

    def _refused_pickle(self, file: Path, network: str) -> str:
        return (
            f"{file} is a pickle, which can run code when it is loaded; use {self.examples[network]} of ComfyUI's "
            f"repackaged files instead, or the checkpoint {self.repository}"
        )


@dataclass(frozen=True)
class Found:
    """Files, as far as they tell what they are.

    Args:
        files: all of them.
        tensors: safetensors file -> names of its tensors.
        unreadable: why other safetensors files cannot be read.
    """

    files: tuple[Path, ...]
    tensors: Mapping[Path, frozenset[str]]
    unreadable: tuple[str, ...]

    @classmethod
    def among(cls, files: Iterable[Path]) -> Found:
        """Reads the headers of those that are safetensors files by their name."""
        listed = tuple(files)
        tensors, unreadable = {}, []
        for file in listed:
            if file.suffix == ".safetensors":
                try:
                    tensors[file] = frozenset(name.removeprefix(WRAPPING) for name in read_header(file))
                except CheckpointError as exc:
                    unreadable.append(str(exc))
        return cls(listed, tensors, tuple(unreadable))


def files_below(folder: Path) -> list[Path]:
    """All files of a folder and below it, sorted; links are followed, and what they lead to is there once.

    What macOS wrote beside files is left out; links to nothing are not.
    """
    found: dict[str, Path] = {}
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)  # which gives in where links lead round, as pathlib does not
        if real in seen:  # by another link, or a link to a folder above
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        for name in sorted(names):
            if not name.startswith(APPLE_DOUBLE):
                file = Path(place, name)
                found.setdefault(os.path.realpath(file), file)
    return sorted(found.values())
