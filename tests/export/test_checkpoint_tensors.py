"""The tensors of random checkpoints are those that diffusers and transformers know."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from t2v_rt.benchmarks.wan_tensors import CONFIGS, text_encoder_tensors, transformer_tensors, vae_tensors
from tests.support.checkpoints import TINY

ALL = {"true": CONFIGS, **{tiny.name: tiny.configs() for tiny in TINY}}


@pytest.mark.parametrize("configs", ALL.values(), ids=ALL)
def test_tensors_are_those_of_the_real_networks(configs: dict[str, Any]) -> None:
    with torch.device("meta"):
        references = (
            (WanTransformer3DModel.from_config(configs["transformer"]), transformer_tensors(configs["transformer"])),
            (AutoencoderKLWan.from_config(configs["vae"]), vae_tensors(configs["vae"])),
            (UMT5EncoderModel(UMT5Config(**configs["text_encoder"])), text_encoder_tensors(configs["text_encoder"])),
        )
    for network, tensors in references:
        expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
        expected.pop("encoder.embed_tokens.weight", None)  # tied to shared.weight
        assert dict(tensors) == expected
