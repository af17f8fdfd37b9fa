"""Prompt embeddings on disk: made where the text encoder runs, used where it does not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from t2v_rt.engines.bundle.manifest import Manifest, to_plain
from t2v_rt.errors import RequestError
from t2v_rt.runtime.array_file import load_arrays, save_arrays
from t2v_rt.runtime.families import family_of

Array = NDArray[np.float32]
PROMPT_EMBEDS = "prompt embeddings"  # as errors call what such a file keeps
ARRAYS = ("prompt_embeds", "negative_prompt_embeds")


@dataclass(frozen=True)
class EncodedTexts:
    """What such a file says of its arrays.

    Args:
        encoder_id: of the text encoder and tokenizer.
        prompt: its text.
        negative_prompt: the negative prompt's text.
    """

    encoder_id: str
    prompt: str
    negative_prompt: str


@dataclass(frozen=True)
class PromptEmbeds:
    """A prompt and a negative prompt, encoded.

    Args:
        prompt: text of the prompt.
        negative_prompt: text of the negative prompt.
        prompt_embeds: float32 (1, L, D), padded with zeros.
        negative_prompt_embeds: float32 (1, L, D), padded with zeros.
    """

    prompt: str
    negative_prompt: str
    prompt_embeds: Array
    negative_prompt_embeds: Array


def save_prompt(path: str | Path, embeds: PromptEmbeds, manifest: Manifest) -> None:
    """Writes embeddings, each at its own length, whole or not at all; the same ones give the same bytes.

    Args:
        path: of the .npz file.
        embeds: to write.
        manifest: of the bundle that encoded them.

    Raises:
        RequestError: the path cannot be written to.
    """
    settings = to_plain(EncodedTexts(manifest.encoder_id, embeds.prompt, embeds.negative_prompt))
    rule = family_of(manifest.model).text
    arrays = {name: rule.unpadded(getattr(embeds, name)[0]) for name in ARRAYS}
    save_arrays(path, PROMPT_EMBEDS, arrays, settings)


def load_prompt(path: str | Path, manifest: Manifest) -> PromptEmbeds:
    """Reads what `save_prompt` wrote, padded as the pipeline takes it.

    Args:
        path: of the file.
        manifest: of the bundle that will use them.

    Raises:
        RequestError: the file is missing, damaged, or of another text encoder.
    """
    arrays, texts = load_arrays(path, PROMPT_EMBEDS, ARRAYS, "t2v-rt encode", EncodedTexts)
    if texts.encoder_id != manifest.encoder_id:
        raise RequestError(
            f"{path} was made by the text encoder {texts.encoder_id}, the bundle's is {manifest.encoder_id}; make it "
            "again with t2v-rt encode and a bundle of the same checkpoint"
        )
    text, rule = manifest.model.text, family_of(manifest.model).text
    for array in arrays:
        if array.dtype != np.float32 or array.ndim != 2 or array.shape[1] != text.dim:
            raise RequestError(
                f"{path} holds {array.dtype} {list(array.shape)}; expected float32 [positions, {text.dim}]"
            )
        if len(array) > text.length or not np.all(np.isfinite(array)):
            raise RequestError(f"{path} is damaged: too many positions or values that are not finite; make it again")
    padded = (rule.padded(array, text.length)[None] for array in arrays)
    return PromptEmbeds(texts.prompt, texts.negative_prompt, *padded)
