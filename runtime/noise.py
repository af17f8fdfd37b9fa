"""Seeded noise: the stream of torch's CPU generator, computed so that every machine gets the same bytes.

Two things make ordinary normal deviates machine-dependent: the C library's logarithm, sine and cosine, and NumPy's SIMD
versions of them, differ in the last bit. Here they are polynomials over IEEE additions, multiplications, divisions and
square roots in float64, which are correctly rounded everywhere; their error lies so far below float32's rounding that
each of the 2^24 uniforms gives the correctly rounded float32 logarithm, sine and cosine. Threads play no part.

Torch's own values depend on the machine, because its vector path (AVX2 and above) and its plain one round the angle
differently and use different logarithms, sines and cosines. This module rounds the angle as the vector path does. Over
500 draws (benchmarks/results/noise.json) the largest absolute difference is 4.8e-7 to torch with AVX2 or AVX512, 2.4e-6
to torch without, and 2.3e-6 between torch's two; draws of fewer than 16 values were equal in every bit.

Source of the stream: MT19937 (Matsumoto and Nishimura 1998) and the Box-Muller transform, in the order in which
`torch.randn` uses them on the CPU.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from t2v_rt.errors import RequestError, type_of
from t2v_rt.numbers import as_integer

__all__ = ["Generator", "check_seed", "randn_for"]
BLOCK = 16  # torch transforms uniforms in blocks of 16: eight radii, then eight angles
CHUNK = 1 << 14  # values per pass, small enough for the cache
MAX_VALUES = 1 << 40  # of one draw; 4 TiB of float32, so a larger one is a mistake
MAX_DIMENSIONS = 64  # NumPy's own limit
SEED_RANGE = (-(2**63), 2**64 - 1)  # what torch.Generator.manual_seed takes
OUTPUT_DTYPES = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(np.float64))

# ln 2 and pi/2 in two parts, the first with few enough bits that its small multiples are exact
LN2_HIGH, LN2_LOW = 0.693147180369123816490, 1.90821492927058770002e-10
HALF_PI_HIGH, HALF_PI_LOW = 1.57079632673412561417, 6.07710050650619224932e-11
# power series, lowest power first, as far as float64 can see them on their intervals
LOG_TERMS = tuple(2.0 / (2 * k + 3) for k in range(10))  # of ln((1 + s) / (1 - s)) / s - 2 over s^2
SINE_TERMS = tuple((-1) ** k / math.factorial(2 * k + 1) for k in range(8))
COSINE_TERMS = tuple((-1) ** k / math.factorial(2 * k) for k in range(9))
QUADRANT_SINE = np.array([0.0, 1.0, 0.0, -1.0, 0.0])  # of 0, pi/2, … 2 pi
QUADRANT_COSINE = np.array([1.0, 0.0, -1.0, 0.0, 1.0])
SQRT_HALF_BITS = 0x3FE6A09E667F3BCD  # of the float64 sqrt(1/2)
EXPONENT_BITS = -1 << 52  # sign and exponent of a float64

UNIFORM_STEP = 2.0**-24  # of torch's float32 uniforms
ANGLE_STEP = np.float32(2.0 * math.pi) * np.float32(UNIFORM_STEP)
WIDE_ROWS, NARROW_ROWS = 8, 2  # working space of a pass, in float64 and in float32

Float64 = NDArray[np.float64]
Float32 = NDArray[np.float32]


class Generator:
    """Normal deviates from a seed: `Generator(s).randn(shape)` is torch's `randn` after `manual_seed(s)` on the CPU.

    Equal to torch to the last bits of float32, in which torch differs between machines; this one's bytes do not depend
    on anything but the seed and the shapes asked for.

    Args:
        seed: any integer that fits 64 bits; as in torch, only its low 32 bits matter.

    Raises:
        RequestError: not an integer, or out of the 64-bit range.
    """

    def __init__(self, seed: int) -> None:
        self._bits = np.random.MT19937()
        self.manual_seed(seed)

    def manual_seed(self, seed: int) -> Generator:
        """Starts the stream over from a seed; returns the generator itself.

        Raises:
            RequestError: not an integer, or out of the 64-bit range.
        """
        self.seed = check_seed(seed)
        np.random.RandomState(self._bits).seed(self.seed & 0xFFFFFFFF)
        self._cached_sine: float | None = None
        return self

    def randn(self, shape: int | Sequence[int], dtype: DTypeLike = np.float32) -> NDArray[Any]:
        """Draws standard normal deviates.

        Args:
            shape: shape of the result, NumPy's integers allowed; () gives one value. Successive calls continue the
                stream.
            dtype: float32, or float16 or float64 as a cast of the float32 values.

        Returns:
            A new array of that shape and dtype.

        Raises:
            RequestError: a size that is no integer or negative, more than 2**40 values, or another dtype.
        """
        sizes, kind = _sizes(shape), _output_dtype(dtype)
        count = math.prod(sizes)
        values = self._few(count) if count < BLOCK else self._many(count)
        return values.reshape(sizes).astype(kind, copy=False)

    def _many(self, count: int) -> Float32:
        result = np.empty(count, np.float32)
        whole = count - count % BLOCK
        wide = np.empty((WIDE_ROWS, min(CHUNK, whole) // 2))
        narrow = np.empty((NARROW_ROWS, min(CHUNK, whole) // 2), np.float32)
        for start in range(0, whole, CHUNK):
            part = result[start : min(start + CHUNK, whole)]
            _box_muller(self._words(part.size), part, wide, narrow)
        if whole != count:
            self._words(count - whole)  # torch draws a word for each value, then anew for the last 16 values
            _box_muller(self._words(BLOCK), result[-BLOCK:], wide, narrow)
        return result

    def _few(self, count: int) -> Float32:
        """Fewer than 16 values: pairs in float64, the second of a pair kept for the next value or the next call."""
        held = [] if self._cached_sine is None or not count else [self._cached_sine]
        pairs = (count - len(held) + 1) // 2
        high, low = self._words(4 * pairs).reshape(2 * pairs, 2).T
        uniforms = ((high << np.uint64(32) | low) & np.uint64(2**53 - 1)).astype(np.float64) * 2.0**-53
        wide = np.empty((WIDE_ROWS, pairs))
        radius = np.sqrt(-2.0 * _log(1.0 - uniforms[1::2], wide))
        sine, cosine = _sine_cosine(2.0 * math.pi * uniforms[::2], wide)
        values = np.concatenate([held, np.stack([radius * cosine, radius * sine], axis=-1).reshape(-1)])
        if count:
            self._cached_sine = float(values[count]) if len(values) > count else None
        return values[:count].astype(np.float32)

    def _words(self, count: int) -> NDArray[np.uint64]:
        """The next 32-bit words of the stream."""
        return np.asarray(self._bits.random_raw(count))


def randn_for(shape: Sequence[int], generators: Generator | Sequence[Generator] | None) -> Float32:
    """Draws the noise for a batch of videos as diffusers' `randn_tensor` does.

    Args:
        shape: (B, …).
        generators: one, or a sequence of one, draws the whole shape in one go; a sequence of B draws each video's own
            (1, …) in order. Where a generator stands in it twice, its stream goes on.

    Returns:
        A new float32 array of that shape.

    Raises:
        RequestError: no generator, another number of them than 1 or B, something else among them, or a bad shape.
    """
    sizes = _sizes(shape)
    if generators is None:
        raise RequestError("this sampler draws noise and has no generator; give a seed or a generator")
    items = check_generators(generators, sizes[0] if sizes else 1)
    if len(items) == 1:
        return items[0].randn(sizes)
    return np.concatenate([item.randn((1, *sizes[1:])) for item in items])


def check_generators(generators: Generator | Sequence[Generator], videos: int) -> list[Generator]:
    """The generators of a batch of videos.

    Args:
        generators: one for all videos, or a sequence with one for each.
        videos: of the batch.

    Raises:
        RequestError: the number of generators is neither one nor that of the videos, or they are of another kind.
    """
    items = list(generators) if isinstance(generators, Sequence) else [generators]
    for item in items:
        if not isinstance(item, Generator):
            raise RequestError(
                f"generator is of type {type_of(item)}; expected {__name__}.Generator: Generator(seed) draws the "
                "numbers of torch.Generator().manual_seed(seed); or give seed"
            )
    if len(items) not in (1, videos):
        raise RequestError(f"{len(items)} generators were given for {videos} videos; give one, or one for each")
    return items


def check_seed(seed: int) -> int:
    """Returns the seed as an int; raises RequestError where it is none or does not fit 64 bits."""
    number = as_integer(seed)
    if number is None:
        raise RequestError(f"seed is {seed!r}; expected an integer")
    if not SEED_RANGE[0] <= number <= SEED_RANGE[1]:
        raise RequestError(f"seed is {seed}; expected an integer of at most 64 bits")
    return number


def _sizes(shape: object) -> tuple[int, ...]:
    """A shape as a tuple of ints; raises RequestError where it is none that can be drawn."""
    given = shape.tolist() if isinstance(shape, np.ndarray) else shape
    items: list[Any] = list(given) if isinstance(given, Sequence) and not isinstance(given, (str, bytes)) else [given]
    asked = f"noise of shape {reprlib.repr(shape)} was asked for"
    sizes = tuple(size for item in items if (size := as_integer(item)) is not None)
    if len(sizes) != len(items):
        raise RequestError(f"{asked}; expected an integer or a sequence of integers")
    if any(size < 0 for size in sizes):
        raise RequestError(f"{asked}; sizes must not be negative")
    if len(sizes) > MAX_DIMENSIONS:
        raise RequestError(f"{asked}, {len(sizes)} dimensions; expected at most {MAX_DIMENSIONS}")
    # an empty array's other sizes count too: NumPy refuses them where their product overflows
    if math.prod(max(size, 1) for size in sizes) > MAX_VALUES:
        raise RequestError(f"{asked}; expected at most 2**40 values; ask for fewer at a time")
    return sizes


def _output_dtype(dtype: DTypeLike) -> np.dtype[Any]:
    """The dtype asked for; raises RequestError where it is none of OUTPUT_DTYPES. None, NumPy's float64, is refused."""
    try:
        found = None if dtype is None else np.dtype(dtype)
    except (TypeError, ValueError, SyntaxError):  # NumPy parses strings
        found = None
    if found is None or found not in OUTPUT_DTYPES:
        asked = reprlib.repr(dtype) if found is None else found
        raise RequestError(f"noise of dtype {asked} was asked for; expected float32, float16 or float64")
    return found


