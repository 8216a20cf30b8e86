"""What a live race is run on, as data: requests as they come, and what happens to the instances. Pure.

A trace is lines of ``SECONDS WHAT NAME``: ``join`` starts a process of that name, ``leave`` gives it notice and takes
it when its grace is over, ``kill`` takes it at once. Those that join at 0 are there before the first request.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from spotjax.errors import ConfigError
from spotjax.sim.workload import RequestTrace, SpotEvent, SpotTrace

What = Literal["join", "leave", "kill"]
Arrivals = Literal["poisson", "bursty"]
DEFAULT_TRACE = """\
0 join a
0 join b
0 join c
0 join d
0 join e
0 join f
8 kill c
10 join g
24 leave a
26 join h
40 kill d
43 kill e
45 join i
47 join j
58 leave b
"""
"""A minute in which six instances become five or four again and again: without notice and with it."""


@dataclass(frozen=True, slots=True)
class Happening:
    """Something that happens to an instance.

    Attributes:
      seconds: when, from the start.
      what: what it is.
      name: of the instance.
    """

    seconds: float
    what: What
    name: str


def parse_trace(text: str, name: str = "the trace") -> tuple[Happening, ...]:
    """Reads a trace.

    Raises:
      ConfigError: a line is not one, is out of order, or an instance joins twice or ends without being there.
    """
    happenings: list[Happening] = []
    there: set[str] = set()
    for number, line in enumerate(text.splitlines(), 1):
        if not (words := line.partition("#")[0].split()):
            continue
        try:
            seconds, what, instance = float(words[0]), words[1], words[2]
        except (ValueError, IndexError):
            raise ConfigError(f"{name}, line {number}: expected SECONDS WHAT NAME, got {line.strip()!r}") from None
        if what not in get_args(What) or len(words) > 3:
            raise ConfigError(f"{name}, line {number}: {what!r} is none of {', '.join(get_args(What))}")
        if not math.isfinite(seconds) or seconds < (happenings[-1].seconds if happenings else 0.0):
            raise ConfigError(f"{name}, line {number}: {seconds:g} s is out of order")
        if (what == "join") == (instance in there):
            raise ConfigError(
                f"{name}, line {number}: {instance} {'is there already' if what == 'join' else 'is not there'}"
            )
        there ^= {instance}
        happenings.append(Happening(seconds, what, instance))  # type: ignore[arg-type]
    if not any(one.seconds == 0 for one in happenings):
        raise ConfigError(f"{name}: no instance is there at the start (0 join NAME)")
    return tuple(happenings)


def first(trace: Sequence[Happening]) -> list[str]:
    """The instances that are there before the first request."""
    return [one.name for one in trace if one.what == "join" and one.seconds == 0]


def ends(trace: Sequence[Happening], grace: float) -> dict[str, float]:
    """When each instance that does not last is taken: seconds from the start."""
    return {one.name: one.seconds + (grace if one.what == "leave" else 0.0) for one in trace if one.what != "join"}


def instance_seconds(trace: Sequence[Happening], grace: float, until: float) -> float:
    """What is paid for: every instance from its start until it is taken, or to the end."""
    taken = ends(trace, grace)
    begins = {one.name: one.seconds for one in trace if one.what == "join"}
    return sum(max(0.0, min(taken.get(name, until), until) - begin) for name, begin in begins.items())


def spot_trace(trace: Sequence[Happening], grace: float, duration: float) -> SpotTrace:
    """The same for the simulator: those that are killed have no notice."""
    taken = ends(trace, grace)
    changes = [
        SpotEvent(one.seconds, added=(one.name,))
        if one.what == "join"
        else SpotEvent(taken[one.name], removed=(one.name,), notice=grace if one.what == "leave" else 0.0)
        for one in trace
    ]
    happened = sorted((event for event in changes if event.seconds <= duration), key=lambda event: event.seconds)
    return SpotTrace("live", tuple(happened), duration)


def arrival_times(kind: Arrivals, rate: float, duration: float, cv: float, seed: int) -> NDArray[np.float64]:
    """Seconds at which requests come: a Poisson process, or one whose gaps are Gamma with coefficient of variation cv.

    Raises:
      ConfigError: rate or cv is not positive.
    """
    if rate <= 0 or cv <= 0:
        raise ConfigError(f"requests need a rate and a cv above 0, got {rate:g} and {cv:g}")
    spread = 1.0 if kind == "poisson" else cv * cv
    draw = np.random.default_rng(seed)
    gaps = draw.gamma(1 / spread, spread / rate, size=max(64, int(8 * rate * duration * max(1.0, spread))))
    times = np.cumsum(gaps)
    kept: NDArray[np.float64] = times[times < duration]
    return kept


@dataclass(frozen=True)
class Question:
    """A request that has one right answer.

    Attributes:
      name: unique.
      prompt: token ids.
      output: new tokens.
    """

    name: str
    prompt: tuple[int, ...]
    output: int


def questions(count: int, prompt: tuple[int, int], output: tuple[int, int], vocab: int, seed: int) -> list[Question]:
    """Different requests, with lengths drawn evenly from [least, most]."""
    draw = random.Random(seed)
    return [
        Question(
            f"q{number}", tuple(draw.randrange(1, vocab) for _ in range(draw.randint(*prompt))), draw.randint(*output)
        )
        for number in range(count)
    ]


@dataclass(frozen=True)
class Workload:
    """Which request comes when.

    Attributes:
      arrivals: what kind of process.
      times: seconds from the start.
      asked: which question, at each of them.
    """

    arrivals: Arrivals
    times: tuple[float, ...]
    asked: tuple[Question, ...]

    @classmethod
    def drawn(cls, arrivals: Arrivals, times: Iterable[float], of: Sequence[Question], seed: int) -> Workload:
        """A question for every arrival."""
        draw = random.Random(seed)
        seconds = tuple(map(float, times))
        return cls(arrivals, seconds, tuple(draw.choice(of) for _ in seconds))

    def request_trace(self) -> RequestTrace:
        """The same for the simulator."""
        return RequestTrace.of(
            self.arrivals, self.times, [len(one.prompt) for one in self.asked], [one.output for one in self.asked]
        )
