"""The Wan2.1 VAE decoder as three ONNX graphs: a head of the first latent frame and of each later one, and a tail.

Source of the architecture: diffusers `AutoencoderKLWan`. Its convolutions are causal in time: each looks back two
frames, kept from one call to the next. Here these caches are engine state, zero at first; a frame further back than the
video's start is zero in the cache, as in the reference's padding.

- `head_first` makes one frame of features of the first latent frame. Nothing lies before that frame, so each kernel
  needs only its last slice in time, and time is not doubled.
- `head_next` makes `temporal_factor` frames of features of a later latent frame.
- `tail` makes one frame of pixels from one frame of features, the first like any other.

The head ends where time is doubled for the last time, before the upsampling in space that follows. After its attention
among the pixels of a frame everything is local, so the tail, where nearly all memory is, can work on tiles of the
features: with `halo` more on each side than it keeps, a tile is what the whole would have been, but for rounding. And
it works on one frame at a time, so that it needs memory for one.

Frames are the batch axis (T, C, H, W), and a kernel over three frames is a flat one over their channels side by side:
two-dimensional convolutions are what every backend does fastest. On ONNX Runtime's CPU they also sum in one order
whatever the number of threads, which three-dimensional ones do not on small images.

The cache of a convolution that sees one frame a call is two states of one frame, the later of which becomes the earlier
after the call: nothing is copied, and only one of them is written.

All graphs read the same weight file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t2v_rt.engines.bundle.manifest import TileSpec
from t2v_rt.engines.specs import StateSpec, TensorSpec
from t2v_rt.errors import CheckpointError
from t2v_rt.export.attention import attend
from t2v_rt.export.config import option, require
from t2v_rt.export.graph import GraphWriter

NORM_FLOOR = 1e-12  # of torch.nn.functional.normalize
CACHE_FRAMES = 2  # a causal kernel of three frames looks back two


@dataclass(frozen=True)
class VaeConfig:
    """What of an AutoencoderKLWan's config shapes the decoder."""

    base_dim: int
    z_dim: int
    dim_mult: tuple[int, ...]
    res_blocks: int
    time_upsample: tuple[bool, ...]
    out_channels: int
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the middle, then of each level from low to full resolution."""
        return tuple(self.base_dim * m for m in (self.dim_mult[-1], *reversed(self.dim_mult)))

    @property
    def spatial_factor(self) -> int:
        return int(2 ** (len(self.dim_mult) - 1))

    @property
    def temporal_factor(self) -> int:
        return int(2 ** sum(self.time_upsample))

    @property
    def head_levels(self) -> int:
        """Levels of the head: all that double time, and all but the last two."""
        last = max((level for level, doubles in enumerate(self.time_upsample) if doubles), default=0)
        return max(last + 1, len(self.dim_mult) - 2)

    @property
    def tiles(self) -> TileSpec:
        """Where the tail begins, and how far its kernels see there."""
        upsampled = len(self.dim_mult) - self.head_levels
        reach = 1  # the last convolution
        for _ in range(upsampled):
            reach += 2 * (self.res_blocks + 1)
            reach = (reach + 1 + 1) // 2  # the convolution after the upsampling, then half the resolution
        return TileSpec(scale=self.spatial_factor // 2**upsampled, upscale=2**upsampled, halo=reach)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> VaeConfig:
        """Reads `vae/config.json`; raises CheckpointError for another architecture, Wan2.2's VAE among them."""
        require(config, "vae", "_class_name", "AutoencoderKLWan")
        require(config, "vae", "is_residual", False, default=False)
        require(config, "vae", "patch_size", None, default=None)
        base_dim = option(config, "vae", "base_dim", int, 96)
        z_dim = option(config, "vae", "z_dim", int, 16)
        dim_mult = tuple(option(config, "vae", "dim_mult", list, [1, 2, 4, 4]))
        down = tuple(bool(flag) for flag in option(config, "vae", "temperal_downsample", list, [False, True, True]))
        mean, std = (tuple(option(config, "vae", f"latents_{part}", list, [])) for part in ("mean", "std"))
        if len(down) != len(dim_mult) - 1 or not down or not len(mean) == len(std) == z_dim:
            raise CheckpointError(
                f"vae/config.json: {len(dim_mult)} levels with {len(down)} temporal flags, {z_dim} latent channels "
                f"with {len(mean)} means and {len(std)} deviations; expected one flag less than levels, one of each "
                "per channel"
            )
        result = cls(
            base_dim=option(config, "vae", "decoder_base_dim", int, base_dim, nullable=True),
            z_dim=z_dim,
            dim_mult=dim_mult,
            res_blocks=option(config, "vae", "num_res_blocks", int, 2),
            time_upsample=down[::-1],
            out_channels=option(config, "vae", "out_channels", int, 3),
            latents_mean=mean,
            latents_std=std,
        )
        require(config, "vae", "scale_factor_spatial", result.spatial_factor, default=result.spatial_factor)
        require(config, "vae", "scale_factor_temporal", result.temporal_factor, default=result.temporal_factor)
        return result


