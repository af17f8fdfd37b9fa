"""The demo's bundle for tests that need no reference: built in half a second, without torch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

from t2v_rt import build_engines

CHECKPOINT = Path(__file__).resolve().parents[2] / "demo" / "bouncing-shapes"


def build_demo(folder: Path) -> Path:
    """A bundle of the demo in a new folder `demo` of `folder`."""
    build_engines(CHECKPOINT, folder / "demo")
    return folder / "demo"


def other_checkpoint(folder: Path) -> Path:
    """A checkpoint of the same shapes whose matrices of text encoder and denoiser are 1.25 times the demo's."""
    shutil.copytree(CHECKPOINT, folder)
    for file in [*folder.glob("text_encoder/*.safetensors"), *folder.glob("transformer/*.safetensors")]:
        content = bytearray(file.read_bytes())
        data = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:data])
        for name, tensor in header.items():
            if name != "__metadata__" and len(tensor["shape"]) > 1:
                kind = {"F32": np.float32, "F16": np.float16}[tensor["dtype"]]
                start, end = (data + offset for offset in tensor["data_offsets"])
                values = np.frombuffer(content, kind, (end - start) // np.dtype(kind).itemsize, start)
                content[start:end] = (values * kind(1.25)).astype(kind).tobytes()
        file.write_bytes(content)
    return folder
