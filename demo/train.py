"""Trains the demo checkpoint `bouncing-shapes` from nothing but the clips that `clips.py` draws.

Run it again after an interruption: every stage continues where its state in the work folder ends.

    python demo/train.py                      # hours on two cores
    python demo/train.py --vae-seconds 60 --denoiser-seconds 60 --clips 200 --output /tmp/quick
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import clips
import numpy as np
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from state import load_state, save_state
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from train_denoiser import FLOW_SHIFT, Networks, train_denoiser
from train_vae import CONFIG, as_video, encode, train_vae
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

HERE = Path(__file__).resolve().parent
ENCODE_BATCH = 8
GENERATION = {
    "height": clips.SIZE,
    "width": clips.SIZE,
    "num_frames": clips.FRAMES,
    "fps": clips.FPS,
    "num_inference_steps": 20,
    "guidance_scale": 5.0,
    "negative_prompt": "",
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A unigram tokenizer with one piece per English word and per Chinese character, and UMT5's special tokens.

    Its vocabulary is counted, not trained: the same pieces and ids at every start, which a resumed training needs.
    """
    splitter = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(), pre_tokenizers.Split(Regex("[\\u4e00-\\u9fff]|[,:]"), "isolated")]
    )
    words = {
        word
        for scene in clips.scenes(held=False)
        for language in ("en", "zh")
        for text in clips.prompts(scene, language)
        for word, _ in splitter.pre_tokenize_str(text)
    }
    letters = {letter for word in words for letter in word} - words
    special = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>")]
    # a word as a whole is likelier than its letters, which are there for words never seen
    pieces = [(word, -5.0) for word in sorted(words)] + [(letter, -10.0) for letter in sorted(letters)]
    raw = Tokenizer(models.Unigram(special + pieces, unk_id=2, byte_fallback=False))
    raw.pre_tokenizer, raw.decoder = splitter, decoders.Metaspace()
    raw.add_special_tokens([token for token, _ in special])
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def encode_clips(work: Path, vae: AutoencoderKLWan, count: int) -> dict[str, Tensor]:
    """Draws and encodes the denoiser's training clips.

    Returns:
        `latents` (N, C, f, h, w) of zero mean and unit variance per channel, `scenes` (N,) as indices, and the `mean`
        and `std` (C,) that were taken out.
    """
    file = work / "latents.pt"
    state = load_state(file)
    if state is not None and len(state["scenes"]) >= count:
        return state
    rng, scenes = np.random.default_rng(2), clips.scenes(held=False)
    parts, chosen = [], torch.arange(count) % len(scenes)  # every scene equally often
    for start in range(0, count, ENCODE_BATCH):
        drawn = [clips.draw(scenes[int(i)], rng) for i in chosen[start : start + ENCODE_BATCH]]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            parts.append(encode(vae, as_video(drawn)).float())
        if start % 800 == 0:
            print(f"encode {start} of {count}", flush=True)
    latents = torch.cat(parts)
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    shape = (1, -1, 1, 1, 1)
    result = {
        "latents": (latents - mean.view(shape)) / std.view(shape),
        "scenes": chosen,
        "mean": mean,
        "std": std,
    }
    save_state(file, **result)
    return result


def save(
    folder: Path,
    vae: AutoencoderKLWan,
    data: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerFast,
    text_encoder: UMT5EncoderModel,
    transformer: WanTransformer3DModel,
) -> None:
    """Writes the checkpoint in diffusers layout."""
    statistics = {f"latents_{name}": [round(float(v), 6) for v in data[name]] for name in ("mean", "std")}
    final_vae = AutoencoderKLWan(**CONFIG, **statistics)
    final_vae.load_state_dict(vae.state_dict())
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=FLOW_SHIFT, num_train_timesteps=1000
    )
    final = WanTransformer3DModel.from_config(transformer.config)  # without training's attention processor
    final.load_state_dict(transformer.state_dict())
    pipe = WanPipeline(
        tokenizer=tokenizer, text_encoder=text_encoder, transformer=final, vae=final_vae, scheduler=scheduler
    )
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    pipe.save_pretrained(temporary)
    text = json.dumps(GENERATION, indent=2) + "\n"
    (temporary / "generation_config.json").write_text(text, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def save_snapshot(work: Path, output: Path) -> None:
    """Writes the checkpoint from the state of a training that still runs."""
    tokenizer = make_tokenizer()
    vae = train_vae(work, 0)
    data, state = load_state(work / "latents.pt"), load_state(work / "denoiser.pt")
    if data is None or state is None:
        raise SystemExit(f"{work} holds no state of a denoiser yet; train first")
    networks = Networks.make(len(tokenizer))
    networks.modules().load_state_dict(state["average"])
    save(output, vae, data, tokenizer, networks.text_encoder, networks.transformer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=HERE.parent / "build" / "demo-train", help="state of the training")
    parser.add_argument("--output", type=Path, default=HERE / "bouncing-shapes", help="checkpoint to write")
    parser.add_argument("--vae-seconds", type=float, default=3600.0, help="training of the VAE on clips")
    parser.add_argument("--denoiser-seconds", type=float, default=5400.0, help="training of the denoiser")
    parser.add_argument("--clips", type=int, default=6048, help="clips encoded for the denoiser")
    parser.add_argument("--snapshot", action="store_true", help="write the checkpoint from the state there is")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    if options.snapshot:
        save_snapshot(options.work, options.output)
        return
    tokenizer = make_tokenizer()
    vae = train_vae(options.work, options.vae_seconds)
    data = encode_clips(options.work, vae, options.clips)
    text_encoder, transformer = train_denoiser(options.work, options.denoiser_seconds, tokenizer, data)
    save(options.output, vae, data, tokenizer, text_encoder, transformer)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
