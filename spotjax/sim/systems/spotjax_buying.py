"""A simulated Spotjax that rents its machines: the controller's keeper, in simulated time, with a market that has them.

What is decided here is decided by the functions that the controller calls; only effects, and the market, are simulated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from random import Random

from spotjax.fleet.capacity.file import CapacitySettings
from spotjax.fleet.capacity.keeper import Keeper
from spotjax.fleet.capacity.ledger import Ledger
from spotjax.fleet.capacity.load import Meter
from spotjax.fleet.capacity.next_action import Release, Request
from spotjax.fleet.capacity.wanted import Basis
from spotjax.fleet.change import Planning
from spotjax.fleet.providers.provider import Machine, MachineState, Offer
from spotjax.meshes.instance import InstanceState
from spotjax.sim.systems.spotjax_replicas import Replicas
from spotjax.sim.world import System, World

LIST_SECONDS = 15.0
"""Between two times that the keeper hears what there is, as in the controller."""


class Buying:
    """Keeps the fleet as large as its settings want it.

    Args:
      world: where instances are; those of its trace count as started by hand.
      system: told about those that come.
      planning: what meshes are planned with.
      settings: the operator's.
      replicas: what runs.
    """

    def __init__(
        self, world: World, system: System, planning: Planning, settings: CapacitySettings, replicas: Replicas
    ) -> None:
        self._world, self._system, self._planning, self._replicas = world, system, planning, replicas
        kind = world.scenario.kind
        self.keeper = Keeper(settings, Ledger(), Random(0), world.now)
        self.keeper.offers = (
            Offer(kind.name, "", "spot", kind.spot_price), Offer(kind.name, "", "on_demand", kind.on_demand_price)
        )  # fmt: skip
        self._meter = Meter(settings.window_seconds, world.now)
        self._open: set[int] = set()
        self._tokens = 0
        self._rented: dict[str, Offer] = {}
        self._list_at = world.now

    def arrived(self, request: int) -> None:
        """A request came."""
        self._open.add(request)
        self._meter.arrived(self._world.now, self._world.book.prompt[request])

    def look(self) -> bool:
        """One round of the controller's loop. Returns: whether the mesh has to leave an instance."""
        world, keeper, now = self._world, self.keeper, self._world.now
        self._measure()
        self._give_back()
        if now >= self._list_at:
            keeper.listed(self._machines(), now, now, now)
            self._list_at = now + LIST_SECONDS
        members = [one for one in world.instances.values() if one.state is not InstanceState.JOINING]
        basis = Basis(self._planning, tuple(members), world.scenario.kind)
        action = keeper.decide(now, now, members, self._meter.measured(now), basis)
        if isinstance(action, Request):
            name = keeper.asking(action.offer, now, now)
            self._rented[name] = action.offer
            world.rent(self._system, (name,), on_demand=action.offer.price_class == "on_demand")
            keeper.asked(Machine(name, action.offer, MachineState.STARTING, created=now), now)
        elif isinstance(action, Release):
            keeper.giving_back(action, now)
            if action.name in world.instances and action.drain:
                world.instances[action.name] = replace(world.instances[action.name], state=InstanceState.DRAINING)
                return True
            self._release(action.name)
        return False

    def _measure(self) -> None:
        """What ended since, and how much runs and waits."""
        book, now = self._world.book, self._world.now
        for request in [request for request in self._open if book.finish[request] <= now]:
            self._open.discard(request)
            self._tokens += book.output[request]
            self._meter.finished(book.output[request])
        running = sum(
            min(self._replicas.members[number].replica.load, self._planning.demand.batch)
            for number in self._replicas.running()
        )
        self._meter.sample(now, running, max(0, len(self._open) - running), self._tokens)

    def _give_back(self) -> None:
        """Those that the mesh has left."""
        standing = self._replicas.standing_on()
        for name, one in list(self._world.instances.items()):
            if one.state is InstanceState.DRAINING and name not in standing and name in self._rented:
                self._release(name)

    def _release(self, name: str) -> None:
        if name in self._world.instances:
            self._world.release(name)
        self._rented.pop(name, None)
        self.keeper.given_back(name, self._world.now)
        self._list_at = self._world.now

    def _machines(self) -> Sequence[Machine]:
        """What the market says: those that it has taken have to be released."""
        there = self._world.instances
        return [
            Machine(name, offer, MachineState.RUNNING if name in there else MachineState.PREEMPTED)
            for name, offer in self._rented.items()
        ]
