"""transformers' UMT5 encoder run block by block, in float32: whole, the true size does not fit small machines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from transformers import UMT5Config
from transformers.models.umt5.modeling_umt5 import UMT5Block, UMT5LayerNorm

Array = NDArray[np.float32]


class ReferenceEncoder:
    """The modules of transformers, each loaded when it is run.

    Args:
        folder: `text_encoder` of a checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self._config = UMT5Config.from_pretrained(folder, local_files_only=True, attn_implementation="eager")
        indexes = list(folder.glob("*.index.json"))
        if indexes:
            places: dict[str, str] = json.loads(indexes[0].read_text(encoding="utf-8"))["weight_map"]
            self._files = {name: folder / file for name, file in places.items()}
        else:
            (file,) = folder.glob("*.safetensors")
            with safe_open(file, "pt") as tensors:
                self._files = dict.fromkeys(tensors.keys(), file)

    @property
    def layers(self) -> int:
        return int(self._config.num_layers)

    def embed(self, ids: NDArray[np.int64]) -> Array:
        """Embeddings (1, L, D) of token ids (L,)."""
        name = "shared.weight"
        with safe_open(self._files[name], "pt") as tensors:
            table = tensors.get_slice(name)
            rows = torch.stack([table[int(i)] for i in ids]).float()
        return np.asarray(rows[None].numpy())

    def block(self, index: int, states: Array) -> Array:
        """Hidden states (1, L, D) after a block."""
        with torch.device("meta"):
            module = UMT5Block(self._config, layer_idx=index)
        return self._run(module, f"encoder.block.{index}.", states)

    def finish(self, states: Array) -> Array:
        """Prompt embeddings (1, L, D): what the final norm makes of the last block's hidden states."""
        with torch.device("meta"):
            module = UMT5LayerNorm(self._config.d_model, eps=self._config.layer_norm_epsilon)
        return self._run(module, "encoder.final_layer_norm.", states)

    def _run(self, module: Any, prefix: str, states: Array) -> Array:
        weights = {}
        for name in module.state_dict():
            with safe_open(self._files[prefix + name], "pt") as tensors:
                weights[name] = tensors.get_tensor(prefix + name).float()
        module.load_state_dict(weights, assign=True)
        module.eval()
        with torch.inference_mode():
            result = module(torch.from_numpy(states))
        return np.asarray(result[0] if isinstance(result, tuple) else result)
