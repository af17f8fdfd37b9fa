"""Headers of safetensors files: where each tensor lies, checked before any is read.

Source of the format: huggingface/safetensors, README.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from t2v_rt.errors import CheckpointError
from t2v_rt.export.found_instead import absent, found_instead, text_instead

HEADER_LIMIT = 100_000_000  # the format's own limit on the JSON header, in bytes
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor of a safetensors file lies."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Reads and checks the header of a safetensors file.

    Args:
        file: path of the file.

    Returns:
        Tensor name -> place in the file.

    Raises:
        CheckpointError: no such file, one of another kind, a damaged header, tensors that overlap or leave holes, or a
            file of another length than its header says.
    """
    if not file.is_file():
        raise CheckpointError(f"{file} {absent(file)}; expected a .safetensors file")
    try:
        return _read(file)
    except OSError as exc:
        raise CheckpointError(f"{file} cannot be read ({exc.strerror}); check its rights and its disk") from exc
    except CheckpointError as exc:
        if (instead := found_instead(file) or text_instead(file)) is not None:
            raise CheckpointError(f"{file} {instead}") from exc
        raise


def _read(file: Path) -> dict[str, StoredTensor]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or not 2 <= length <= min(HEADER_LIMIT, size - 8):
            raise CheckpointError(
                f"{file}: damaged or truncated: {size} bytes with a header of {length}; download it again"
            )
        try:
            header: dict[str, Any] = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            tensors = {name: _entry(file, 8 + length, fields) for name, fields in header.items()}
            end = _check_places(tensors, 8 + length)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
            raise CheckpointError(f"{file}: damaged header ({exc}); download it again") from exc
    if end != size:
        raise CheckpointError(f"{file}: truncated or damaged: {size} bytes, its header says {end}; download it again")
    return tensors


def _entry(file: Path, data_start: int, fields: Mapping[str, Any]) -> StoredTensor:
    start, end = (int(offset) for offset in fields["data_offsets"])
    shape = tuple(int(dim) for dim in fields["shape"])
    dtype = str(fields["dtype"])
    if start < 0 or end < start or min(shape, default=0) < 0:
        raise ValueError(f"impossible offsets {start}..{end} or shape {list(shape)}")
    if dtype in ITEM_BYTES and end - start != prod(shape) * ITEM_BYTES[dtype]:
        raise ValueError(f"{end - start} bytes for shape {list(shape)} of {dtype}")
    return StoredTensor(file, dtype, shape, data_start + start, end - start)


def _check_places(tensors: Mapping[str, StoredTensor], data_start: int) -> int:
    """Where the last tensor ends; raises ValueError unless each begins where the one before it ends."""
    end, before = data_start, "the header"
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != end:
            gap = tensor.offset - end
            how = f"{-gap} bytes overlap" if gap < 0 else f"{gap} bytes are between"
            raise ValueError(f"tensor {name!r} does not begin where {before} ends: {how}")
        end, before = tensor.offset + tensor.nbytes, repr(name)
    return end