def _box_muller(words: NDArray[np.uint64], result: Float32, wide: Float64, narrow: Float32) -> None:
    """Words (16 n,) -> normal deviates (16 n,) in `result`, rounded to float32 where torch rounds.

    `wide` (WIDE_ROWS, 8 n or more) and `narrow` (NARROW_ROWS, 8 n or more) are working space: with fresh
    arrays at every operation, page faults cost as much as the arithmetic.
    """
    half = words.size // 2
    x, angle = wide[:2, :half]
    rest = wide[2:, :half]
    radius, wave = narrow[:, :half]
    words &= np.uint64(0xFFFFFF)
    uniforms = words.view(np.int64).reshape(-1, 2, BLOCK // 2)  # in units of UNIFORM_STEP
    values = result.reshape(-1, 2, BLOCK // 2)

    _blocks(x)[:] = uniforms[:, 0]
    x *= -UNIFORM_STEP
    x += 1.0
    radius[:] = _log(x, rest)
    radius *= np.float32(-2.0)
    np.sqrt(radius, out=radius)

    _blocks(wave)[:] = uniforms[:, 1]
    wave *= ANGLE_STEP
    angle[:] = wave
    sine, cosine = _sine_cosine(angle, rest)
    wave[:] = cosine
    np.multiply(_blocks(radius), _blocks(wave), out=values[:, 0])
    wave[:] = sine
    np.multiply(_blocks(radius), _blocks(wave), out=values[:, 1])


def _blocks(row: NDArray[Any]) -> NDArray[Any]:
    """(8 n,) -> (n, 8), the same memory."""
    return row.reshape(-1, BLOCK // 2)


def _polynomial(x: Float64, terms: Sequence[float], out: Float64) -> Float64:
    """terms[0] + terms[1] x + …, by Horner's rule."""
    np.multiply(x, terms[-1], out=out)
    for term in terms[-2:0:-1]:
        out += term
        out *= x
    out += terms[0]
    return out


def _log(x: Float64, rows: Float64) -> Float64:
    """Natural logarithm of x in (0, 1], in place of x, with four rows of working space.

    x = m 2^e with m in [sqrt(1/2), sqrt(2)); ln m = 2 artanh(s) with s = (m - 1) / (m + 1).
    """
    exponent, e, square, series = rows[:4]
    bits, exponent_bits = x.view(np.int64), exponent.view(np.int64)
    np.subtract(bits, SQRT_HALF_BITS, out=exponent_bits)
    exponent_bits &= EXPONENT_BITS
    bits -= exponent_bits  # x is m now
    e[:] = exponent_bits
    e *= 2.0**-52

    np.add(x, 1.0, out=series)
    x -= 1.0
    x /= series  # x is s now
    np.multiply(x, x, out=square)
    _polynomial(square, LOG_TERMS, out=series)
    series *= square
    series += 2.0
    x *= series
    x += np.multiply(e, LN2_LOW, out=series)
    e *= LN2_HIGH
    x += e
    return x


def _sine_cosine(angle: Float64, rows: Float64) -> tuple[Float64, Float64]:
    """Sine and cosine of angles in [0, 2 pi], which are used up, in two of six rows of working space.

    angle = q pi/2 + r with r in [-pi/4, pi/4]; then the sum formulas, exact in their products by 0, 1 and -1.
    """
    quadrant, square, sine_r, cosine_r, sine, cosine = rows[:6]
    np.multiply(angle, 2.0 / math.pi, out=quadrant)
    np.rint(quadrant, out=quadrant)
    r = angle
    for part in (HALF_PI_HIGH, HALF_PI_LOW):
        r -= np.multiply(quadrant, part, out=square)
    np.multiply(r, r, out=square)
    _polynomial(square, SINE_TERMS, out=sine_r)
    sine_r *= r
    _polynomial(square, COSINE_TERMS, out=cosine_r)

    index = square.view(np.int64)
    index[:] = quadrant
    sine_q = QUADRANT_SINE.take(index, out=quadrant, mode="clip")  # "raise" would copy
    cosine_q = QUADRANT_COSINE.take(index, out=r, mode="clip")
    np.multiply(sine_q, cosine_r, out=sine)
    sine += np.multiply(cosine_q, sine_r, out=square)
    np.multiply(cosine_q, cosine_r, out=cosine)
    cosine -= np.multiply(sine_q, sine_r, out=square)
    return sine, cosine
