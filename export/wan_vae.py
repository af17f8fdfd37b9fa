"""The Wan2.1 VAE decoder as four ONNX graphs: a head and a tail, of the first latent frame and of each later one.

Source of the architecture: diffusers `AutoencoderKLWan`. Its convolutions are causal in time: each looks back two
frames, kept from one latent frame to the next. Here these caches are engine state, two frames each, zero at first:

- The `first` graphs make one frame of the first latent frame and write the caches. Nothing lies before that frame, so
  each kernel needs only its last slice in time, and time is not doubled.
- The `next` graphs make `temporal_factor` frames of a later latent frame, reading and rewriting the caches. A frame
  further back than the video's start is zero in the cache, as in the reference's padding.

The head ends before the last two levels and gives features at half the frames' resolution. After its attention among
the pixels of a frame everything is local, so the tail, where nearly all memory is, can work on tiles of the features:
with `halo` more on each side than it keeps, a tile is what the whole would have been, but for rounding.

Frames are the batch axis (T, C, H, W), and a kernel over three frames is a flat one over their channels side by side:
two-dimensional convolutions are what every backend does fastest. On ONNX Runtime's CPU they also sum in one order
whatever the number of threads, which three-dimensional ones do not on small images.

All graphs read the same weight file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t2v_rt.engines.manifest import TileSpec
from t2v_rt.engines.specs import StateSpec, TensorSpec
from t2v_rt.errors import CheckpointError
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
    def tail_levels(self) -> int:
        """Levels of the tail: the last two, where there are so many."""
        return min(2, len(self.dim_mult) - 1)

    @property
    def tiles(self) -> TileSpec:
        """Where the tail begins, and how far its kernels see there."""
        reach = 1  # the last convolution
        for level in range(self.tail_levels):
            reach += 2 * (self.res_blocks + 1)
            if level < self.tail_levels - 1:
                reach = (reach + 1 + 1) // 2  # the convolution after the upsampling, then half the resolution
        upsampled = self.tail_levels - 1
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
        if len(down) != len(dim_mult) - 1 or not len(mean) == len(std) == z_dim:
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

    Args:
        g: the graph to write into.
        config: of the VAE.
        first: whether it is a graph of the first latent frame.
    """

    g: GraphWriter
    config: VaeConfig
    first: bool
    states: list[StateSpec] = field(default_factory=list)

    def write_head(self) -> list[StateSpec]:
        """Writes latents -> features; returns the states it reads and writes, in graph order."""
        g, config = self.g, self.config
        z, width = config.z_dim, config.widths[0]
        latents = g.input(TensorSpec("latents", "float32", (1, z, "height", "width")))
        x = self._pointwise(g.half(latents), "post_quant_conv", z, z)
        x = self._causal_conv(x, "decoder.conv_in", z, width, 1, 1)
        x = self._mid_block(x, width)
        x, scale, frames, width = self._levels(x, range(len(config.dim_mult) - config.tail_levels), 1, 1, width)
        size = (f"{scale}*height", f"{scale}*width") if scale > 1 else ("height", "width")
        g.output(x, TensorSpec("features", g.compute_dtype, (frames, width, *size)))
        return self.states

    def write_tail(self) -> list[StateSpec]:
        """Writes features -> frames, of the whole or of a tile; returns its states likewise."""
        g, config = self.g, self.config
        head = range(len(config.dim_mult) - config.tail_levels)
        frames, width = 1, config.widths[0]
        for level in head:
            frames *= 2 if config.time_upsample[level] and not self.first else 1
            width = config.widths[level + 1] // 2
        x = g.input(TensorSpec("features", g.compute_dtype, (frames, width, "height", "width")))
        tail = range(head.stop, len(config.dim_mult))
        x, scale, frames, width = self._levels(x, tail, 1, frames, width)
        x = g.half(g.silu(self._rms_norm(x, "decoder.norm_out", width, 4)))
        x = g.full(self._causal_conv(x, "decoder.conv_out", width, config.out_channels, scale, frames))
        pixels = (f"{scale}*height", f"{scale}*width") if scale > 1 else ("height", "width")
        g.output(x, TensorSpec("frames", "float32", (frames, config.out_channels, *pixels)))
        return self.states

    def _levels(self, x: str, levels: range, scale: int, frames: int, width: int) -> tuple[str, int, int, int]:
        """Some levels of the decoder, each but the last of all with the upsampling after it."""
        config = self.config
        for level in levels:
            name, out_width = f"decoder.up_blocks.{level}", config.widths[level + 1]
            for block in range(config.res_blocks + 1):
                x = self._res_block(x, f"{name}.resnets.{block}", width, out_width, scale, frames)
                width = out_width
            if level < len(config.dim_mult) - 1:
                x, scale, frames, width = self._upsample(x, f"{name}.upsamplers.0", level, width, scale, frames)
        return x, scale, frames, width

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
        attended = g.op("Attention", *g.ops("Split", 3, tokens, axis=2, num_outputs=3), q_num_heads=1, kv_num_heads=1)
        image = g.op("Reshape", g.transpose(attended, [0, 2, 1]), g.op("Shape", x))
        weight = g.weight(f"{name}.proj.weight", (width, width, 1, 1))
        return g.add(g.op("Conv", image, weight, self._bias(f"{name}.proj", width)), x)

    def _upsample(
        self, x: str, name: str, level: int, width: int, scale: int, frames: int
    ) -> tuple[str, int, int, int]:
        """Doubles height and width, and time where the level says so and a frame came before."""
        g = self.g
        if self.config.time_upsample[level]:
            if self.first:
                self._declare(f"{name}.time_conv", width, scale, written=False)
            else:
                x = self._double_time(x, f"{name}.time_conv", width, scale, frames)
                frames *= 2
        x = g.op(
            "Resize",
            x,
            "",
            g.const([1, 1, 2, 2], np.float32),
            mode="nearest",
            coordinate_transformation_mode="asymmetric",
            nearest_mode="floor",
        )
        weight = g.weight(f"{name}.resample.1.weight", (width // 2, width, 3, 3))
        x = g.op("Conv", x, weight, self._bias(f"{name}.resample.1", width // 2), pads=[1, 1, 1, 1])
        return x, 2 * scale, frames, width // 2

    def _double_time(self, x: str, name: str, width: int, scale: int, frames: int) -> str:
        """Each frame becomes two: the first and second half of the channels of a causal convolution."""
        g = self.g
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
        g = self.g
        state = self._declare(name, width, scale, written=True)
        if self.first:
            zero = g.mul(x, g.const(0, g.numpy_compute))
            g.output(g.concat([zero, x], 0), _renamed(state.tensor, state.output))
            return x
        joined = g.concat([g.input(_renamed(state.tensor, state.input)), x], 0)
        g.output(g.slice(joined, 0, frames, frames + CACHE_FRAMES), _renamed(state.tensor, state.output))
        return g.concat([g.slice(joined, 0, tap, tap + frames) for tap in range(CACHE_FRAMES + 1)], 1)

    def _declare(self, name: str, width: int, scale: int, *, written: bool) -> StateSpec:
        size = (f"{scale}*height", f"{scale}*width") if scale > 1 else ("height", "width")
        label = name.removeprefix("decoder.")
        tensor = TensorSpec(label, self.g.compute_dtype, (CACHE_FRAMES, width, *size))
        state = StateSpec(None if self.first else f"{label}.before", f"{label}.after" if written else None, tensor)
        self.states.append(state)
        return state


def _renamed(tensor: TensorSpec, name: str | None) -> TensorSpec:
    return TensorSpec(name or tensor.name, tensor.dtype, tensor.shape)


def _flat_in_time(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """A kernel (O, I, T, h, w) over T frames as one (O, T * I, h, w) over their channels side by side."""
    out, channels, frames, *size = weight.shape
    return weight.transpose(0, 2, 1, 3, 4).reshape(out, frames * channels, *size)


def _norm_scale(gamma: NDArray[np.float32]) -> NDArray[np.float32]:
    """sqrt(width) * gamma as (width, 1, 1)."""
    return (gamma * np.float32(np.sqrt(gamma.size))).reshape(-1, 1, 1)
