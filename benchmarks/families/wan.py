"""Wan2.1 as diffusers has it."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Wan:
    """The family; see `ReferenceFamily`."""

    def compile(self, pipe: Any) -> None:
        torch = import_module("torch")
        pipe.transformer = torch.compile(pipe.transformer)
        pipe.vae.decoder = torch.compile(pipe.vae.decoder)

    def denoiser(self, checkpoint: Path, dtype: Any) -> Any:
        kind = import_module("diffusers").WanTransformer3DModel
        return kind.from_pretrained(checkpoint / "transformer", torch_dtype=dtype)

    def predict(self, network: Any, latents: Any, timestep: float, embeds: Any) -> Any:
        t = import_module("torch").tensor([timestep], device=latents.device)
        return network(latents, t, embeds, return_dict=False)[0]

    def text_pipeline(self, checkpoint: Path, dtype: Any) -> Any:
        kind = import_module("diffusers").WanPipeline
        return kind.from_pretrained(checkpoint, transformer=None, vae=None, torch_dtype=dtype)

    def encode(self, pipe: Any, prompt: str, length: int) -> Any:
        embeds, _ = pipe.encode_prompt([prompt], do_classifier_free_guidance=False, max_sequence_length=length)
        return embeds

    def vae(self, checkpoint: Path, dtype: Any) -> Any:
        return import_module("diffusers").AutoencoderKLWan.from_pretrained(checkpoint / "vae", torch_dtype=dtype)

    def decode_first(self, vae: Any, latents: Any) -> Any:
        vae.clear_cache()
        return self._decode(vae, latents, first_chunk=True)

    def decode_next(self, vae: Any, latents: Any) -> Any:
        return self._decode(vae, latents, first_chunk=False)

    def _decode(self, vae: Any, latents: Any, first_chunk: bool) -> Any:
        """One latent frame, with the caches that the frames before it left, as the VAE's own loop decodes them."""
        vae._conv_idx = [0]
        caches = {"feat_cache": vae._feat_map, "feat_idx": vae._conv_idx}
        return vae.decoder(vae.post_quant_conv(latents), first_chunk=first_chunk, **caches)


FAMILY = Wan()
