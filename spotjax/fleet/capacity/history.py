"""What the controller remembers of machines and offers while it runs, besides the ledger: refusals, and since when.

Times are monotonic seconds. After a restart it is empty: everything gets the time that it would have got at first.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import inf
from random import Random

from spotjax.fleet.capacity.file import CapacitySettings
from spotjax.fleet.providers.provider import MachineState, Offer, OfferKey


@dataclass(frozen=True, slots=True)
class Refusal:
    """Something was refused ``at`` a time, so many times in a row; not to be tried again before ``until``."""

    at: float
    until: float
    times: int
    why: str


LONGEST_UNAVAILABLE = 60.0
"""Seconds, at most, between two attempts to reach the provider, or to give a machine back: it costs meanwhile."""
NEVER = Refusal(float("-inf"), float("-inf"), 0, "")


@dataclass
class History:
    """All of that.

    Args:
      settings: how long things are left alone.
      random: for the jitter.
      started: when the controller began.
    """

    settings: CapacitySettings
    random: Random
    started: float
    last_action: float = float("-inf")
    offers: dict[OfferKey, Refusal] = field(default_factory=dict)
    provider: Refusal = NEVER
    """Of the provider as a whole."""
    keeping: dict[str, Refusal] = field(default_factory=dict)
    """Machines that could not be given back."""
    seen: dict[str, float] = field(default_factory=dict)
    """When each machine was asked for, last listed, or last given back."""
    asked: dict[str, float] = field(default_factory=dict)
    """When each machine was asked for."""
    given: dict[str, float] = field(default_factory=dict)
    """When each machine was last given back."""
    running: dict[str, float] = field(default_factory=dict)
    """Since when the provider has said of a machine that it runs."""
    joining: dict[str, float] = field(default_factory=dict)
    """Since when a machine's worker is registered without being ready."""
    left: dict[str, float] = field(default_factory=dict)
    """Since when a machine that had joined is not a member any more."""
    leaving: set[str] = field(default_factory=set)
    """Machines that are being given back: the fleet moves off them, or the provider has been told."""
    short_since: float | None = None
    """Since when there are fewer spot instances than wanted."""

    def refused(self, now: float, offer: Offer, why: str, least_seconds: float = 0.0) -> None:
        """An offer was refused, or came to nothing: it is left alone, so long at least."""
        refusal = self._again(now, self.offers.get(offer.key), why)
        self.offers[offer.key] = replace(refusal, until=max(refusal.until, now + least_seconds))

    def unavailable(self, now: float, why: str, seconds: float | None = None) -> None:
        """The provider could not be asked; it said after how long to try again, or not."""
        self.provider = self._again(now, self.provider, why, LONGEST_UNAVAILABLE)
        if seconds is not None and now + seconds > self.provider.until:
            self.provider = replace(self.provider, until=now + seconds)

    def kept(self, now: float, name: str, why: str) -> None:
        """A machine could not be given back."""
        self.leaving.discard(name)
        self.keeping[name] = self._again(now, self.keeping.get(name), why, LONGEST_UNAVAILABLE)

    def listed(self, now: float, machines: Mapping[str, MachineState]) -> None:
        """The provider has said what there is."""
        self.provider = NEVER
        for name, state in machines.items():
            self.seen[name] = now
            if state is MachineState.RUNNING:
                self.running.setdefault(name, now)

    def met(
        self, now: float, joined: Mapping[str, OfferKey], missing: Iterable[str], joining: Iterable[str] = ()
    ) -> None:
        """The fleet has said who is a member.

        Args:
          now: monotonic seconds.
          joined: machines that are, by what they were asked for as.
          missing: machines that were, and are not.
          joining: machines whose workers are registered, and not ready.
        """
        self.joining = {name: self.joining.get(name, now) for name in joining}
        for name, key in joined.items():
            self.left.pop(name, None)
            if key in self.offers and self.asked.get(name, self.started) > self.offers[key].at:
                del self.offers[key]  # it was good for something again
        for name in missing:
            self.left.setdefault(name, now)

    def forget(self, name: str) -> None:
        """A machine does not exist any more."""
        for remembered in (self.keeping, self.seen, self.asked, self.running, self.joining, self.left, self.given):
            remembered.pop(name, None)
        self.leaving.discard(name)

    def _again(self, now: float, before: Refusal | None, why: str, most_seconds: float = inf) -> Refusal:
        """Twice as long each time, up to a limit, of which a random half to whole."""
        times = 1 if before is None else before.times + 1
        most_seconds = min(most_seconds, self.settings.most_retry_seconds)
        seconds = min(most_seconds, self.settings.retry_seconds * 2.0 ** min(times - 1, 30))
        return Refusal(now, now + seconds * self.random.uniform(0.5, 1.0), times, why)
