"""How many tokens prompts and outputs have: distributions as the command line spells them. Pure, seeded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, floor, inf
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from spotjax.errors import ConfigError
from spotjax.sim.traces.arrivals import lognormal

Tokens: TypeAlias = NDArray[np.int64]
SPELLINGS = "COUNT, uniform:mean=M,ratio=R, lognormal:mean=M,cv=X[,most=N]"


@dataclass(frozen=True)
class Fixed:
    """All of one length."""

    tokens: int

    def draw(self, count: int, random: np.random.Generator) -> Tokens:
        """Lengths of ``count`` requests."""
        return np.full(count, self.tokens)


@dataclass(frozen=True)
class Uniform:
    """Whole numbers from ``floor(mean * (1 - ratio))`` to ``ceil(mean * (1 + ratio))``, all as likely, at least 1.

    As the random data set of vLLM has them (``get_sampling_params`` in vllm/benchmarks/datasets/utils.py).
    """

    mean: int
    ratio: float

    def draw(self, count: int, random: np.random.Generator) -> Tokens:
        """Lengths of ``count`` requests."""
        low, high = floor(self.mean * (1 - self.ratio)), ceil(self.mean * (1 + self.ratio))
        return random.integers(max(low, 1), max(high, 1) + 1, size=count)


@dataclass(frozen=True)
class Lognormal:
    """Lognormal, rounded, at least 1 and at most ``most``; ``mean`` and ``cv`` are those before that limit."""

    mean: float
    cv: float
    most: int | None

    def draw(self, count: int, random: np.random.Generator) -> Tokens:
        """Lengths of ``count`` requests."""
        return lognormal(self.mean, self.cv, count, random, self.most)


Lengths: TypeAlias = Fixed | Uniform | Lognormal


def parse_lengths(flag: str, text: str) -> Lengths:
    """The distribution that a flag spells.

    Raises:
      ConfigError: it is none, or a number is out of range; names the flag.
    """
    name, colon, rest = text.partition(":")
    if not colon:
        return Fixed(_whole(flag, "COUNT", text))
    match name:
        case "uniform":
            given = _parameters(flag, name, rest, required=("mean", "ratio"))
            ratio = _number(flag, "ratio", given["ratio"])
            if not 0 <= ratio < 1:
                raise ConfigError(f"{flag}: ratio must be 0 or more and below 1, got {ratio:g}")
            return Uniform(_whole(flag, "mean", given["mean"]), ratio)
        case "lognormal":
            given = _parameters(flag, name, rest, required=("mean", "cv"), optional=("most",))
            mean, cv = (_number(flag, part, given[part]) for part in ("mean", "cv"))
            if not 1 <= mean < inf or not 0 <= cv < inf:
                raise ConfigError(f"{flag}: mean must be 1 or more and cv 0 or more, got {mean:g} and {cv:g}")
            return Lognormal(mean, cv, _whole(flag, "most", given["most"]) if "most" in given else None)
    raise ConfigError(f"{flag} {text!r}: expected one of {SPELLINGS}")


def _parameters(
    flag: str, name: str, text: str, required: tuple[str, ...], optional: tuple[str, ...] = ()
) -> Mapping[str, str]:
    given: dict[str, str] = {}
    for part in text.split(","):
        parameter, _, value = part.partition("=")
        if parameter not in (*required, *optional):
            raise ConfigError(f"{flag}: {name} has no {parameter!r}; it has {', '.join((*required, *optional))}")
        given[parameter] = value
    if missing := [parameter for parameter in required if parameter not in given]:
        raise ConfigError(f"{flag}: {name} needs {' and '.join(missing)}")
    return given


def _whole(flag: str, name: str, text: str) -> int:
    value = _number(flag, name, text)
    if value < 1 or value % 1:
        raise ConfigError(f"{flag}: {name} must be a whole number of at least 1, got {text}")
    return int(value)


def _number(flag: str, name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ConfigError(f"{flag}: {name} must be a number, got {text!r}; expected one of {SPELLINGS}") from None
    if not abs(value) < inf:
        raise ConfigError(f"{flag}: {name} must be finite, got {text}")
    return value
