"""Machines as the ledger, the provider and the fleet know them, put side by side. Decides nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from spotjax.fleet.capacity.history import History
from spotjax.fleet.capacity.ledger import Entry, Ledger
from spotjax.fleet.providers.provider import Machine, MachineState
from spotjax.meshes.instance import Instance, InstanceState

RETURN_SECONDS = 30.0
"""After its start a controller takes machines that had joined for members, as long: they look for it."""
SETTLE_SECONDS = 30.0
"""A provider may not list a machine that was asked for, or still list one that was given back, for so long."""
STAYING = (InstanceState.JOINING, InstanceState.READY)


class Standing(StrEnum):
    """Where a machine stands with this fleet."""

    COMING = "coming"
    """It was asked for and has not joined yet."""
    UP = "up"
    """A member that stays."""
    LEAVING = "leaving"
    """A member that will go, or a machine that is being given back."""
    AWAY = "away"
    """It runs, it was a member, and is none."""
    DEAD = "dead"
    """It was taken, or failed; what is left of it must be released."""
    ABSENT = "absent"
    """The ledger has it, and the provider does not list it, or not any more."""


@dataclass(frozen=True, slots=True)
class Held:
    """One machine that may exist.

    Attributes:
      entry: what the ledger has of it.
      machine: what the provider says of it; None if it does not list it.
      standing: both together, and with what the fleet says.
      advised: its platform advises to look for another one.
    """

    entry: Entry
    machine: Machine | None
    standing: Standing
    advised: bool = False

    @property
    def name(self) -> str:
        """Of the machine."""
        return self.entry.name

    @property
    def on_demand(self) -> bool:
        """Whether it was asked for on demand."""
        return self.entry.price_class == "on_demand"


@dataclass(frozen=True)
class Situation:
    """All of it.

    Attributes:
      machines: that may exist.
      others: members that this controller has not rented: started by hand. They are never given back.
    """

    machines: tuple[Held, ...]
    others: tuple[Instance, ...]

    @classmethod
    def of(
        cls,
        ledger: Ledger,
        listed: Mapping[str, Machine],
        members: Sequence[Instance],
        history: History,
        now: float,
        advised: frozenset[str] = frozenset(),
    ) -> Situation:
        """Puts things together.

        Args:
          ledger: has an entry for each of ``listed``.
          listed: what the provider said last.
          members: of the fleet, those that are gone not included.
          history: what is remembered.
          now: monotonic seconds.
          advised: members whose platform advises to look for others.
        """
        there = {member.name: member for member in members}
        held = tuple(
            Held(
                entry,
                listed.get(name),
                _standing(entry, listed.get(name), there.get(name), history, now),
                name in advised,
            )
            for name, entry in ledger.entries.items()
        )
        others = tuple(m for m in members if m.name not in ledger.entries and m.state in STAYING)
        return cls(held, others)

    def count(self, standing: Standing, *, on_demand: bool) -> int:
        """How many machines of a price class stand so; of those that are up, without those that advice is about."""
        return sum(
            held.standing is standing and held.on_demand == on_demand and not (held.advised and standing is Standing.UP)
            for held in self.machines
        )


def _standing(entry: Entry, machine: Machine | None, member: Instance | None, history: History, now: float) -> Standing:
    if machine is None:
        if member is not None and member.state in STAYING:
            return Standing.UP  # whatever the provider says
        recent = now < history.seen.get(entry.name, history.started) + SETTLE_SECONDS
        return Standing.COMING if recent and not entry.joined and not entry.released else Standing.ABSENT
    if machine.state in (MachineState.PREEMPTED, MachineState.FAILED):
        return Standing.DEAD
    if entry.name in history.leaving or entry.released or machine.state is MachineState.STOPPING:
        return Standing.LEAVING
    if member is not None:
        return Standing.UP if member.state in STAYING else Standing.LEAVING
    if not entry.joined:
        return Standing.COMING
    if entry.name not in history.left and now < history.started + RETURN_SECONDS:
        return Standing.UP  # an earlier controller had it
    return Standing.AWAY
