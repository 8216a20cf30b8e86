"""What a simulation is fed with, as data: requests as they come, and instances as a market gives and takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spotjax.errors import ConfigError


@dataclass(frozen=True, eq=False)
class RequestTrace:
    """Requests in order of arrival, as columns of one length.

    Attributes:
      name: what it is called in results.
      arrival: seconds from the start, never falling.
      prompt: tokens of each prompt, at least 1.
      output: new tokens of each answer, at least 1.

    Raises:
      ConfigError: columns differ in length, or a number is out of range.
    """

    name: str
    arrival: NDArray[np.float64]
    prompt: NDArray[np.int64]
    output: NDArray[np.int64]

    def __post_init__(self) -> None:
        if not len(self.arrival) == len(self.prompt) == len(self.output):
            raise ConfigError(f"request trace {self.name}: its columns differ in length")
        if len(self.arrival) and (self.arrival[0] < 0 or (np.diff(self.arrival) < 0).any()):
            raise ConfigError(f"request trace {self.name}: arrivals must be at 0 s or later, in order")
        if (self.prompt < 1).any() or (self.output < 1).any():
            raise ConfigError(f"request trace {self.name}: every request has at least one prompt and one output token")

    @classmethod
    def of(cls, name: str, arrival: ArrayLike, prompt: ArrayLike, output: ArrayLike) -> RequestTrace:
        """From any columns; a single number stands for a column of it."""
        times = np.asarray(arrival, dtype=np.float64)
        full = [np.broadcast_to(np.asarray(column, dtype=np.int64), times.shape) for column in (prompt, output)]
        return cls(name, times, *full)

    def __len__(self) -> int:
        return len(self.arrival)

    @property
    def gap_cv(self) -> float:
        """Coefficient of variation of the gaps between arrivals: 1 for a Poisson process."""
        gaps = np.diff(self.arrival)
        return float(gaps.std() / gaps.mean()) if len(gaps) > 1 and gaps.mean() > 0 else 0.0

    def until(self, seconds: float) -> RequestTrace:
        """Those that come before a time."""
        n = int(np.searchsorted(self.arrival, seconds, side="left"))
        return RequestTrace(self.name, self.arrival[:n], self.prompt[:n], self.output[:n])

    def rate(self, seconds: float) -> float:
        """Requests per second over the first ``seconds``."""
        return len(self.until(seconds)) / seconds

    def scaled_to(self, rate: float) -> RequestTrace:
        """The same requests, all times stretched by one factor so that ``rate`` of them come per second.

        The rate is that between the first and the last arrival. The pattern stays, ``gap_cv`` too.

        Raises:
          ConfigError: the rate is not positive, or fewer than two different arrivals have none to scale.
        """
        span = float(self.arrival[-1] - self.arrival[0]) if len(self) else 0.0
        if not 0 < rate < np.inf or span <= 0:
            raise ConfigError(f"request trace {self.name}: cannot scale {len(self)} arrivals in {span} s to {rate} / s")
        factor = (len(self) - 1) / span / rate
        return RequestTrace(self.name, self.arrival * factor, self.prompt, self.output)

    def window(self, start: float, stop: float) -> RequestTrace:
        """Those that come at ``start`` or later and before ``stop``; ``start`` becomes second 0.

        Raises:
          ConfigError: the window is empty or begins before 0 s.
        """
        if not 0 <= start < stop:
            raise ConfigError(f"request trace {self.name}: a window from {start} s to {stop} s")
        first, end = np.searchsorted(self.arrival, (start, stop), side="left")
        kept = slice(int(first), int(end))
        return RequestTrace(self.name, self.arrival[kept] - start, self.prompt[kept], self.output[kept])

    def clipped(self, prompt: int, output: int) -> RequestTrace:
        """With prompts and outputs of at most so many tokens.

        Raises:
          ConfigError: a limit is below one token.
        """
        return RequestTrace(self.name, self.arrival, np.minimum(self.prompt, prompt), np.minimum(self.output, output))


class SpotEvent(NamedTuple):
    """Instances come or go.

    Attributes:
      seconds: when, from the start.
      added: names of those that come: granted by the market, ready after the simulation's start-up time.
      removed: names of those that go; the notice comes the simulation's notice time before.
      on_demand: those that come are rented at the on-demand price.
      notice: seconds of notice that those that go have; None for the simulation's notice time.
    """

    seconds: float
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    on_demand: bool = False
    notice: float | None = None


@dataclass(frozen=True)
class SpotTrace:
    """What the market gives and takes.

    Attributes:
      name: what it is called in results.
      events: in order of time.
      duration: seconds; the simulation ends then.

    Raises:
      ConfigError: events are out of order or after the end, or an instance comes twice or goes without being there.
    """

    name: str
    events: tuple[SpotEvent, ...]
    duration: float

    def __post_init__(self) -> None:
        there: set[str] = set()
        last = 0.0
        for event in self.events:
            if not last <= event.seconds <= self.duration:
                raise ConfigError(
                    f"spot trace {self.name}: an event at {event.seconds} s is out of order or after {self.duration} s"
                )
            last = event.seconds
            if there & set(event.added) or len(set(event.added)) < len(event.added):
                raise ConfigError(f"spot trace {self.name}: at {last} s an instance comes that is there already")
            there |= set(event.added)
            if not set(event.removed) <= there:
                raise ConfigError(f"spot trace {self.name}: at {last} s an instance goes that is not there")
            there -= set(event.removed)

    def counts(self) -> list[tuple[float, int]]:
        """(seconds, instances from then on) at every change."""
        there, steps = 0, list[tuple[float, int]]()
        for event in self.events:
            there += len(event.added) - len(event.removed)
            if steps and steps[-1][0] == event.seconds:
                steps[-1] = event.seconds, there
            else:
                steps.append((event.seconds, there))
        return steps

    def window(self, start: float, stop: float) -> SpotTrace:
        """What happens after ``start``, up to and with ``stop``; ``start`` becomes second 0.

        Those that are there at ``start`` come at second 0.

        Raises:
          ConfigError: the window is empty or not inside of the trace.
        """
        if not 0 <= start < stop <= self.duration:
            raise ConfigError(f"spot trace {self.name}: a window from {start} s to {stop} s of {self.duration} s")
        there: dict[str, bool] = {}
        for event in self.events:
            if event.seconds <= start:
                there |= dict.fromkeys(event.added, event.on_demand)
                there = {name: paid for name, paid in there.items() if name not in event.removed}
        groups = [(paid, tuple(name for name in there if there[name] is paid)) for paid in (False, True)]
        first = [SpotEvent(0.0, added=names, on_demand=paid) for paid, names in groups if names]
        later = [
            event._replace(seconds=event.seconds - start) for event in self.events if start < event.seconds <= stop
        ]
        return SpotTrace(self.name, (*first, *later), stop - start)

    def held(self, most: int) -> SpotTrace:
        """As rented by one who wants no more than ``most`` instances at a time, of those that are offered.

        Takes those that came first, and keeps each until it goes; when one does, rents the oldest that is offered and
        not rented. An instance that was given up never comes back under its name.
        """
        offered: dict[str, bool] = {}  # on demand
        rented: list[str] = []
        events: list[SpotEvent] = []
        for event in self.events:
            offered |= dict.fromkeys(event.added, event.on_demand)
            gone = tuple(name for name in event.removed if name in rented)
            for name in event.removed:
                del offered[name]
            rented = [name for name in rented if name not in gone]
            if gone:
                events.append(SpotEvent(event.seconds, removed=gone, notice=event.notice))
            new = [name for name in offered if name not in rented][: most - len(rented)]
            rented += new
            for on_demand in (False, True):
                if some := tuple(name for name in new if offered[name] == on_demand):
                    events.append(SpotEvent(event.seconds, added=some, on_demand=on_demand))
        return SpotTrace(self.name, tuple(events), self.duration)


def by_counts(name: str, counts: Sequence[tuple[float, int]], duration: float) -> SpotTrace:
    """A trace from numbers of instances over time. The youngest go first, as the last to come bid least."""
    there: list[str] = []
    events: list[SpotEvent] = []
    given = 0
    for seconds, wanted in counts:
        if wanted > len(there):
            new = tuple(f"i-{given + number}" for number in range(wanted - len(there)))
            given += len(new)
            there += new
            events.append(SpotEvent(seconds, added=new))
        elif wanted < len(there):
            gone = tuple(there[wanted:])
            del there[wanted:]
            events.append(SpotEvent(seconds, removed=gone))
    return SpotTrace(name, tuple(events), duration)
