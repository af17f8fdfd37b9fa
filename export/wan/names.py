"""Networks in single safetensors files with the names of Wan's own code, as ComfyUI repackages them.

Source of the names: Wan-Video/Wan2.1, `wan/modules/model.py`, `vae.py` and `t5.py`. Only names differ from diffusers'
and transformers' checkpoints, no tensor's values or layout. A file that has their names already is taken as it is.
"""

from __future__ import annotations

import logging
import os
import re
from bisect import bisect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from t2v_rt.errors import CheckpointError
from t2v_rt.export.altering import refuse_altering
from t2v_rt.export.found_instead import APPLE_DOUBLE, absent, found_instead
from t2v_rt.export.tensor_file import StoredTensor, read_header
from t2v_rt.export.tensors import CheckpointWeights
from t2v_rt.export.weight_names import PICKLES

logger = logging.getLogger(__name__)
Rules = tuple[tuple[str, str], ...]
WRAPPING = "model.diffusion_model."  # before each name where a denoiser was saved from within a training program
NAMED = 3  # of unknown tensors, in an error
NO_WEIGHTS = ("spiece_model",)  # the tokenizer, which ComfyUI stores as a tensor
INSTEAD: Mapping[str, str] = {
    "text_encoder": "umt5_xxl_fp16.safetensors",
    "transformer": "wan2.1_t2v_1.3B_fp16.safetensors",
    "vae": "wan_2.1_vae.safetensors",
}
# a tensor that tells the network: under Wan's names, and under those that need no change
MARKS: Mapping[str, tuple[str, str]] = {
    "text_encoder": ("token_embedding.weight", "encoder.final_layer_norm.weight"),
    "transformer": ("head.modulation", "condition_embedder.time_proj.weight"),
    "vae": ("decoder.middle.0.residual.0.gamma", "decoder.mid_block.resnets.0.norm1.gamma"),
}
OTHER_MODELS: Mapping[str, str] = {  # what begins so belongs to networks beside those of text-to-video
    "img_emb.": "an image-to-video model",
    "vace_blocks.": "a VACE model",
    "face_adapter.": "a Wan-Animate model",
    "control_adapter.": "a camera control model",
    "decoder.upsamples.0.upsamples.": "the VAE of Wan2.2-TI2V-5B",
}

TRANSFORMER: Rules = (
    (r"(patch_embedding\..*)", r"\1"),
    (r"text_embedding\.0\.(.*)", r"condition_embedder.text_embedder.linear_1.\1"),
    (r"text_embedding\.2\.(.*)", r"condition_embedder.text_embedder.linear_2.\1"),
    (r"time_embedding\.0\.(.*)", r"condition_embedder.time_embedder.linear_1.\1"),
    (r"time_embedding\.2\.(.*)", r"condition_embedder.time_embedder.linear_2.\1"),
    (r"time_projection\.1\.(.*)", r"condition_embedder.time_proj.\1"),
    (r"(blocks\.\d+)\.modulation", r"\1.scale_shift_table"),
    (r"(blocks\.\d+)\.self_attn\.([qkv])\.(.*)", r"\1.attn1.to_\2.\3"),
    (r"(blocks\.\d+)\.self_attn\.o\.(.*)", r"\1.attn1.to_out.0.\2"),
    (r"(blocks\.\d+)\.self_attn\.(norm_[qk]\..*)", r"\1.attn1.\2"),
    (r"(blocks\.\d+)\.cross_attn\.([qkv])\.(.*)", r"\1.attn2.to_\2.\3"),
    (r"(blocks\.\d+)\.cross_attn\.o\.(.*)", r"\1.attn2.to_out.0.\2"),
    (r"(blocks\.\d+)\.cross_attn\.(norm_[qk]\..*)", r"\1.attn2.\2"),
    (r"(blocks\.\d+)\.norm3\.(.*)", r"\1.norm2.\2"),  # numbered by their order of use, not of definition
    (r"(blocks\.\d+)\.ffn\.0\.(.*)", r"\1.ffn.net.0.proj.\2"),
    (r"(blocks\.\d+)\.ffn\.2\.(.*)", r"\1.ffn.net.2.\2"),
    (r"head\.modulation", r"scale_shift_table"),
    (r"head\.head\.(.*)", r"proj_out.\1"),
)
TEXT_ENCODER: Rules = (
    (r"token_embedding\.weight", r"shared.weight"),
    (r"blocks\.(\d+)\.norm1\.(.*)", r"encoder.block.\1.layer.0.layer_norm.\2"),
    (r"blocks\.(\d+)\.attn\.([qkvo])\.(.*)", r"encoder.block.\1.layer.0.SelfAttention.\2.\3"),
    (
        r"blocks\.(\d+)\.pos_embedding\.embedding\.(.*)",
        r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias.\2",
    ),
    (r"blocks\.(\d+)\.norm2\.(.*)", r"encoder.block.\1.layer.1.layer_norm.\2"),
    (r"blocks\.(\d+)\.ffn\.gate\.0\.(.*)", r"encoder.block.\1.layer.1.DenseReluDense.wi_0.\2"),
    (r"blocks\.(\d+)\.ffn\.fc1\.(.*)", r"encoder.block.\1.layer.1.DenseReluDense.wi_1.\2"),
    (r"blocks\.(\d+)\.ffn\.fc2\.(.*)", r"encoder.block.\1.layer.1.DenseReluDense.wo.\2"),
    (r"norm\.weight", r"encoder.final_layer_norm.weight"),
)
RESIDUAL: Rules = (
    (r"residual\.0\.(.*)", r"norm1.\1"),
    (r"residual\.2\.(.*)", r"conv1.\1"),
    (r"residual\.3\.(.*)", r"norm2.\1"),
    (r"residual\.6\.(.*)", r"conv2.\1"),
    (r"shortcut\.(.*)", r"conv_shortcut.\1"),
)
VAE: Rules = (
    (r"(encoder\..*|conv1\..*)", r"\1"),  # only decoding is exported
    (r"conv2\.(.*)", r"post_quant_conv.\1"),
    (r"decoder\.conv1\.(.*)", r"decoder.conv_in.\1"),
    (r"decoder\.middle\.1\.(.*)", r"decoder.mid_block.attentions.0.\1"),
    (r"decoder\.head\.0\.(.*)", r"decoder.norm_out.\1"),
    (r"decoder\.head\.2\.(.*)", r"decoder.conv_out.\1"),
)


