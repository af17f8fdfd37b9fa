"""The encode command: a prompt to a file of embeddings, for machines that have no room for the text encoder."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from t2v_rt.runtime.array_file import check_array_path
from t2v_rt.runtime.pipeline import TextToVideoPipeline
from t2v_rt.runtime.prompts.file import PROMPT_EMBEDS, PromptEmbeds, save_prompt
from t2v_rt.runtime.prompts.tokenizer import check_text
from t2v_rt.system.outputs import check_apart
from t2v_rt.system.resources import peak_rss_bytes


def encode(
    prompt: str,
    output: str | Path,
    folder: str | Path,
    *,
    negative_prompt: str | None = None,
    backend: str | None = None,
    provider: str | None = None,
    threads: int | None = None,
    vram_budget: int | str | None = None,
    trust: bool = False,
) -> dict[str, Any]:
    """Encodes a prompt and a negative one.

    Args:
        prompt: the text.
        output: name of the .npz file.
        folder: of a bundle with its text encoder.
        negative_prompt: None for the bundle's own.
        backend: as in `TextToVideoPipeline.from_pretrained`, like those that follow.
        provider: likewise.
        threads: likewise.
        vram_budget: likewise.
        trust: likewise.

    Returns:
        `output`, `encoder_id`, both texts, `tokens` of each, `seconds` and `peak_rss_bytes`.

    Raises:
        BundleError: the bundle cannot be used.
        BackendError: the backend cannot be used here.
        RequestError: the output cannot be written, or the bundle has no text encoder.
        EngineError: the text encoder failed.
    """
    check_apart({"the output": check_array_path(output, PROMPT_EMBEDS)}, {"the bundle": folder})
    check_text("prompt", prompt)
    check_text("negative_prompt", negative_prompt)
    pipe = TextToVideoPipeline.from_pretrained(
        folder, backend, vram_budget, provider=provider, threads=threads, trust=trust
    )
    negative = pipe.manifest.defaults.negative_prompt if negative_prompt is None else negative_prompt
    start = time.perf_counter()
    with pipe:
        both = pipe.encode_prompt([prompt, negative])
    seconds = time.perf_counter() - start
    save_prompt(output, PromptEmbeds(prompt, negative, both[:1], both[1:]), pipe.manifest)
    return {
        "output": str(output),
        "encoder_id": pipe.manifest.encoder_id,
        "prompt": prompt,
        "negative_prompt": negative,
        "tokens": [len(pipe.stages.tokenizer.encode(text)) for text in (prompt, negative)],
        "seconds": seconds,
        "peak_rss_bytes": peak_rss_bytes(),
    }
