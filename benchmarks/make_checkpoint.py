"""A checkpoint of random weights in diffusers layout, of any size, for measuring without the real one.

    python -m t2v_rt.benchmarks.make_checkpoint build/wan-random
    python -m t2v_rt.benchmarks.make_checkpoint build/wan-random --dtype fp32 --set text_encoder.num_layers=24
    python -m t2v_rt.benchmarks.make_checkpoint build/wan-full --text-encoder full

Networks have the sizes of the family's published checkpoint except for the text encoder: unless asked for in full
(Wan2.1-T2V-1.3B: 11.4 GB), it is narrow but of the true output width. Tensors are written one after another in pieces,
so memory stays small and a GB takes about a second.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t2v_rt.benchmarks import wan_tensors
from t2v_rt.benchmarks.wan_tensors import Config, Tensor
from t2v_rt.errors import RequestError
from t2v_rt.runtime.memory.plan import parse_bytes

PIECE = 8 << 20  # values generated at once
SHARD_VALUES = 1_250_000_000  # of the published checkpoint, whose files are 5 GB of float32 at most
# name in safetensors, unsigned type of the same width, mantissa bits, exponent bias
DTYPES: Mapping[str, tuple[str, str, int, int]] = {
    "fp32": ("F32", "<u4", 23, 127),
    "fp16": ("F16", "<u2", 10, 15),
    "bf16": ("BF16", "<u2", 7, 127),
}
MEAN_SQUARE = math.sqrt(7 / 3)  # root of the mean square of values spread evenly over [1, 2)


@dataclass(frozen=True)
class Table:
    """What a family's checkpoint holds.

    Args:
        index: `model_index.json`.
        scheduler: `scheduler_config.json`.
        configs: network -> its `config.json`, its text encoder narrow.
        full: the text encoder's of the published size.
        tensors: network -> stem of its weight files, and names and shapes of its tensors by its config.
        fan_in: name and shape of a weight -> how many products it is summed over.
    """

    index: Config
    scheduler: Config
    configs: Mapping[str, Config]
    full: Config
    tensors: Mapping[str, tuple[str, Callable[[Config], Iterator[Tensor]]]]
    fan_in: Callable[[str, tuple[int, ...]], int]


FAMILIES: Mapping[str, Table] = {
    "wan": Table(
        wan_tensors.INDEX,
        wan_tensors.SCHEDULER,
        wan_tensors.CONFIGS,
        wan_tensors.FULL_TEXT_ENCODER,
        wan_tensors.TENSORS,
        wan_tensors.fan_in,
    ),
}


def make_checkpoint(
    folder: str | Path,
    configs: Mapping[str, Config] | None = None,
    *,
    family: str = "wan",
    dtype: str = "bf16",
    shard_bytes: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Writes a checkpoint of random weights.

    Values keep activations near one: a layer's weights have the mean square of 1 over its inputs, norms are in [1, 2).
    Every tensor differs, or a builder would store equal ones once and sizes would mislead.

    Args:
        folder: to write; it must not exist yet.
        configs: of each network, as its `config.json` has it; None for the family's table.
        family: one of `FAMILIES`.
        dtype: of all tensors: `fp32`, `fp16` or `bf16`.
        shard_bytes: largest weight file; None for files that end where the published checkpoint's do.
        seed: of the weights.

    Returns:
        `output`, `bytes`, `seconds` and `seconds_per_gb`.

    Raises:
        RequestError: unknown dtype or family, or the folder exists.
    """
    for kind, value, known in (("dtype", dtype, DTYPES), ("family", family, FAMILIES)):
        if value not in known:
            raise RequestError(f"{kind} is {value!r}; expected one of {', '.join(known)}")
    table = FAMILIES[family]
    configs = table.configs if configs is None else configs
    target, start, written = Path(folder), time.perf_counter(), 0
    if target.exists():
        raise RequestError(f"{target} exists already; remove it, or choose another folder")
    target.mkdir(parents=True)
    draw = Draw(np.random.Generator(np.random.SFC64(seed)), dtype, table.fan_in)
    for name, (stem, tensors) in table.tensors.items():
        (target / name).mkdir()
        _write_json(target / name / "config.json", configs[name])
        written += _write_shards(target / name, stem, tensors(configs[name]), shard_bytes, draw)
    _write_json(target / "model_index.json", table.index)
    (target / "scheduler").mkdir()
    _write_json(target / "scheduler" / "scheduler_config.json", table.scheduler)
    _write_tokenizer(target / "tokenizer", configs["text_encoder"]["vocab_size"])
    seconds = time.perf_counter() - start
    return {"output": str(target), "bytes": written, "seconds": seconds, "seconds_per_gb": seconds / written * 1e9}


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Draw:
    """Random tensors.

    Args:
        generator: of their values.
        dtype: theirs.
        fan_in: as of `Table`.
    """

    generator: np.random.Generator
    dtype: str
    fan_in: Callable[[str, tuple[int, ...]], int]

    def values(self, name: str, shape: tuple[int, ...]) -> Iterator[NDArray[np.uint16 | np.uint32]]:
        """Bit patterns of floats: sign and mantissa drawn, the exponent set by the tensor's scale."""
        _, unsigned, mantissa_bits, bias = DTYPES[self.dtype]
        kind = np.dtype(unsigned)
        is_norm = "norm" in name and not name.endswith(".bias")
        exponent = 0 if is_norm else round(-math.log2(MEAN_SQUARE * math.sqrt(self.fan_in(name, shape))))
        exponent = -5 if name.endswith(".bias") else exponent
        sign = 0 if is_norm else 1 << (8 * kind.itemsize - 1)
        keep, fixed = kind.type(sign | ((1 << mantissa_bits) - 1)), kind.type((exponent + bias) << mantissa_bits)
        left = math.prod(shape)
        while left:
            count = min(left, PIECE)
            words = self.generator.integers(0, 2**64, -(-count * kind.itemsize // 8), np.uint64)
            bits: NDArray[Any] = words.view(kind)[:count]
            bits &= keep
            bits |= fixed
            yield bits
            left -= count


def _write_shards(folder: Path, stem: str, tensors: Iterable[Tensor], shard_bytes: int | None, draw: Draw) -> int:
    """One safetensors file, or several with an index; returns their bytes."""
    width = np.dtype(DTYPES[draw.dtype][1]).itemsize
    limit = shard_bytes or SHARD_VALUES * width
    shards: list[list[Tensor]] = [[]]
    room = limit
    for name, shape in tensors:
        room -= math.prod(shape) * width
        if room < 0 and shards[-1]:
            shards.append([])
            room = limit - math.prod(shape) * width
        shards[-1].append((name, shape))
    if len(shards) == 1:
        files = [f"{stem}.safetensors"]
    else:
        files = [f"{stem}-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        places = {name: file for file, shard in zip(files, shards, strict=True) for name, _ in shard}
        total = sum(math.prod(shape) * width for shard in shards for _, shape in shard)
        index = {"metadata": {"total_size": total}, "weight_map": places}
        _write_json(folder / f"{stem}.safetensors.index.json", index)
    return sum(write_safetensors(folder / file, shard, draw) for file, shard in zip(files, shards, strict=True))


def write_safetensors(path: Path, tensors: Sequence[Tensor], draw: Draw) -> int:
    """One file (format: huggingface/safetensors, README); returns its bytes."""
    label, unsigned, _, _ = DTYPES[draw.dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors:
        start, end = end, end + math.prod(shape) * np.dtype(unsigned).itemsize
        header[name] = {"dtype": label, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name, shape in tensors:
            for piece in draw.values(name, shape):
                stream.write(piece.data)
    return 8 + len(text) + end


def _write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A word-level tokenizer that closes every prompt with `</s>`; words past the vocabulary become `<unk>`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["<pad>", "</s>", "<unk>", *(f"word{i}" for i in range(vocab_size - 3))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    _write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **special})


def changed(configs: Mapping[str, Config], changes: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Configs with settings such as `transformer.num_layers=2` changed; values are JSON.

    Raises:
        RequestError: not of that form, or no such setting.
    """
    result = {name: dict(config) for name, config in configs.items()}
    for change in changes:
        place, _, value = change.partition("=")
        network, _, key = place.partition(".")
        if key not in result.get(network, {}):
            raise RequestError(f"{change!r} changes no setting; expected one such as transformer.num_layers=2")
        try:
            result[network][key] = json.loads(value)
        except ValueError as exc:
            raise RequestError(f"{change!r}: {value!r} is not JSON; expected one such as {place}=2") from exc
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", metavar="FOLDER", help="checkpoint to write")
    parser.add_argument("--family", default="wan", choices=list(FAMILIES), help="of the model")
    parser.add_argument("--dtype", default="bf16", choices=list(DTYPES), help="of the weights")
    parser.add_argument("--max-shard-size", metavar="SIZE", help="largest weight file")
    parser.add_argument("--text-encoder", default="narrow", choices=["narrow", "full"], help="its size")
    parser.add_argument("--seed", type=int, default=0, help="of the weights")
    parser.add_argument("--set", action="append", default=[], metavar="NETWORK.KEY=VALUE", help="change a config")
    options = parser.parse_args()
    table = FAMILIES[options.family]
    full = {"text_encoder": table.full} if options.text_encoder == "full" else {}
    report = make_checkpoint(
        options.output,
        changed({**table.configs, **full}, options.set),
        family=options.family,
        dtype=options.dtype,
        shard_bytes=None if options.max_shard_size is None else parse_bytes(options.max_shard_size),
        seed=options.seed,
    )
    print(json.dumps(report))


if __name__ == "__main__":
    main()
