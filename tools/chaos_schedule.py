"""What is to happen to a service under load: kinds of harm, and events drawn by seed. Pure; ``tools.chaos`` does it."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass

MOST_TOKENS = 120
"""Most tokens that clients see between two events."""


@dataclass(frozen=True)
class Kind:
    """A kind of event.

    Attributes:
      takes: instances that it needs.
      loses: of these, how many are gone afterwards until they are brought back.
      away: of these, how many come back by themselves.
      shortest, longest: seconds that it lasts, where it does.
      needs: ``embedded`` any service, ``processes``, ``network``; ``controller`` one that may die, also with ``clocks``
        or a ``disk`` of its own.
    """

    takes: int
    loses: int = 0
    away: int = 0
    shortest: float = 0.0
    longest: float = 0.0
    needs: str = "processes"


KINDS = {
    "kill": Kind(1, loses=1, needs="embedded"),
    "kill two": Kind(2, loses=2, needs="embedded"),
    "kill in a change": Kind(2, loses=2, needs="embedded"),  # one is given notice, the other killed as its bytes move
    "terminate": Kind(1, loses=1, needs="embedded"),  # SIGTERM, with grace
    "preempt": Kind(1, loses=1, shortest=5.0, longest=10.0, needs="embedded"),  # the operators' command
    "kill newcomer": Kind(0, shortest=0.1, longest=3.0),  # one that is gone starts and is killed somewhere on its way
    "freeze": Kind(1, away=1, shortest=2.5, longest=4.0),  # stopped as a whole, longer than the lease
    "pause": Kind(1, shortest=0.1, longest=1.0),  # the same, shorter
    "hang": Kind(1, away=1, shortest=0.5, longest=3.0),  # the worker is stopped, what speaks for it is not
    "cut": Kind(1, away=1, shortest=2.5, longest=4.0, needs="network"),  # longer than the lease
    "blip": Kind(1, shortest=0.2, longest=0.8, needs="network"),
    "slow": Kind(1, shortest=0.5, longest=2.0, needs="network"),
    "sever": Kind(1, away=1, needs="network"),  # connections of the data plane are reset, and can be made anew
    "controller": Kind(0, longest=3.0, needs="controller"),  # killed, and started again so much later
    "controller twice": Kind(0, longest=3.0, needs="controller"),  # and killed again so much after its start
    "controller at admission": Kind(0, longest=0.15, needs="controller"),  # killed while many requests come in
    "controller in a change": Kind(1, loses=1, longest=0.05, needs="controller"),  # so much after a step of one
    "controller in a join": Kind(1, away=1, longest=0.05, needs="controller"),  # the same; killed before, and back
    "controller in a drain": Kind(1, loses=1, longest=0.2, needs="controller"),  # so much after it began
    "controller and one": Kind(1, loses=1, longest=1.0, needs="controller"),  # killed while there is no controller
    "controller and all": Kind(0, longest=1.0, needs="controller"),  # the same, and brought back without one
    "controller frozen": Kind(0, shortest=2.5, longest=4.0, needs="controller"),  # stopped, longer than the lease
    "controller elsewhen": Kind(0, longest=1.0, needs="clocks"),  # started again with another monotonic time, and back
    "full disk": Kind(0, shortest=1.0, longest=3.0, needs="disk"),  # nothing can be recorded
    "loss with a full disk": Kind(1, loses=1, shortest=1.0, longest=3.0, needs="disk"),  # of an instance, meanwhile
    "controller with a full disk": Kind(0, longest=1.0, needs="disk"),  # killed while it cannot
    "controller to a full disk": Kind(0, shortest=1.0, longest=3.0, needs="disk"),  # killed and started meanwhile
}
JOIN = "join"
"""Brings some of those back that are gone."""
NEWCOMER = "kill newcomer"
FOLLOWS = -1
"""Tokens before an event that follows hard upon the one before."""
HASTY, JOINS, TOO_FEW = 0.2, 0.3, 0.1
"""Shares of events that follow hard, of turns that join if anybody is gone, and of losses that may leave too few."""


@dataclass(frozen=True)
class Event:
    """Something that happens to the service.

    Attributes:
      kind: a key of ``KINDS``, or ``JOIN``.
      targets: instances.
      tokens: how many clients see after the event before; ``FOLLOWS`` hard upon it.
      seconds: how long it lasts.
    """

    kind: str
    targets: tuple[str, ...]
    tokens: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        lasting = f" for {self.seconds:.2f} s" if self.seconds else ""
        return f"{' '.join((self.kind, ', '.join(self.targets))).strip()}{lasting} after {self.tokens} tokens"


def schedule(seed: int, count: int, names: Sequence[str], kinds: Collection[str], enough: int = 2) -> list[Event]:
    """``count`` events, joins included; no kind occurs twice before all have once. The same seed, the same events.

    Targets are part of the fleet when their turn comes, and joins bring back those that are not. Most events leave
    ``enough`` instances, some do not.
    """
    draw = random.Random(seed)
    gone: list[str] = []
    away: list[str] = []
    recovering: list[str] = []
    events: list[Event] = []
    deck: list[str] = []

    def can_be(name: str, there: Sequence[str]) -> bool:
        kind = KINDS[name]
        if name == NEWCOMER:
            return bool(gone)
        left = len(there) - kind.loses - kind.away
        return len(there) >= kind.takes and (left >= enough or draw.random() < TOO_FEW)

    while len(events) < count:
        if not any(name != NEWCOMER for name in deck):  # and they wait until somebody is gone
            deck += draw.sample(sorted(kinds), len(kinds))
        there = [name for name in names if name not in gone and name not in away]
        joins = gone and draw.random() < JOINS
        chosen = None if joins else next((name for name in deck if can_be(name, there)), None)
        tokens = FOLLOWS if draw.random() < HASTY else draw.randint(0, MOST_TOKENS)
        if chosen is not None:
            deck.remove(chosen)
            kind = KINDS[chosen]
            targets = draw.sample(gone, 1) if chosen == NEWCOMER else draw.sample(there, kind.takes)
            tokens = max(tokens, 0) if set(targets) & set(recovering) else tokens
            events.append(Event(chosen, tuple(targets), tokens, draw.uniform(kind.shortest, kind.longest)))
            gone += targets[: kind.loses]
            away = recovering = targets[: kind.away]
        elif gone:
            back = draw.sample(gone, draw.randint(1, len(gone)))
            gone = [name for name in gone if name not in back]
            events.append(Event(JOIN, tuple(back), tokens))
        else:
            away = []  # they are back by then
    return events
