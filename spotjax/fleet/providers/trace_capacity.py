"""What a recorded spot market gives and takes, and who has which part of it. Pure: no clock, no processes.

Every instance of a trace is a place that one machine may have from when it comes until it goes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from spotjax.fleet.providers.provider import OfferKey
from spotjax.sim.workload import SpotTrace


class What(Enum):
    """What happens to a place."""

    COMES = "comes"
    NOTICE = "has notice"
    GOES = "goes"


class Step(NamedTuple):
    """Something that happens.

    Attributes:
      seconds: when, from the start of the replay.
      what: to the place.
      key: what the place is for.
      place: its name, unique among those of its key at any time.
    """

    seconds: float
    what: What
    key: OfferKey
    place: str


def steps(key: OfferKey, trace: SpotTrace, speed: float, notice: float) -> list[Step]:
    """All that happens in a trace, in order.

    Instances on demand are left out: they are not the market's to give.

    Args:
      key: what its places are for.
      speed: seconds of the trace that pass in one of the replay.
      notice: seconds of the replay before it goes at which a place has notice, but not before it comes.
    """
    since: dict[str, float] = {}
    found: list[Step] = []
    for event in trace.events:
        now = event.seconds / speed
        if not event.on_demand:
            since |= dict.fromkeys(event.added, now)
            found += [Step(now, What.COMES, key, place) for place in event.added]
        for place in event.removed:
            if (came := since.pop(place, None)) is not None:
                found += [Step(max(came, now - notice), What.NOTICE, key, place)] if notice else []
                found.append(Step(now, What.GOES, key, place))
    return merged([found])


def merged(traces: Iterable[Sequence[Step]]) -> list[Step]:
    """The steps of several traces in order of time; those at the same time as they were."""
    return sorted((step for each in traces for step in each), key=lambda step: step.seconds)


@dataclass
class Place:
    """A place in the market.

    Attributes:
      holder: the machine that has it; empty if nobody does.
      noticed: it will go, so nobody gets it any more.
    """

    holder: str = ""
    noticed: bool = False


class Capacity:
    """Which places there are, and which machine has which. Machines get the place that came first."""

    def __init__(self, keys: Iterable[OfferKey]) -> None:
        self._places: dict[OfferKey, dict[str, Place]] = {key: {} for key in keys}

    def apply(self, step: Step) -> str:
        """Something happens; returns the machine that has to go, or is to be told, if there is one."""
        places = self._places[step.key]
        if step.what is What.COMES:
            places[step.place] = Place()
            return ""
        place = places[step.place]
        place.noticed = True
        if step.what is What.GOES:
            del places[step.place]
        return place.holder

    def take(self, machine: str, key: OfferKey) -> bool:
        """Gives a machine a place, if there is one that nobody has."""
        for place in self._places[key].values():
            if not place.holder and not place.noticed:
                place.holder = machine
                return True
        return False

    def give_back(self, machine: str) -> None:
        """A machine needs its place no more, if it has one."""
        for places in self._places.values():
            for place in places.values():
                if place.holder == machine:
                    place.holder = ""

    def count(self, key: OfferKey) -> int:
        """Places there are."""
        return len(self._places[key])
