"""Keeps a fleet's capacity: what is known, put together, and what is to be done about it. No clock, no effects.

Whoever drives it, the controller's loop or a simulation, tells it what the provider and the fleet say, saves the ledger
before it asks for a machine, carries out what is decided, and tells what came of it. ``now`` is in monotonic seconds,
``wall`` in Unix seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random

import msgspec

from spotjax.errors import ProviderError, ProviderRefused
from spotjax.fleet.capacity import ledger as ledgers
from spotjax.fleet.capacity.file import CapacitySettings
from spotjax.fleet.capacity.history import History
from spotjax.fleet.capacity.ledger import Ledger
from spotjax.fleet.capacity.load import Measured
from spotjax.fleet.capacity.next_action import Action, Need, Release, next_action
from spotjax.fleet.capacity.situation import RETURN_SECONDS, Situation, Standing
from spotjax.fleet.capacity.wanted import Basis, Steady, Wanted, affordable, wanted
from spotjax.fleet.providers.machines import GONE
from spotjax.fleet.providers.provider import Machine, MachineState, Offer
from spotjax.meshes.instance import Instance, InstanceState


class Keeper:
    """All that is known of one fleet's machines.

    Attributes:
      ledger: to be saved whenever it has changed; before a machine is asked for at the latest.
      history: what is remembered besides.
      machines: what the provider has said of each.
      offers: what can be had.
      wanted: the last decision on how many; None before the first.
      situation: what that was decided for.
    """

    def __init__(self, settings: CapacitySettings, ledger: Ledger, random: Random, now: float) -> None:
        self.ledger = ledger
        self.history = History(settings, random, now)
        self.machines: dict[str, Machine] = {}
        self.offers: Sequence[Offer] = ()
        self.wanted: Wanted | None = None
        self.situation = Situation((), ())
        self._settings = settings
        self._steady = Steady(settings.shrink_seconds)
        self._listed = False
        self._met: set[str] = set()
        """Machines that were members since this controller began."""

    def listed(self, machines: Sequence[Machine], now: float, began: float, wall: float) -> None:
        """What the provider lists.

        Args:
          machines: all.
          now: when it had answered.
          began, wall: when it was asked.
        """
        self._listed = True
        self.machines = {machine.name: machine for machine in machines}
        for machine in machines:
            self._know(machine, wall)
        waiting = {machine.name for machine in machines if machine.state is MachineState.WAITING}
        self.ledger = ledgers.counted(self.ledger, wall, waiting, self._prices())
        for name, entry in list(self.ledger.entries.items()):
            if entry.released and name not in self.machines and began >= self.history.given.get(name, began):
                self._end(name)
        self.history.listed(now, {machine.name: machine.state for machine in machines})

    def told(self, machine: Machine, wall: float) -> None:
        """The provider has told of a change: see ``Provider.watch``. Counts when it is listed, but for the first."""
        if machine.state is MachineState.STOPPING and machine.detail == GONE:
            self.machines.pop(machine.name, None)
        else:
            self.machines[machine.name] = machine
            self._know(machine, wall)

    def decide(
        self,
        now: float,
        wall: float,
        members: Sequence[Instance],
        measured: Measured,
        basis: Basis | None,
        advised: frozenset[str] = frozenset(),
    ) -> Action | None:
        """What to do; None before the provider has ever said what there is.

        Args:
          now, wall: the time.
          members: of the fleet, those that are gone not included.
          measured: the load.
          basis: what it is planned on; None while no instance has ever joined.
          advised: members whose platform advises to look for others.
        """
        if not self._listed:
            return None
        self._meet(now, members)
        spent = ledgers.counted(self.ledger, wall, (), self._prices())
        floor = spent.floor if wall < spent.floor_until else 0
        cheapest = min((offer.price for offer in self.offers), default=0.0)
        newest = wanted(self._settings, measured, basis, floor=floor, affordable=affordable(self._settings, cheapest))
        self.wanted = self._steady.add(now, newest)
        self.situation = Situation.of(self.ledger, self.machines, members, self.history, now, advised)
        self._mark_short(now)
        leaving = self.history.leaving | {name for name, entry in spent.entries.items() if entry.released}
        return next_action(
            self._settings, self.wanted.instances, self.situation, self.offers, self.history,
            ledgers.budget(spent, self._settings, leaving), now,
        )  # fmt: skip

    def asking(self, offer: Offer, now: float, wall: float) -> str:
        """A machine is about to be asked for: its name. The ledger must be saved first."""
        self.ledger, name = ledgers.asked(self.ledger, self._settings.fleet, offer, wall)
        self.history.last_action = now
        self.history.seen[name] = self.history.asked[name] = now
        return name

    def asked(self, machine: Machine, now: float) -> None:
        """It was asked for."""
        self.history.seen[machine.name] = self.history.asked[machine.name] = now
        self.machines.setdefault(machine.name, machine)

    def not_asked(self, name: str, offer: Offer, problem: ProviderError, now: float) -> None:
        """There is none: the provider has refused."""
        self._end(name)
        longest = self._settings.most_retry_seconds if isinstance(problem, ProviderRefused) else 0.0
        self.history.refused(now, offer, str(problem), longest)

    def unanswered(self, name: str, problem: Exception, seconds: float | None, now: float) -> None:
        """Nobody knows whether it was asked for: it counts as there until the provider lists it, or is told that it is
        not wanted."""
        self.history.seen[name] = now
        self.history.unavailable(now, str(problem), seconds)

    def giving_back(self, release: Release, now: float) -> None:
        """It is about to be given back."""
        self.history.last_action = now
        self.history.leaving.add(release.name)
        if release.blame:
            self.history.refused(now, self.ledger.entries[release.name].offer, release.why)

    def given_back(self, name: str, now: float) -> None:
        """The provider has taken it back."""
        self.history.leaving.discard(name)
        self.history.keeping.pop(name, None)
        self.history.given[name] = now
        if name in self.ledger.entries:
            self.ledger = ledgers.changed(self.ledger, name, released=True)

    def kept(self, name: str, problem: Exception, now: float) -> None:
        """It could not be given back."""
        self.history.kept(now, name, str(problem))

    def hold(self, instances: int, wall: float) -> None:
        """An operator wants at least so many instances, for a time."""
        until = wall + self._settings.add_seconds
        self.ledger = msgspec.structs.replace(self.ledger, floor=instances, floor_until=until)

    def _know(self, machine: Machine, wall: float) -> None:
        if machine.name not in self.ledger.entries:
            since = min(machine.created, wall) if machine.created else wall
            self.ledger = ledgers.found(self.ledger, self._settings.fleet, machine.name, machine.offer, since)

    def _end(self, name: str) -> None:
        self.ledger = ledgers.ended(self.ledger, name)
        self.history.forget(name)

    def _prices(self) -> Mapping[str, float]:
        """The dearer of what each machine is said to cost and would cost today; without those of which nobody says."""
        today = {offer.key: offer.price for offer in self.offers}
        prices = {
            name: max(machine.offer.price, today.get(machine.offer.key, 0.0)) for name, machine in self.machines.items()
        }
        return {name: price for name, price in prices.items() if price}

    def _meet(self, now: float, members: Sequence[Instance]) -> None:
        """Who of the machines is a member now."""
        there = {member.name for member in members if member.state is not InstanceState.JOINING}
        joined = {name: entry.offer.key for name, entry in self.ledger.entries.items() if name in there}
        for name in joined:
            if not self.ledger.entries[name].joined:
                self.ledger = ledgers.changed(self.ledger, name, joined=True)
        self._met |= joined.keys()
        late = now >= self.history.started + RETURN_SECONDS
        gone = [
            name
            for name, entry in self.ledger.entries.items()
            if entry.joined and name not in there and (late or name in self._met)
        ]
        joining = [member.name for member in members if member.state is InstanceState.JOINING]
        self.history.met(now, joined, gone, joining)

    def _mark_short(self, now: float) -> None:
        """Notes since when spot machines are missing."""
        assert self.wanted is not None, "it was just decided"
        need = Need.of(self._settings, self.wanted.instances, self.situation, self.history, now)
        if self.situation.count(Standing.UP, on_demand=False) >= need.spot:
            self.history.short_since = None
        elif self.history.short_since is None:
            self.history.short_since = now