def open_single_file(file: Path, network: str) -> CheckpointWeights:
    """Opens a network's weights, its tensors under diffusers' names.

    Args:
        file: a safetensors file.
        network: `text_encoder`, `transformer` or `vae`.

    Raises:
        CheckpointError: no such file, a pickle, damaged, quantized, of another network or model, or with names that
            are not known.
    """
    if file.suffix in PICKLES:
        raise CheckpointError(_refused_pickle(file, network))
    if not file.is_file():
        raise CheckpointError(f"{file} {absent(file)}; expected the weights of the {network} as .safetensors")
    tensors = {name.removeprefix(WRAPPING): tensor for name, tensor in read_header(file).items()}
    refuse_altering(tensors, INSTEAD[network])
    found = identify(tensors)
    other = next((model for start, model in OTHER_MODELS.items() if _any_starts(tensors, start)), None)
    if other is not None:
        raise CheckpointError(f"{file} is of {other}; supported: Wan2.1 text-to-video, such as {INSTEAD[network]}")
    if found not in (network, None):
        raise CheckpointError(f"{file} holds the {found}; expected the {network}, such as {INSTEAD[network]}")
    kept = {name: tensor for name, tensor in tensors.items() if name not in NO_WEIGHTS}
    names = renamed(network, kept)
    unknown = [name for name, new in names.items() if new is None]
    if found is None or unknown:
        listed = ", ".join(repr(name) for name in (unknown or list(names))[:NAMED])
        raise CheckpointError(
            f"{file}: {len(unknown or names)} tensors are not known as Wan2.1's {network}: {listed} …; "
            f"expected a file such as {INSTEAD[network]}"
        )
    return CheckpointWeights(file, [file], {str(new): kept[name] for name, new in names.items()})


def identify(names: Iterable[str]) -> str | None:
    """The network that tensors of these names belong to, or None."""
    known = set(names)
    return next((network for network, marks in MARKS.items() if not known.isdisjoint(marks)), None)


def renamed(network: str, names: Iterable[str]) -> dict[str, str | None]:
    """Each name with diffusers' for it, None for those that are not known."""
    given = list(names)
    if MARKS[network][1] in given:
        return {name: name for name in given}
    if network == "vae":
        return _each(given, _vae_rename(given))
    return _each(given, lambda name: _first_match(TEXT_ENCODER if network == "text_encoder" else TRANSFORMER, name))


