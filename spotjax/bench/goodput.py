"""Goodput: requests per second that met every objective. Definition of ``vllm bench serve --goodput``. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf

from spotjax.errors import ConfigError

METRICS = ("ttft", "tpot", "e2el")


@dataclass(frozen=True)
class Objectives:
    """Most milliseconds of each kind; None where nothing is asked for.

    Attributes:
      ttft: until the first token.
      tpot: for each token after the first; a request of one token has 0.
      e2el: until the end.
    """

    ttft: float | None = None
    tpot: float | None = None
    e2el: float | None = None

    @classmethod
    def parse(cls, texts: Sequence[str]) -> Objectives:
        """Of ``ttft:500``, ``tpot:50`` and so on, in milliseconds.

        Raises:
          ConfigError: a metric is unknown or there twice, or its limit is no positive number.
        """
        limits: dict[str, float] = {}
        for text in texts:
            name, _, value = text.partition(":")
            if name not in METRICS or name in limits:
                raise ConfigError(f"--goodput {text!r}: each once of {', '.join(METRICS)}, such as ttft:500")
            try:
                limits[name] = float(value)
            except ValueError:
                raise ConfigError(f"--goodput {text!r}: the limit must be milliseconds, such as {name}:500") from None
            if not 0 < limits[name] < inf:
                raise ConfigError(f"--goodput {text!r}: the limit must be more than 0 ms")
        return cls(**limits)

    def __bool__(self) -> bool:
        return any(limit is not None for limit in (self.ttft, self.tpot, self.e2el))

    def met(self, ttft: float, tpot: float, e2el: float) -> bool:
        """Whether a request of these times, in seconds, met all of them."""
        pairs: Iterable[tuple[float, float | None]] = ((ttft, self.ttft), (tpot, self.tpot), (e2el, self.e2el))
        # divided as vLLM does, so that both agree on what is exactly at the limit
        return all(limit is None or seconds <= limit / 1000 for seconds, limit in pairs)
