"""When requests come. Pure: seconds are drawn from a generator that is passed in; nobody waits here.

The definitions are those of ``vllm bench serve`` (``get_request`` in vllm/benchmarks/serve.py): gaps of a gamma
distribution of shape ``burstiness`` and mean ``1 / rate``, summed up, then stretched so that the last of n requests
comes at exactly ``n / rate`` seconds. The first one comes after a gap, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from spotjax.errors import ConfigError

Seconds: TypeAlias = NDArray[np.float64]
ArrivalKind = Literal["all", "fixed", "poisson", "gamma", "trace"]
ARRIVAL_KINDS: tuple[ArrivalKind, ...] = get_args(ArrivalKind)


@dataclass(frozen=True)
class Arrivals:
    """How requests come.

    Attributes:
      kind: ``all`` at once; ``fixed`` gaps; ``poisson``; ``gamma``; ``trace``, as recorded.
      rate: requests per second; None for ``all``, and for a trace that keeps its own.
      burstiness: of ``gamma``: the gaps' coefficient of variation is ``burstiness ** -0.5``. 1 is Poisson, less comes
        in bursts, more is evener.

    Raises:
      ConfigError: a rate is missing, of no use or not positive, or so is the burstiness.
    """

    kind: ArrivalKind
    rate: float | None = None
    burstiness: float | None = None

    def __post_init__(self) -> None:
        if self.kind == "all" and self.rate is not None:
            raise ConfigError(f"--rate {self.rate:g} has no meaning when all requests come at once")
        if self.kind not in ("all", "trace") and self.rate is None:
            raise ConfigError(f"--arrivals {self.kind} needs --rate REQUESTS_PER_SECOND")
        if self.rate is not None and not 0 < self.rate < inf:
            raise ConfigError(f"--rate must be more than 0 and finite, got {self.rate:g}")
        if (self.kind == "gamma") is (self.burstiness is None):
            raise ConfigError("--arrivals gamma needs --burstiness, and no others do")
        if self.burstiness is not None and not 0 < self.burstiness < inf:
            raise ConfigError(f"--burstiness must be more than 0 and finite, got {self.burstiness:g}")

    def draw(self, count: int, random: np.random.Generator) -> Seconds:
        """Seconds from the start at which ``count`` requests come, never falling. Not for ``trace``."""
        if self.kind == "all":
            return np.zeros(count)
        assert self.rate is not None and self.kind != "trace"
        if self.kind == "fixed":
            return np.arange(1, count + 1) / self.rate
        shape = 1.0 if self.burstiness is None else self.burstiness
        times = np.cumsum(random.gamma(shape, 1 / (self.rate * shape), count))
        # a tiny shape can draw gaps of 0 only
        stretched: Seconds = times * (count / self.rate / times[-1]) if count and times[-1] > 0 else times
        return stretched