def _each(names: Iterable[str], rename: Callable[[str], str | None]) -> dict[str, str | None]:
    return {name: rename(name) for name in names}


def _first_match(rules: Rules, name: str) -> str | None:
    for pattern, replacement in rules:
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    return None


def _vae_rename(names: Iterable[str]) -> Callable[[str], str | None]:
    """Wan numbers a decoder's residual blocks and upsamplers in one row, diffusers by level and kind."""
    matches = (re.match(r"decoder\.upsamples\.(\d+)\.resample\.", name) for name in names)
    ends = sorted({int(match[1]) for match in matches if match})  # a level ends with its upsampler

    def rename(name: str) -> str | None:
        if match := re.fullmatch(r"decoder\.middle\.([02])\.(.*)", name):
            place, rest = f"decoder.mid_block.resnets.{int(match[1]) // 2}", match[2]
        elif match := re.fullmatch(r"decoder\.upsamples\.(\d+)\.(.*)", name):
            index, rest = int(match[1]), match[2]
            level = bisect(ends, index - 1)
            if index in ends:
                return f"decoder.up_blocks.{level}.upsamplers.0.{rest}"
            place = f"decoder.up_blocks.{level}.resnets.{index - (ends[level - 1] + 1 if level else 0)}"
        else:
            return _first_match(VAE, name)
        inner = _first_match(RESIDUAL, rest)
        return None if inner is None else f"{place}.{inner}"

    return rename


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


def find_single_files(folder: Path, networks: Iterable[str]) -> dict[str, Path]:
    """The single file of each network in a folder or below it.

    Args:
        folder: such as ComfyUI's `models`, or what one downloaded of its repackaged files.
        networks: to look for.

    Returns:
        Network -> file, for all of them.

    Raises:
        CheckpointError: a network has no file that can be read, several, or only a pickle.
    """
    found: dict[str, list[Path]] = {network: [] for network in networks}
    files = files_below(folder)
    networks_of, unreadable = _identified(file for file in files if file.suffix == ".safetensors")
    for file, network in networks_of.items():
        if network in found:
            found[network].append(file)
    for network, candidates in found.items():
        if len(candidates) > 1:
            listed = ", ".join(str(file.relative_to(folder)) for file in candidates[:NAMED])
            option = network.replace("_", "-")
            raise CheckpointError(
                f"{folder}: {len(candidates)} files hold a {network} ({listed}); name one: --{option} FILE"
            )
    missing = [network for network, candidates in found.items() if not candidates]
    if missing:
        raise CheckpointError(_nothing_found(folder, files, unreadable, missing, only_some=len(missing) < len(found)))
    for reason in unreadable:
        logger.info("passed over: %s", reason)
    return {network: candidates[0] for network, candidates in found.items()}


def _identified(files: Iterable[Path]) -> tuple[dict[Path, str], list[str]]:
    """File -> network of those that hold one, and why others cannot be read."""
    found, unreadable = {}, []
    for file in files:
        try:
            network = identify(name.removeprefix(WRAPPING) for name in read_header(file))
        except CheckpointError as exc:
            unreadable.append(str(exc))
            continue
        if network is not None:
            found[file] = network
    return found, unreadable


def _nothing_found(
    folder: Path, files: Iterable[Path], unreadable: list[str], missing: list[str], *, only_some: bool
) -> str:
    """Why a folder has no file of a network, as far as its other files tell."""
    if unreadable:
        more = f" ({len(unreadable) - 1} other files cannot be read either)" if len(unreadable) > 1 else ""
        return f"{folder}: no single file of the {missing[0]} can be read: {unreadable[0]}{more}"
    for file in files:
        if only_some and file.suffix in PICKLES:
            return _refused_pickle(file, missing[0])
        if file.suffix == ".gguf" and file.is_file() and (instead := found_instead(file)) is not None:
            return f"{file} {instead}, such as {INSTEAD[missing[0]]}"
    return (
        f"{folder}: no model_index.json, and no single file of the {missing[0]}; expected a checkpoint in diffusers "
        f"layout, or files such as {', '.join(INSTEAD[network] for network in missing)}"
    )


def _refused_pickle(file: Path, network: str) -> str:
    return (
        f"{file} is a pickle, which can run code when it is loaded; use {INSTEAD[network]} of ComfyUI's repackaged "
        "files instead, or the checkpoint Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    )


def _any_starts(tensors: Mapping[str, StoredTensor], start: str) -> bool:
    return any(name.startswith(start) for name in tensors)
