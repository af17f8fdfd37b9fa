"""Seeded noise: the stream of torch's CPU generator, computed so that every machine gets the same bytes.

Two things make ordinary normal deviates machine-dependent: the C library's logarithm, sine and cosine, and NumPy's SIMD
versions of them, differ in the last bit. Here they are polynomials over IEEE additions, multiplications, divisions and
square roots in float64, which are correctly rounded everywhere; their error lies far below float32's rounding.

Source of the stream: MT19937 (Matsumoto and Nishimura 1998) and the Box-Muller transform, in the order in which
`torch.randn` uses them on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from t2v_rt.errors import RequestError

BLOCK = 16  # torch transforms uniforms in blocks of 16: eight radii, then eight angles
CHUNK = 1 << 14  # values per pass, small enough for the cache
SEED_RANGE = (-(2**63), 2**64 - 1)  # what torch.Generator.manual_seed takes
OUTPUT_DTYPES = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(np.float64))

# ln 2 and pi/2 in two parts, the first with few enough bits that its small multiples are exact
LN2_HIGH, LN2_LOW = 0.693147180369123816490, 1.90821492927058770002e-10
HALF_PI_HIGH, HALF_PI_LOW = 1.57079632673412561417, 6.07710050650619224932e-11
LOG_TERMS = [2.0 / (2 * k + 1) for k in range(12)]
SINE_TERMS = [(-1) ** k / math.factorial(2 * k + 1) for k in range(9)]
COSINE_TERMS = [(-1) ** k / math.factorial(2 * k) for k in range(9)]

Float64 = NDArray[np.float64]


class Generator:
    """Normal deviates from a seed: `Generator(s).randn(shape)` is torch's `randn` after `manual_seed(s)` on the CPU.

    Equal to torch to the last bit or two of float32 (torch's own last bit depends on the machine); this one's bytes do
    not depend on anything but the seed and the shapes asked for.

    Args:
        seed: any integer that fits 64 bits; as in torch, only its low 32 bits matter.

    Raises:
        RequestError: not an integer, or out of the 64-bit range.
    """

    def __init__(self, seed: int) -> None:
        self._bits = np.random.MT19937()
        self.manual_seed(seed)

    def manual_seed(self, seed: int) -> Generator:
        """Starts the stream over from a seed; returns the generator itself."""
        self.seed = check_seed(seed)
        np.random.RandomState(self._bits).seed(self.seed & 0xFFFFFFFF)
        self._cached_sine: float | None = None
        return self

    def randn(self, shape: int | Sequence[int], dtype: DTypeLike = np.float32) -> NDArray[Any]:
        """Draws standard normal deviates.

        Args:
            shape: of the result; successive calls continue the stream.
            dtype: float32, or float16 or float64 as a cast of the float32 values.

        Returns:
            A new array.

        Raises:
            RequestError: a negative size or another dtype.
        """
        sizes = (shape,) if isinstance(shape, int) else tuple(int(size) for size in shape)
        if any(size < 0 for size in sizes):
            raise RequestError(f"noise of shape {list(sizes)} was asked for; sizes must not be negative")
        if np.dtype(dtype) not in OUTPUT_DTYPES:
            raise RequestError(f"noise of dtype {np.dtype(dtype)} was asked for; expected float32, float16 or float64")
        count = math.prod(sizes)
        values = self._few(count) if count < BLOCK else self._many(count)
        return values.reshape(sizes).astype(dtype, copy=False)

    def _many(self, count: int) -> NDArray[np.float32]:
        result = np.empty(count, np.float32)
        whole = count - count % BLOCK
        rest = self._uniforms(count)  # torch draws them all before it transforms the first block
        for start in range(0, whole, CHUNK):
            stop = min(start + CHUNK, whole)
            result[start:stop] = _box_muller(rest[start:stop])
        if whole != count:
            result[count - BLOCK :] = _box_muller(self._uniforms(BLOCK))
        return result

    def _uniforms(self, count: int) -> NDArray[np.float32]:
        """24-bit uniforms in [0, 1)."""
        raw = np.asarray(self._bits.random_raw(count))
        return (raw & 0xFFFFFF).astype(np.float32) * np.float32(2.0**-24)

    def _few(self, count: int) -> NDArray[np.float32]:
        """Fewer than 16 values: pairs in float64, the second of a pair kept for the next value or the next call."""
        result = np.empty(count, np.float32)
        for i in range(count):
            if self._cached_sine is not None:
                result[i], self._cached_sine = self._cached_sine, None
                continue
            u1, u2 = self._uniform53(), self._uniform53()
            radius = np.sqrt(-2.0 * _log(np.array([1.0 - u2])))
            sine, cosine = _sine_cosine(np.array([2.0 * math.pi * u1]))
            result[i] = (radius * cosine)[0]
            self._cached_sine = float((radius * sine)[0])
        return result

    def _uniform53(self) -> float:
        high, low = (int(word) for word in np.asarray(self._bits.random_raw(2)))
        return ((high << 32 | low) & (2**53 - 1)) * 2.0**-53


def randn_for(shape: Sequence[int], generators: Generator | Sequence[Generator] | None) -> NDArray[np.float32]:
    """Noise for a batch of videos, as diffusers' `randn_tensor` draws it.

    Args:
        shape: (B, …).
        generators: one draws the whole shape in one go; a list has one for each video.

    Returns:
        float32, of that shape.

    Raises:
        RequestError: no generator, or another number of them than 1 or B.
    """
    if isinstance(generators, Generator):
        return generators.randn(shape)
    items = list(generators or ())
    if not items:
        raise RequestError("this sampler draws noise; give a seed or a generator")
    if len(items) == 1:
        return items[0].randn(shape)
    if len(items) != shape[0]:
        raise RequestError(f"{len(items)} generators were given for {shape[0]} videos; give one, or one for each")
    return np.concatenate([item.randn((1, *shape[1:])) for item in items])


def check_seed(seed: int) -> int:
    """Returns the seed as an int; raises RequestError where it is none or does not fit 64 bits."""
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise RequestError(f"seed is {seed!r}; expected an integer")
    if not SEED_RANGE[0] <= seed <= SEED_RANGE[1]:
        raise RequestError(f"seed is {seed}; expected an integer of at most 64 bits")
    return int(seed)


def _box_muller(uniforms: NDArray[np.float32]) -> NDArray[np.float32]:
    """Uniforms (16 n,) -> normal deviates (16 n,), rounded to float32 where torch rounds."""
    blocks = uniforms.reshape(-1, 2, BLOCK // 2)
    logs = _log(1.0 - blocks[:, 0].astype(np.float64)).astype(np.float32)
    radius = np.sqrt(np.float32(-2.0) * logs)
    theta = np.float32(2.0 * math.pi) * blocks[:, 1]
    sine, cosine = _sine_cosine(theta.astype(np.float64))
    result = np.empty_like(blocks)
    result[:, 0] = radius * cosine.astype(np.float32)
    result[:, 1] = radius * sine.astype(np.float32)
    return result.reshape(-1)


def _polynomial(x: Float64, terms: list[float]) -> Float64:
    """terms[0] + terms[1] x + …, by Horner's rule."""
    result = np.full_like(x, terms[-1])
    for term in reversed(terms[:-1]):
        result *= x
        result += term
    return result


def _log(x: Float64) -> Float64:
    """Natural logarithm of x in (0, 1]: x = m 2^e with m near 1, ln m = 2 artanh((m - 1) / (m + 1))."""
    mantissa, exponent = np.frexp(x)
    small = mantissa < math.sqrt(0.5)
    mantissa = np.where(small, 2.0 * mantissa, mantissa)
    e = (exponent - small).astype(np.float64)
    s = (mantissa - 1.0) / (mantissa + 1.0)
    return e * LN2_HIGH + (e * LN2_LOW + s * _polynomial(s * s, LOG_TERMS))


def _sine_cosine(angle: Float64) -> tuple[Float64, Float64]:
    """Sine and cosine of angles in [0, 2 pi]: Taylor polynomials on [-pi/4, pi/4] and the quadrant's signs."""
    quadrant = np.rint(angle * (2.0 / math.pi))
    r = (angle - quadrant * HALF_PI_HIGH) - quadrant * HALF_PI_LOW
    square = r * r
    sine, cosine = r * _polynomial(square, SINE_TERMS), _polynomial(square, COSINE_TERMS)
    turn = quadrant.astype(np.int64) & 3
    swap = (turn & 1) == 1
    sign_sine = np.where(turn >= 2, -1.0, 1.0)
    sign_cosine = np.where((turn == 1) | (turn == 2), -1.0, 1.0)
    return np.where(swap, cosine, sine) * sign_sine, np.where(swap, sine, cosine) * sign_cosine
