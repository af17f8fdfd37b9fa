"""Noise schedules: betas, grids of timesteps, and spacings of sigmas, shared by all samplers.

The reference computes its schedules in float32 with torch and NumPy mixed; these follow it operation by operation,
because timesteps are rounded or truncated in the end and a last bit decides between two integers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t2v_rt.errors import RequestError

Array = NDArray[Any]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

MAX_BETA = 0.999
NEARLY_ZERO_ALPHA = np.float32(2.0**-24)  # instead of 0, so that the first sigma is finite
KARRAS_RHO = 7.0
BETA_SHAPE = 0.6  # both parameters of the distribution (arXiv:2407.12173)


# -- functions of one rounding: computed in float64, so that no machine's float32 library shows --


def _through_float64(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def rounded(x: Any) -> Any:
        value = np.asarray(x)
        return np.asarray(function(value.astype(np.float64))).astype(value.dtype)[()]

    return rounded


exp = _through_float64(np.exp)
expm1 = _through_float64(np.expm1)
log = _through_float64(np.log)


# -- betas --


def linspace(start: float, stop: float, count: int) -> Float32:
    """Evenly spaced float32 values, rounded as torch rounds them: the step in float32, filled from both ends."""
    first, last = np.float32(start), np.float32(stop)
    step = np.float64((last - first) / np.float32(count - 1)) if count > 1 else np.float64(0.0)
    i = np.arange(count)
    rising, falling = np.float64(first) + step * i, np.float64(last) - step * (count - 1 - i)
    return np.where(i < max(count // 2, 1), rising, falling).astype(np.float32)


def make_betas(kind: str, start: float, stop: float, count: int, trained: Sequence[float] | None = None) -> Float32:
    """The variances added by each training timestep.

    Args:
        kind: linear, scaled_linear (linear in the square root), squaredcos_cap_v2 (Nichol and Dhariwal,
            arXiv:2102.09672), exp, laplace or sigmoid.
        start: first beta, of the kinds that have end points.
        stop: last beta.
        count: training timesteps.
        trained: instead of all that.

    Returns:
        float32 (count,), or as many as `trained` has.
    """
    if trained is not None:
        return np.asarray(trained, np.float32)
    if kind == "linear":
        return linspace(start, stop, count)
    if kind == "scaled_linear":
        return np.square(linspace(start**0.5, stop**0.5, count))
    if kind == "sigmoid":
        sigmoid = 1 / (1 + exp(-linspace(-6, 6, count)))
        betas: Float32 = sigmoid * np.float32(stop - start) + np.float32(start)
        return betas
    alpha_bar = ALPHA_BARS[kind]
    bars = [alpha_bar(i / count) for i in range(count + 1)]
    capped = [min(1 - after / before, MAX_BETA) for before, after in itertools.pairwise(bars)]
    return np.array(capped, np.float32)


def _laplace(t: float) -> float:
    snr = math.exp(-0.5 * math.copysign(1, 0.5 - t) * math.log(1 - 2 * abs(0.5 - t) + 1e-6))
    return math.sqrt(snr / (1 + snr))


# what the cumulative product of 1 - beta is at t, from 0 to 1
ALPHA_BARS: dict[str, Callable[[float], float]] = {
    "squaredcos_cap_v2": lambda t: math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2,
    "exp": lambda t: math.exp(t * -12.0),
    "laplace": _laplace,
}


def cumulative_alphas(betas: Array) -> Array:
    """Cumulative products of 1 - beta; multiplied up in float64 and rounded, as torch does."""
    products: Array = np.cumprod((1 - betas).astype(np.float64)).astype(betas.dtype)
    return products


def rescaled_to_zero_snr(alphas_cumprod: Array) -> Array:
    """Cumulative alphas shifted and scaled so that the last is 0 (Lin et al., arXiv:2305.08891, algorithm 1)."""
    root = np.sqrt(alphas_cumprod)
    first, last = root[0], root[-1]
    with np.errstate(divide="ignore", invalid="ignore"):  # a single alpha has no such scale: NaN, as in the reference
        result: Array = np.square((root - last) * (first / (first - last)))
    return result


def betas_with_zero_snr(betas: Float32) -> Float32:
    """Betas of the rescaled schedule."""
    bars = rescaled_to_zero_snr(cumulative_alphas(betas))
    result: Float32 = 1 - np.append(bars[:1], bars[1:] / bars[:-1])
    return result


def noise_levels(alphas_cumprod: Array) -> Array:
    """Noise over signal, sqrt((1 - alpha) / alpha), of each training timestep."""
    result: Array = np.sqrt((1 - alphas_cumprod) / alphas_cumprod)
    return result


# -- grids of timesteps --


def timestep_grid(spacing: str, steps: int, train: int, offset: int, *, last: int | None = None) -> Float64:
    """Falling timesteps, rounded (table 2 of arXiv:2305.08891).

    Args:
        spacing: linspace (both ends), leading (multiples from 0) or trailing (multiples from the end).
        steps: N.
        train: training timesteps T.
        offset: added with leading.
        last: multistep solvers take one point more and leave the lowest one out; `last` is then the number of
            training timesteps in use. None for the plain grid.

    Returns:
        float64 (N,) of whole numbers.
    """
    extra, end = (0, train) if last is None else (1, last)
    if spacing == "linspace":
        grid = np.linspace(0, end - 1, steps + extra).round()[::-1]
    elif spacing == "leading":
        grid = np.arange(steps + extra, dtype=np.float64)[::-1] * (end // (steps + extra)) + offset
    else:
        return np.arange(end, 0, -train / steps).round() - 1
    return np.ascontiguousarray(grid[: len(grid) - extra])


def even_timesteps(spacing: str, steps: int, train: int, offset: int) -> Float32:
    """The same plain grid as float32, where linspace is left unrounded, as the samplers over sigmas take it."""
    if spacing == "linspace":
        return np.linspace(0, train - 1, steps, dtype=np.float32)[::-1].copy()
    return timestep_grid(spacing, steps, train, offset).astype(np.float32)


def timesteps_of_sigmas(sigmas: Array, log_levels: Array) -> Float64:
    """Timesteps whose noise levels are `sigmas`, interpolated in the logarithm.

    Args:
        sigmas: (N,).
        log_levels: (T,) rising logarithms of the training timesteps' levels.

    Returns:
        float64 (N,), fractional.

    Raises:
        RequestError: of the only training timestep, whose level does not tell one from the other.
    """
    log_sigmas = np.log(np.maximum(sigmas, sigmas.dtype.type(1e-10)))
    low = np.clip(np.searchsorted(log_levels, log_sigmas, side="right") - 1, 0, len(log_levels) - 2)
    below, above = log_levels[low], log_levels[low + 1]
    with np.errstate(divide="ignore", invalid="ignore"):  # one level is both of them
        w = np.clip((below - log_sigmas) / (below - above), 0, 1)
    if np.any(np.isnan(w)):
        raise RequestError(
            f"num_train_timesteps is {len(log_levels)}, and the sigmas lie between no two training timesteps; expected "
            "2 or more timesteps, or no sigmas of their own"
        )
    result: Float64 = (1 - w) * low + w * (low + 1)
    return result


# -- spacings of sigmas --


def karras_sigmas(highest: float, lowest: float, steps: int) -> Float64:
    """Evenly spaced in sigma^(1/7) (Karras et al., arXiv:2206.00364, equation 5)."""
    top, bottom = highest ** (1 / KARRAS_RHO), lowest ** (1 / KARRAS_RHO)
    result: Float64 = (top + np.linspace(0, 1, steps) * (bottom - top)) ** KARRAS_RHO
    return result


def exponential_sigmas(highest: float, lowest: float, steps: int) -> Float64:
    """Evenly spaced in the logarithm."""
    return np.exp(np.linspace(math.log(highest), math.log(lowest), steps))


def beta_sigmas(highest: float, lowest: float, steps: int) -> Float64:
    """Quantiles of the beta distribution, dense at both ends (Lee et al., arXiv:2407.12173)."""
    quantiles = [beta_quantile(p, BETA_SHAPE) for p in (1 - np.linspace(0, 1, steps)).tolist()]
    result: Float64 = lowest + np.array(quantiles) * (highest - lowest)
    return result


def beta_quantile(p: float, shape: float) -> float:
    """Inverse distribution function of the symmetric beta distribution, to float64's precision.

    Args:
        p: probability, 0 to 1.
        shape: both parameters of the distribution, below 1.
    """
    if p in (0.0, 1.0):
        return p
    if p > 0.5:
        return 1.0 - beta_quantile(1.0 - p, shape)
    log_norm = 2 * math.lgamma(shape) - math.lgamma(2 * shape)
    x: float = min((p * shape * math.exp(log_norm)) ** (1 / shape), 0.5)  # the first term of the series, inverted
    for _ in range(50):
        error = _beta_distribution(x, shape, log_norm) - p
        slope = math.exp((shape - 1) * (math.log(x) + math.log1p(-x)) - log_norm)
        moved = min(max(x - error / slope, x / 4), 0.5)
        if abs(moved - x) <= 1e-16 * x:
            break
        x = moved
    return x


def _beta_distribution(x: float, shape: float, log_norm: float) -> float:
    """Distribution function at x <= 1/2 by its power series x^a / B(a, a) * sum of (1 - a)_k x^k / (k! (a + k))."""
    total, term, k = 0.0, 1.0, 0
    while True:
        added = term / (shape + k)
        total += added
        if added < 1e-18 * total:
            return total * math.exp(shape * math.log(x) - log_norm)
        k += 1
        term *= (k - shape) / k * x


# -- flow schedules --


def shift_sigmas(sigmas: Array, shift: float) -> Array:
    """s x / (1 + (s - 1) x): moves a flow schedule towards noise for s > 1 (Esser et al., arXiv:2403.03206)."""
    result: Array = shift * sigmas / (1 + (shift - 1) * sigmas)
    return result


def dynamic_shift(sigmas: Array, mu: float, kind: str) -> Array:
    """The same shift with s = e^mu (`exponential`) or s = mu (`linear`), mu chosen per resolution by the caller."""
    s = math.exp(mu) if kind == "exponential" else mu
    result: Array = s / (s + (1 / sigmas - 1))
    return result


def stretch_to_terminal(sigmas: Array, terminal: float) -> Array:
    """Stretches a schedule so that its last sigma is `terminal` (Lightricks LTX-Video)."""
    distance = 1 - sigmas
    if distance[-1] == 0:
        raise RequestError(
            f"shift_terminal is {terminal:g} and the schedule's only sigma is 1, which cannot be stretched; take more "
            "steps, or leave shift_terminal out"
        )
    result: Array = 1 - distance / (distance[-1] / (1 - terminal))
    return result


# -- checks --


def falling(name: str, values: Sequence[float] | Array, *, lowest: float, highest: float) -> Float64:
    """Custom timesteps or sigmas as an array.

    Raises:
        RequestError: they are no list of finite numbers, do not fall strictly, or leave the range.
    """
    try:
        array = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        array = np.empty(0)
    good = array.ndim == 1 and array.size > 0 and bool(np.all(np.isfinite(array)))
    if not good or np.any(np.diff(array) >= 0) or array[0] > highest or array[-1] < lowest:
        raise RequestError(
            f"{name} are {str(values)[:80]}; expected a list of numbers that falls strictly, from at most "
            f"{highest:g} to at least {lowest:g}"
        )
    return array
