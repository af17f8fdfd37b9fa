"""Which files of a network's folder hold its weights, by their names alone.

Source of the names: diffusers' `save_pretrained` with a variant, its `hub_utils._add_variant` and
`model_loading_utils._fetch_index_file`, and transformers' `_add_variant`. A variant, such as `fp16`, stands

- in a whole file before the suffix: `model.fp16.safetensors`;
- in shards before their number, `diffusion_pytorch_model.fp16-00001-of-00002.safetensors`, and in their index before
  its suffix, `diffusion_pytorch_model.safetensors.index.fp16.json`;
- of earlier versions after the number, `…-00001-of-00002.fp16.safetensors`, and in `….safetensors.fp16.index.json`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from t2v_rt.errors import CheckpointError

logger = logging.getLogger(__name__)
VARIANT = r"(?:\.(?P<{}>[A-Za-z0-9_-]+?))?"
STEM = "(?:model|diffusion_pytorch_model)"
WEIGHTS = re.compile(
    STEM + VARIANT.format("variant") + r"(?P<shard>-\d+-of-\d+)?" + VARIANT.format("old") + r"\.safetensors"
)
INDEX = re.compile(STEM + r"\.safetensors" + VARIANT.format("old") + r"\.index" + VARIANT.format("variant") + r"\.json")
PICKLED = re.compile(r"(pytorch_model|diffusion_pytorch_model)(-\d+-of-\d+)?\.bin")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class WeightNames:
    """The files of one variant.

    Args:
        variant: such as `fp16`; empty for the plain one.
        index: that ties its shards together, or empty.
        files: the shards that bear its name, or the one file.
    """

    variant: str
    index: str
    files: tuple[str, ...]


def choose_weights(names: Iterable[str], place: str | Path) -> WeightNames | None:
    """Chooses among the files of a network's folder.

    The plain variant goes before others, and shards with an index before a whole file.

    Args:
        names: of the files.
        place: their folder, for errors.

    Returns:
        What to read; None where nothing bears a name of the libraries'.

    Raises:
        CheckpointError: several variants, none of them plain; or two files of one variant.
    """
    listed = sorted(names)
    whole, shards, indexes = _by_variant(listed)
    usable = sorted(whole.keys() | indexes.keys())
    if not usable:
        return None
    if len(usable) > 1 and "" not in usable:
        raise CheckpointError(
            f"{place}: weights of {len(usable)} variants ({', '.join(usable)}); expected one, or one without a name: "
            "remove the others"
        )
    variant = usable[0]  # the plain one is first
    if variant or len(usable) > 1:
        logger.info(
            "%s: the variants %s are there; %s is read",
            place,
            ", ".join(name or "without a name" for name in usable),
            variant or "that without a name",
        )
    index = indexes.get(variant, [])
    found = index or whole[variant]
    if len(found) > 1:
        raise CheckpointError(f"{place}: {' and '.join(found)}; expected one of them: remove the other")
    return WeightNames(variant, *(found[0], tuple(shards.get(variant, ()))) if index else ("", (found[0],)))


def _by_variant(names: Sequence[str]) -> tuple[dict[str, list[str]], dict[str, list[str]], dict[str, list[str]]]:
    """Variant -> names, of whole files, of shards, and of indexes."""
    whole: dict[str, list[str]] = {}
    shards: dict[str, list[str]] = {}
    indexes: dict[str, list[str]] = {}
    for name in names:
        kinds = indexes
        match = INDEX.fullmatch(name)
        if match is None:
            match = WEIGHTS.fullmatch(name)
            if match is None or (match["old"] and not match["shard"]):
                continue
            kinds = shards if match["shard"] else whole
        kinds.setdefault(match["variant"] or match["old"] or "", []).append(name)
    return whole, shards, indexes
