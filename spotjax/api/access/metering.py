"""How much every caller has used, and whether it may use more. Knows no keys and no wire.

A request is admitted when the caller's buckets have room for it and for its prompt. What it generates is taken from
them as it is committed, whoever reads it, and may overdraw them: then later requests wait. So nobody has to guess how
long an answer becomes, and what a caller gets beyond its limit is bounded by its concurrent requests.

All of it lives in this process: one that starts again begins with full buckets, and counts the running requests that
the commit log has.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from spotjax.api.access.callers import Caller, CallerLimits
from spotjax.api.access.token_bucket import TokenBucket
from spotjax.errors import PermissionDenied, RateLimited

MINUTE, DAY = 60.0, 86_400.0
BUSY_SECONDS = 1.0
"""After which a caller whose requests are all running may ask again."""


@dataclass
class _Use:
    """Of one caller."""

    running: int = 0
    buckets: dict[str, TokenBucket] = field(default_factory=dict)


class Meters:
    """What all callers have used; a ``UseObserver`` of the service.

    Args:
      clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._uses: dict[str, _Use] = {}

    def admit(self, caller: Caller, prompt_tokens: int) -> None:
        """Takes one request and its prompt from what the caller may use.

        Raises:
          RateLimited: not now; says when. Nothing was taken.
          PermissionDenied: never: the prompt alone is more than the caller's limit.
        """
        now, use, limits = self._clock(), self._of(caller.name), caller.limits
        self._fit(use, limits, now)
        if limits.concurrent_requests and use.running >= limits.concurrent_requests:
            raise RateLimited(
                f"{use.running} requests of {caller.name} are running, its limit is {limits.concurrent_requests}",
                BUSY_SECONDS,
            )
        for name, bucket in use.buckets.items():
            amount = 1 if name == "requests_per_minute" else prompt_tokens
            wait = bucket.wait(amount if name == "requests_per_minute" else max(1, amount), now)
            if math.isinf(wait):
                raise PermissionDenied(
                    f"{name} of {caller.name} is {bucket.capacity:g}, this prompt alone has {amount} tokens"
                )
            if wait > 0:
                raise RateLimited(f"{name} of {caller.name} ({bucket.capacity:g}) is used up", wait)
        for name, bucket in use.buckets.items():
            use.buckets[name] = bucket.take(1 if name == "requests_per_minute" else prompt_tokens, now)

    def give_back(self, caller: Caller, prompt_tokens: int) -> None:
        """What was admitted was not accepted after all."""
        now, use = self._clock(), self._of(caller.name)
        for name, bucket in use.buckets.items():
            use.buckets[name] = bucket.take(-1 if name == "requests_per_minute" else -prompt_tokens, now)

    def began(self, owner: str) -> None:
        """See ``UseObserver.began``."""
        self._of(owner).running += 1

    def generated(self, owner: str, tokens: int) -> None:
        """See ``UseObserver.generated``."""
        now, use = self._clock(), self._of(owner)
        for name in ("tokens_per_minute", "tokens_per_day"):
            if (bucket := use.buckets.get(name)) is not None:
                use.buckets[name] = bucket.take(tokens, now)

    def ended(self, owner: str) -> None:
        """See ``UseObserver.ended``."""
        self._of(owner).running -= 1

    def _of(self, owner: str) -> _Use:
        return self._uses.setdefault(owner, _Use())

    @staticmethod
    def _fit(use: _Use, limits: CallerLimits, now: float) -> None:
        """Gives a use the buckets that the limits ask for; one whose limit has changed begins full."""
        for name, seconds in (("requests_per_minute", MINUTE), ("tokens_per_minute", MINUTE), ("tokens_per_day", DAY)):
            capacity = getattr(limits, name)
            bucket = use.buckets.get(name)
            if not capacity:
                use.buckets.pop(name, None)
            elif bucket is None or bucket.capacity != capacity:
                use.buckets[name] = TokenBucket.full(capacity, seconds, now)