@dataclass
class VaeDecoderGraph:
    """Writes one of the decoder's graphs.

    Widths, scales and frames in its methods are those of a later latent frame's graph at that depth.

    Args:
        g: the graph to write into.
        config: of the VAE.
        first: whether it is the graph of the first latent frame.
    """

    g: GraphWriter
    config: VaeConfig
    first: bool = False
    states: list[StateSpec] = field(default_factory=list)

    def write_head(self) -> list[StateSpec]:
        """Writes latents -> features; returns the states it reads and writes, in graph order."""
        g, config = self.g, self.config
        z, width = config.z_dim, config.widths[0]
        latents = g.input(TensorSpec("latents", "float32", (1, z, "height", "width")))
        x = self._pointwise(g.half(latents), "post_quant_conv", z, z)
        x = self._causal_conv(x, "decoder.conv_in", z, width, 1, 1)
        x = self._mid_block(x, width)
        scale = frames = 1
        for level in range(config.head_levels):
            if level > 0:
                x, scale = self._double_space(x, level - 1, width), 2 * scale
            x, width = self._level(x, level, scale, frames)
            if config.time_upsample[level]:
                x, frames = self._double_time(x, level, width, scale, frames), 2 * frames
        shape = (1 if self.first else frames, width, *_image(scale))
        g.output(x, TensorSpec("features", g.compute_dtype, shape))
        return self.states

    def write_tail(self) -> list[StateSpec]:
        """Writes one frame's features -> the frame, of the whole or of a tile; returns the states that it keeps."""
        g, config = self.g, self.config
        width, scale = config.widths[config.head_levels], 1
        x = g.input(TensorSpec("features", g.compute_dtype, (1, width, "height", "width")))
        for level in range(config.head_levels, len(config.dim_mult)):
            x, scale = self._double_space(x, level - 1, width), 2 * scale
            x, width = self._level(x, level, scale, 1)
        x = g.half(g.silu(self._rms_norm(x, "decoder.norm_out", width, 4)))
        x = g.full(self._causal_conv(x, "decoder.conv_out", width, config.out_channels, scale, 1))
        g.output(x, TensorSpec("frames", "float32", (1, config.out_channels, *_image(scale))))
        return self.states

    def _level(self, x: str, level: int, scale: int, frames: int) -> tuple[str, int]:
        """The residual blocks of a level; returns its width too."""
        config = self.config
        width = config.widths[level] // (2 if level > 0 else 1)  # the upsampling before it halves the channels
        for block in range(config.res_blocks + 1):
            name = f"decoder.up_blocks.{level}.resnets.{block}"
            x = self._res_block(x, name, width, config.widths[level + 1], scale, frames)
            width = config.widths[level + 1]
        return x, width

    # -- the blocks --------------------------------------------------------------------------------------------------

    def _mid_block(self, x: str, width: int) -> str:
        x = self._res_block(x, "decoder.mid_block.resnets.0", width, width, 1, 1)
        x = self._frame_attention(x, "decoder.mid_block.attentions.0", width)
        return self._res_block(x, "decoder.mid_block.resnets.1", width, width, 1, 1)

    def _res_block(self, x: str, name: str, n_in: int, n_out: int, scale: int, frames: int) -> str:
        g = self.g
        shortcut = x if n_in == n_out else self._pointwise(x, f"{name}.conv_shortcut", n_in, n_out)
        y = g.half(g.silu(self._rms_norm(x, f"{name}.norm1", n_in, 4)))
        y = self._causal_conv(y, f"{name}.conv1", n_in, n_out, scale, frames)
        y = g.half(g.silu(self._rms_norm(y, f"{name}.norm2", n_out, 4)))
        return g.add(self._causal_conv(y, f"{name}.conv2", n_out, n_out, scale, frames), shortcut)

    def _frame_attention(self, x: str, name: str, width: int) -> str:
        """Single-head attention among the pixels of the one frame there is at this depth."""
        g = self.g
        normed = g.half(self._rms_norm(x, f"{name}.norm", width, 3))
        qkv = g.op(
            "Conv",
            normed,
            g.weight(f"{name}.to_qkv.weight", (3 * width, width, 1, 1)),
            self._bias(f"{name}.to_qkv", 3 * width),
        )
        tokens = g.transpose(g.reshape(qkv, [1, 3 * width, -1]), [0, 2, 1])
        attended = attend(g, *g.ops("Split", 3, tokens, axis=2, num_outputs=3), heads=1)
        image = g.op("Reshape", g.transpose(attended, [0, 2, 1]), g.op("Shape", x))
        weight = g.weight(f"{name}.proj.weight", (width, width, 1, 1))
        return g.add(g.op("Conv", image, weight, self._bias(f"{name}.proj", width)), x)

    def _double_space(self, x: str, level: int, width: int) -> str:
        """The upsampling in space that ends a level: height and width double, channels halve."""
        g, name = self.g, f"decoder.up_blocks.{level}.upsamplers.0.resample.1"
        x = g.op(
            "Resize",
            x,
            "",
            g.const([1, 1, 2, 2], np.float32),
            mode="nearest",
            coordinate_transformation_mode="asymmetric",
            nearest_mode="floor",
        )
        weight = g.weight(f"{name}.weight", (width // 2, width, 3, 3))
        return g.op("Conv", x, weight, self._bias(name, width // 2), pads=[1, 1, 1, 1])

    def _double_time(self, x: str, level: int, width: int, scale: int, frames: int) -> str:
        """Each frame becomes two, the first and second half of the channels of a causal convolution; not the video's
        first frame, which does not even enter the cache."""
        if self.first:
            return x
        g, name = self.g, f"decoder.up_blocks.{level}.upsamplers.0.time_conv"
        stacked = self._stacked(x, name, width, scale, frames)
        weight = g.weight(f"{name}.weight", (2 * width, width, 3, 1, 1), _flat_in_time)
        y = g.op("Conv", stacked, weight, self._bias(name, 2 * width))
        return g.reshape(y, [2 * frames, width, g.dim(x, 2), g.dim(x, 3)])

    # -- the layers --------------------------------------------------------------------------------------------------

    def _bias(self, name: str, width: int) -> str:
        return self.g.weight(f"{name}.bias", (width,))

    def _pointwise(self, x: str, name: str, n_in: int, n_out: int) -> str:
        weight = self.g.weight(f"{name}.weight", (n_out, n_in, 1, 1, 1), _flat_in_time)
        return self.g.op("Conv", x, weight, self._bias(name, n_out))

    def _rms_norm(self, x: str, name: str, width: int, dims: int) -> str:
        """x / |x| * sqrt(width) * gamma over the channels, in float32; `dims` as the checkpoint stores gamma."""
        g = self.g
        gamma = g.weight(f"{name}.gamma", (width,) + (1,) * (dims - 1), _norm_scale, half=False)
        x = g.full(x)
        length = g.op("Max", g.op("ReduceL2", x, g.const([1])), g.scalar(NORM_FLOOR))
        return g.mul(g.op("Div", x, length), gamma)

    def _causal_conv(self, x: str, name: str, n_in: int, n_out: int, scale: int, frames: int) -> str:
        """A 3x3x3 convolution over this chunk's frames and the two before them."""
        g = self.g
        weight = g.weight(f"{name}.weight", (n_out, n_in, 3, 3, 3), _flat_in_time)
        if self.first:
            weight = g.slice(weight, 1, 2 * n_in, 3 * n_in)
        stacked = self._stacked(x, name, n_in, scale, frames)
        return g.op("Conv", stacked, weight, self._bias(name, n_out), pads=[1, 1, 1, 1])

    def _stacked(self, x: str, name: str, width: int, scale: int, frames: int) -> str:
        """Each frame with the two before it, side by side in the channels; the last two frames become the cache.

        In the first graph both are zero: they are left out, and only the cache is written.
        """
        g, label = self.g, name.removeprefix("decoder.")
        if frames == 1:
            one = TensorSpec(f"{label}.1", g.compute_dtype, (1, width, *_image(scale)))
            two = TensorSpec(f"{label}.2", one.dtype, one.shape)
            newest, older = self._declare(one, written=True), self._declare(two, written=False, follows=one.name)
            g.output(x, _renamed(one, newest.output))
            if self.first:
                return x
            return g.concat([g.input(_renamed(two, older.input)), g.input(_renamed(one, newest.input)), x], 1)
        state = self._declare(TensorSpec(label, g.compute_dtype, (CACHE_FRAMES, width, *_image(scale))), written=True)
        if self.first:
            zero = g.mul(x, g.const(0, g.numpy_compute))
            g.output(g.concat([zero, x], 0), _renamed(state.tensor, state.output))
            return x
        joined = g.concat([g.input(_renamed(state.tensor, state.input)), x], 0)
        g.output(g.slice(x, 0, frames - CACHE_FRAMES, frames), _renamed(state.tensor, state.output))
        return g.concat([g.slice(joined, 0, tap, tap + frames) for tap in range(CACHE_FRAMES + 1)], 1)

    def _declare(self, tensor: TensorSpec, *, written: bool, follows: str | None = None) -> StateSpec:
        read, write = f"{tensor.name}.before", f"{tensor.name}.after"
        state = StateSpec(None if self.first else read, write if written else None, tensor, follows)
        self.states.append(state)
        return state


def _image(scale: int) -> tuple[str, str]:
    return (f"{scale}*height", f"{scale}*width") if scale > 1 else ("height", "width")


def _renamed(tensor: TensorSpec, name: str | None) -> TensorSpec:
    return TensorSpec(name or tensor.name, tensor.dtype, tensor.shape)


def _flat_in_time(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """A kernel (O, I, T, h, w) over T frames as one (O, T * I, h, w) over their channels side by side."""
    out, channels, frames, *size = weight.shape
    return weight.transpose(0, 2, 1, 3, 4).reshape(out, frames * channels, *size)


def _norm_scale(gamma: NDArray[np.float32]) -> NDArray[np.float32]:
    """sqrt(width) * gamma as (width, 1, 1)."""
    return (gamma * np.float32(np.sqrt(gamma.size))).reshape(-1, 1, 1)
