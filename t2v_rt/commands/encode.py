"""The encode command: a prompt to a file of embeddings, for machines that have no room for the text encoder."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t2v_rt.commands.parsing import declare_options, given_options
from t2v_rt.options import documented_by, option
from t2v_rt.runtime.array_file import check_array_path
from t2v_rt.runtime.options import BackendOptions
from t2v_rt.runtime.pipeline import TextToVideoPipeline
from t2v_rt.runtime.prompts.file import PROMPT_EMBEDS, PromptEmbeds, save_prompt
from t2v_rt.runtime.prompts.tokenizer import check_text
from t2v_rt.system.outputs import check_apart
from t2v_rt.system.resources import peak_rss_bytes

EXAMPLE = 'example: t2v-rt encode "a red ball bouncing" --engines build/demo --output ball.npz'


@dataclass(frozen=True, kw_only=True)
class EncodeOptions(BackendOptions):
    """The options of the command.

    Args:
        prompt: what to show, in English or Chinese.
        engines: folder of a bundle that has its text encoder.
        output: .npz file that the embeddings are written to, for `t2v-rt generate --prompt-embeds`.
        negative_prompt: what to steer away from; the bundle's own where it is left out.
        vram_budget: memory the engines may take, such as `8GiB`; what the card has free where it is left out.
    """

    prompt: str = option(positional=True, metavar="PROMPT")
    engines: str = option(metavar="BUNDLE")
    output: str = option(metavar="FILE")
    negative_prompt: str | None = option(None, metavar="TEXT")
    vram_budget: int | str | None = option(None, metavar="SIZE")


def declare(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.epilog = EXAMPLE
    declare_options(parser, EncodeOptions)


def run(parsed: argparse.Namespace) -> dict[str, Any]:
    """Encodes the prompts; returns the report."""
    options = EncodeOptions(**given_options(EncodeOptions, parsed))
    return encode(
        options.prompt,
        options.output,
        options.engines,
        negative_prompt=options.negative_prompt,
        backend=options.backend,
        provider=options.provider,
        threads=options.threads,
        device=options.device,
        vram_budget=options.vram_budget,
        trust=options.trust,
    )


def describe(report: Mapping[str, Any]) -> list[str]:
    """The report for a person."""
    return [
        f"output   {report['output']}",
        f"encoder  {report['encoder_id']}",
        f"tokens   {' and '.join(map(str, report['tokens']))}",
        f"seconds  {report['seconds']:.2f}",
    ]


@documented_by(EncodeOptions, BackendOptions)
def encode(
    prompt: str,
    output: str | Path,
    folder: str | Path,
    *,
    negative_prompt: str | None = None,
    backend: str | None = None,
    provider: str | None = None,
    threads: int | None = None,
    device: int | None = None,
    vram_budget: int | str | None = None,
    trust: bool = False,
) -> dict[str, Any]:
    """Encodes a prompt and a negative one.

    Args:
        folder: folder of a bundle with its text encoder.

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
        folder, backend, vram_budget, provider=provider, threads=threads, device=device, trust=trust
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
