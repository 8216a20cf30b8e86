"""Generators of request traces: when requests come, and how long they are. Seeded; nothing is read from files.

``seed`` is a number, or a ``numpy.random.Generator`` where several columns are drawn from one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from spotjax.errors import ConfigError

Seed: TypeAlias = int | np.random.Generator
Seconds: TypeAlias = NDArray[np.float64]
Tokens: TypeAlias = NDArray[np.int64]


def gamma(rate: float, cv: float, duration: float, seed: Seed) -> Seconds:
    """Arrivals whose gaps are gamma-distributed with a true coefficient of variation.

    The process is stationary: it does not begin with an arrival but somewhere in a gap, so that ``rate * duration`` are
    expected whatever the window. (If it began with one, CV 6 would add (cv² - 1) / 2 = 17 requests to any window.) The
    number varies nevertheless by about ``cv * sqrt(rate * duration)``: 420 ± 120 at 0.35/s, CV 6, 20 minutes. Where
    that must not count, call ``RequestTrace.scaled_to``.

    Args:
      rate: requests per second.
      cv: standard deviation over mean of the gaps; 1 is Poisson, 6 is bursty.
      duration: seconds.
      seed: see the module.

    Returns:
      Seconds, rising, before ``duration``.

    Raises:
      ConfigError: an argument is not positive.
    """
    _positive(rate=rate, cv=cv, duration=duration)
    return _gamma(cv, rate * duration, np.random.default_rng(seed)) / rate


def poisson(rate: float, duration: float, seed: Seed) -> Seconds:
    """A Poisson process: ``gamma`` of CV 1."""
    return gamma(rate, 1.0, duration, seed)


def piecewise(rates: Sequence[float], seconds_each: float, cv: float, seed: Seed) -> Seconds:
    """Arrivals of a rate that changes from piece to piece, with gaps of a true coefficient of variation.

    A stationary gamma process of rate 1 on a clock that runs with the rate (time rescaling): gaps that span pieces are
    right, and the expected number in each piece is rate times length.

    Args:
      rates: requests per second in each piece; 0 is a pause.
      seconds_each: length of every piece.
      cv: as in ``gamma``.
      seed: see the module.

    Raises:
      ConfigError: there are no rates, one is negative, or another argument is not positive.
    """
    _positive(cv=cv, seconds_each=seconds_each)
    levels = np.asarray(rates, dtype=np.float64)
    if not len(levels) or (levels < 0).any() or not 0 < levels.sum() < np.inf:
        raise ConfigError(f"rates must be some numbers of 0 or more, and not all 0, got {list(rates)}")
    expected = np.concatenate([[0.0], np.cumsum(levels * seconds_each)])
    unit = _gamma(cv, float(expected[-1]), np.random.default_rng(seed))
    piece = np.searchsorted(expected, unit, side="right") - 1
    times: Seconds = piece * seconds_each + (unit - expected[piece]) / levels[piece]
    return times


def artifact(rate: float, cv: float, duration: float, seed: Seed) -> Seconds:
    """Arrivals as SpotServe's artifact makes them (gen_query.py): what it calls CV is not one.

    It draws gaps in milliseconds from a gamma distribution of shape ``(1000 / rate) / cv`` and scale ``cv``. Their true
    coefficient of variation is ``sqrt(cv * rate / 1000)``: 0.046 at 0.35/s and "CV 6", almost regular.

    Args:
      rate: requests per second.
      cv: the artifact's parameter of that name.
      duration: seconds.
      seed: see the module.

    Raises:
      ConfigError: an argument is not positive.
    """
    _positive(rate=rate, cv=cv, duration=duration)
    generator = np.random.default_rng(seed)
    return _until(duration, 1 / rate, lambda count: generator.gamma(1000 / rate / cv, cv / 1000, count))


def artifact_piecewise(rates: Sequence[float], seconds_each: float, cv: float, seed: Seed) -> Seconds:
    """Changing rates as the artifact makes them (gen_real_query.py): gaps of a piece's rate until one ends past it.

    Args:
      rates: requests per second in each piece, not 0.
      seconds_each: length of every piece.
      cv: the artifact's parameter of that name, see ``artifact``.
      seed: see the module.

    Raises:
      ConfigError: an argument is not positive.
    """
    _positive(cv=cv, seconds_each=seconds_each)
    generator, now, times = np.random.default_rng(seed), 0.0, list[float]()
    for piece, rate in enumerate(rates):
        _positive(rate=rate)
        while now < (piece + 1) * seconds_each:
            now += float(generator.gamma(1000 / rate / cv, cv)) / 1000
            times.append(now)
    return np.asarray(times)


def lognormal(mean: float, cv: float, count: int, seed: Seed, most: int | None = None) -> Tokens:
    """Lengths with a lognormal distribution, rounded, at least 1.

    Args:
      mean: tokens; of the lengths before they are limited by ``most``.
      cv: standard deviation over mean, of the same; 0 gives all the same length.
      count: how many.
      seed: see the module.
      most: longer ones are cut to this.

    Raises:
      ConfigError: ``mean`` is below 1, ``cv`` is negative, or ``most`` is below 1.
    """
    if not 1 <= mean < np.inf or not 0 <= cv < np.inf or (most is not None and most < 1):
        raise ConfigError(
            f"lengths of mean {mean}, CV {cv}, at most {most}: mean and most must be 1 or more, cv 0 or more"
        )
    sigma = np.sqrt(np.log1p(cv * cv))
    drawn = np.random.default_rng(seed).lognormal(np.log(mean) - sigma * sigma / 2, sigma, count)
    return np.clip(np.rint(drawn), 1, most).astype(np.int64)


def _gamma(cv: float, duration: float, generator: np.random.Generator) -> Seconds:
    """A stationary gamma process of rate 1.

    The gap in which it begins is drawn by length (gamma of a shape larger by 1), and the beginning anywhere in it.
    """
    shape, scale = 1 / (cv * cv), cv * cv
    first = generator.uniform() * generator.gamma(shape + 1, scale)
    if first >= duration:
        return np.empty(0)
    rest = _until(duration - first, 1.0, lambda count: generator.gamma(shape, scale, count))
    return np.concatenate([[first], first + rest])


def _until(duration: float, mean_gap: float, draw: Callable[[int], Seconds]) -> Seconds:
    """Sums of gaps, those before ``duration``."""
    block = int(duration / mean_gap) + 16
    times = np.cumsum(draw(block))
    while times[-1] < duration:
        times = np.concatenate([times, times[-1] + np.cumsum(draw(block))])
    return times[times < duration]


def _positive(**arguments: float) -> None:
    for name, value in arguments.items():
        if not 0 < value < np.inf:
            raise ConfigError(f"{name} must be more than 0, got {value}")
