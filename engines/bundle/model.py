"""What the pipeline must know of a model: families differ in these values, not in code paths of the pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from t2v_rt.errors import RequestError

LONGEST_SIDE = 32  # latent rows or columns of a thumbnail, at most: a 16th of the work at 832x480
LEAST_FACTOR = 2  # of shrinking: a quarter of the work where the video is small already


def thumbnail_factor(rows: int, columns: int) -> int:
    """How many latent rows and columns become one of the thumbnail that previews decode, and plans are built for."""
    return max(LEAST_FACTOR, -(-max(rows, columns) // LONGEST_SIDE))


def thumbnail_size(rows: int, columns: int) -> tuple[int, int]:
    """Latent rows and columns of the thumbnail of latents of so many."""
    factor = thumbnail_factor(rows, columns)
    return -(-rows // factor), -(-columns // factor)


@dataclass(frozen=True)
class DecodeSchedule:
    """How latent frames become frames, chunk by chunk.

    Args:
        first: (latent frames, frames) of the first chunk, each that it may have.
        next: of each later chunk.
    """

    first: tuple[tuple[int, int], ...]
    next: tuple[int, int]

    def chunks(self, latents: int) -> list[int]:
        """Latent frames of each chunk: the largest first one that leaves whole later ones.

        Raises:
            RequestError: so many latent frames cannot be decoded.
        """
        count, _ = self.next
        fitting = [first for first, _ in self.first if first <= latents and (latents - first) % count == 0]
        if not fitting:
            raise RequestError(f"{latents} latent frames cannot be decoded in chunks of {count}")
        return [max(fitting), *[count] * ((latents - max(fitting)) // count)]

    def frames(self, latents: int) -> int:
        """Frames that so many latent frames become; raises as `chunks`."""
        first, *later = self.chunks(latents)
        return dict(self.first)[first] + len(later) * self.next[1]

    def latents(self, frames: int) -> int:
        """Latent frames of a video.

        Raises:
            RequestError: no latent frames become so many frames; names the nearest numbers that some become.
        """
        found = self._latents(frames)
        if found is not None:
            return found
        least = min(made for _, made in self.first)
        span = self.next[1] + max(made for _, made in self.first)
        below = [n for n in range(max(least, frames - span), frames) if self._latents(n) is not None]
        above = [n for n in range(max(least, frames + 1), max(least, frames) + span) if self._latents(n) is not None]
        offsets = " or ".join(str(made) for made in sorted({made % self.next[1] for _, made in self.first}))
        nearest = " or ".join(str(n) for n in [*below[-1:], *above[:1]])
        raise RequestError(
            f"num_frames is {frames}; expected a multiple of {self.next[1]} plus {offsets}: the nearest valid value is "
            f"{nearest}"
        )

    def _latents(self, frames: int) -> int | None:
        count, made = self.next
        for first, begun in self.first:
            if frames >= begun and (frames - begun) % made == 0:
                latents = first + (frames - begun) // made * count
                if self.frames(latents) == frames:
                    return latents
        return None


@dataclass(frozen=True)
class LatentSpec:
    """The latents of a model, (B, C, F, H, W).

    Args:
        channels: C.
        scale: per channel; the decoder takes `latents / scale + shift`.
        shift: per channel.
        spatial_factor: pixels per latent row and column.
        most: frames, rows and columns of latents that the model has positions for.
    """

    channels: int
    scale: tuple[float, ...]
    shift: tuple[float, ...]
    spatial_factor: int
    most: tuple[int, int, int]


@dataclass(frozen=True)
class TextSpec:
    """How a model takes its prompt.

    Args:
        length: positions the prompt is padded or cut to.
        dim: D of the prompt embeddings (B, L, D).
        relative_buckets: number of relative-position buckets of the text encoder; 0 where it has none.
        relative_max_distance: distance from which all positions share the last bucket.
    """

    length: int
    dim: int
    relative_buckets: int = 0
    relative_max_distance: int = 0


@dataclass(frozen=True)
class ModelSpec:
    """The constants of a model.

    Args:
        family: names the module of the runtime that knows the family, e.g. `wan`.
        latents: their layout, scaling and limits.
        decode: how they become frames.
        text: how the prompt is taken.
        patch: latent frames, rows and columns per token of the denoiser.
        heads: attention heads of the denoiser, for the memory estimate.
        hidden_dim: width of the denoiser, for the memory estimate.
    """

    family: str
    latents: LatentSpec
    decode: DecodeSchedule
    text: TextSpec
    patch: tuple[int, int, int]
    heads: int
    hidden_dim: int

    @cached_property
    def steps(self) -> tuple[int, int]:
        """Pixels that height and width are multiples of."""
        _, rows, columns = self.patch
        return self.latents.spatial_factor * rows, self.latents.spatial_factor * columns

    def check_size(self, height: int, width: int, num_frames: int) -> None:
        """Refuses a size the model cannot make.

        Raises:
            RequestError: height or width is no multiple of the patch, no latent frames become so many frames, or an
                axis has more latents than the model has positions for.
        """
        frames, *sides = self.latents.most
        for name, value, step, most in zip(("height", "width"), (height, width), self.steps, sides, strict=True):
            if value < step or value % step:
                below = max(step, value // step * step)
                nearest = f"{below} or {below + step}" if value > step else f"{step}"
                raise RequestError(
                    f"{name} is {value}; expected a multiple of {step}: the nearest valid value is {nearest}"
                )
            _check_most(name, value, most * self.latents.spatial_factor)
        self.decode.latents(num_frames)
        _check_most("num_frames", num_frames, self.decode.frames(frames))

    def latent_shape(self, batch: int, height: int, width: int, num_frames: int) -> tuple[int, ...]:
        """Shape (B, C, F, H, W) of the latents of a video of that size."""
        factor = self.latents.spatial_factor
        return batch, self.latents.channels, self.decode.latents(num_frames), height // factor, width // factor

    def video_size(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Height, width in pixels and frames of the video that latents of a shape (B, C, F, H, W) stand for."""
        _, _, frames, height, width = shape
        factor = self.latents.spatial_factor
        return height * factor, width * factor, self.decode.frames(frames)


def _check_most(name: str, value: int, most: int) -> None:
    if value > most:
        raise RequestError(f"{name} is {value}; the model has positions for at most {most}")
