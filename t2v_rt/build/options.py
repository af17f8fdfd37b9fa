"""What may be asked of a build: the one list of these options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path

from t2v_rt.engines.backend_info import check_backend, check_options
from t2v_rt.engines.bundle.profiles import Accumulation, Sizes, parse_profiles
from t2v_rt.engines.tensorrt.libraries import check_targets
from t2v_rt.errors import RequestError
from t2v_rt.export.precision import ACCUMULATIONS, check_accumulation
from t2v_rt.export.quantize import Quantization
from t2v_rt.numbers import as_flag
from t2v_rt.options import option
from t2v_rt.runtime.memory.plan import parse_bytes


@dataclass(frozen=True)
class BuildOptions:
    """What is asked of a build: all that decides what is in the bundle.

    Args:
        checkpoint: folder in diffusers layout, with `model_index.json` and a folder per component, safetensors only; or
            `owner/name` on the Hugging Face hub; or folder with a single safetensors file for each network, in Wan's
            own names. Left out where `files` has everything.
        files: `transformer`, `vae`, `text_encoder` (single safetensors files) and `tokenizer` (`tokenizer.json`, or its
            folder) that take the place of the checkpoint's own.
        revision: branch, tag or commit of a checkpoint on the hub.
        backend: `onnxruntime`, `tensorrt-rtx` (builds plans for named GPUs, needs none) or `tensorrt` (builds plans for
            the GPU it runs on).
        precision: precision of matmul and convolution operands: `fp32` (ONNX Runtime's, where it is left out), `fp16`
            (that of plans, where it is left out) or `bf16` (of plans: denoiser and text encoder; not for sm75).
        height: default height of requests in pixels, instead of the checkpoint's; plans are built for it, and for them
            it may be a range or several sizes, such as 480:720 or 480,832.
        width: default width of requests in pixels, instead of the checkpoint's; plans are built for it, and for them it
            may be a range or several sizes, such as 480:832 or 480,832.
        num_frames: default number of frames of requests, instead of the checkpoint's; plans are built for it, and for
            them it may be a range or several numbers, such as 17:81 or 33,81.
        gpus: GPUs that TensorRT-RTX builds plans for, such as sm86,sm89, out of sm75, sm80, sm86, sm89, sm120 and
            sm121. Where it is left out, this machine's own, and where there is none, sm80, sm86, sm89 and sm120. One
            takes less memory than several: the denoiser of Wan2.1-T2V-1.3B at 832x480 with 81 frames works in 0.93 GB
            of sm89 alone, and in 1.09 GB of these four.
        vram_budget: memory of the smallest card that the bundle is for, such as 4GiB: the text encoder comes in engines
            of which one at a time fits there. Where it is left out, an engine has 3 GB at most, which suits most cards.
        with_text_encoder: whether the bundle gets its text encoder; without it, videos are made from prompt embeddings,
            which `t2v-rt encode` writes.
        text_encoder_weights: `int8` or `int4` stores the text encoder's matrices in so many bits, and measures and
            tells what that costs; float weights where it is left out.
        attention_accumulation: what attention of float16 plans adds up in. `fp32` (where it is left out) is right for
            any values. `fp16` is for GeForce, whose float32 sums take twice the time: the denoiser's attention among a
            video's tokens is then off by up to 1 % of its largest value at 832x480 and 2 % at 1280x720, 81 frames,
            instead of 0.1 % (emulated: benchmarks/results/attention_sums.json). Plans of precision bf16 add up in
            float32 always.

    Raises:
        BackendError: an unknown backend or GPU, or GPUs for a backend that does not build for named ones.
        RequestError: a setting is invalid by itself.
    """

    checkpoint: str | Path | None = option(
        None,
        positional=True,
        metavar="CHECKPOINT",
        help="folder in diffusers layout, owner/name on the Hugging Face hub, or folder with a single safetensors file "
        "for each network; left out where --transformer, --vae, --text-encoder and --tokenizer name everything",
    )
    _: KW_ONLY
    files: Mapping[str, str | Path] | None = None  # on the command line, an option for each
    revision: str | None = option(None, metavar="NAME")
    backend: str = option("onnxruntime", metavar="NAME")
    precision: str | None = option(None, metavar="KIND")
    height: Sizes = option(None, metavar="SIZE")
    width: Sizes = option(None, metavar="SIZE")
    num_frames: Sizes = option(None, metavar="SIZE")
    gpus: str | Sequence[str] | None = option(None, flag="--gpu", metavar="NAMES")
    vram_budget: int | str | None = option(None, metavar="SIZE")
    with_text_encoder: bool = option(
        True,
        flag="--without-text-encoder",
        help="leave the text encoder out: videos are made from prompt embeddings, which t2v-rt encode writes",
    )
    text_encoder_weights: str | None = option(None, metavar="KIND")
    attention_accumulation: str | None = option(None, metavar="KIND")

    def __post_init__(self) -> None:
        check_backend(self.backend)
        targets = self.targets  # refuses what is no GPU, or not for this backend
        parse_profiles(self.height, self.width, self.num_frames, (1, 1, 1))
        if self.precision == "bf16" and "sm75" in targets:
            raise RequestError(
                "precision is 'bf16', which sm75 does not multiply; use fp16, or leave sm75 out of --gpu"
            )
        if self.vram_budget is not None:
            parse_bytes(self.vram_budget)
        if as_flag(self.with_text_encoder) is None:
            raise RequestError(f"with_text_encoder is {self.with_text_encoder!r}; expected True or False")
        if self.text_encoder_weights is not None:
            Quantization(self.text_encoder_weights, "MatMulNBits")  # refuses an unknown kind
        check_options(self.backend, {"attention_accumulation": self.attention_accumulation})
        if self.accumulation == "fp16" and self.precision == "bf16":
            raise RequestError(
                "attention_accumulation is 'fp16' and precision 'bf16', whose sums are float32; leave one of them out"
            )

    @property
    def accumulation(self) -> Accumulation:
        """What attention of plans adds up in."""
        return check_accumulation(self.attention_accumulation or ACCUMULATIONS[0])

    @cached_property  # whoever asks again gets the same, whatever became of the GPU
    def targets(self) -> tuple[str, ...]:
        """GPUs by name that plans are built for, oldest first; none where the backend does not build for named ones."""
        return check_targets(self.backend, self.gpus)
