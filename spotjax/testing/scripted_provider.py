"""A cloud in memory that does what a test says: capacity, quota, prices, preemption, errors, in time of any clock.

What happens at which time is laid down with ``ScriptedCloud.at``; nothing is drawn by chance. The cloud outlives
providers, as a real one does, and tells what it was asked and what it was paid.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from spotjax.errors import OutOfCapacity, ProviderError, ProviderRefused, ProviderUnavailable, QuotaExceeded
from spotjax.fleet.providers.machines import Machines
from spotjax.fleet.providers.provider import Machine, MachineState, Offer, OfferKey

Call = Literal["offers", "list", "request", "release"]
PAID = (MachineState.STARTING, MachineState.RUNNING, MachineState.STOPPING)
"""States in which a machine takes capacity and costs."""


@dataclass(frozen=True)
class Asked:
    """A call that came.

    Attributes:
      seconds: when, by the cloud's clock.
      call: which method.
      name: of the machine; empty where there is none.
      offer: what was asked for, by ``request``.
    """

    seconds: float
    call: Call
    name: str = ""
    offer: Offer | None = None


class ScriptedCloud:
    """A cloud for any number of fleets. ``provider`` is what a controller gets.

    Attributes:
      asked: every call that came.
      spent: USD, up to the last change.
    """

    def __init__(
        self,
        offers: Sequence[Offer],
        clock: Callable[[], float],
        *,
        start_seconds: float = 0.0,
        stop_seconds: float = 0.0,
        waits: bool = False,
        quota: int | None = None,
    ) -> None:
        """A cloud with as many machines as anybody may want.

        Args:
          offers: what can be rented, with the first prices.
          clock: seconds; whatever is due happens at the next call, and by itself while somebody watches.
          start_seconds: from the grant to RUNNING.
          stop_seconds: from the release until a machine is gone.
          waits: requests beyond the capacity wait, rather than raise OutOfCapacity.
          quota: machines of all fleets at once; more raise QuotaExceeded.
        """
        self._offers = {offer.key: offer for offer in offers}
        self._capacity: dict[OfferKey, int] = {}
        self._fleets: dict[str, Machines] = {}
        self._clock, self._start, self._stop, self._waits, self._quota = (
            clock,
            start_seconds,
            stop_seconds,
            waits,
            quota,
        )
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._failures: list[tuple[Call, ProviderError, bool]] = []
        self._now = clock()
        self.asked: list[Asked] = []
        self.spent = 0.0

    def provider(self, fleet: str = "fleet") -> ScriptedProvider:
        """The cloud as a fleet sees it. Another one for the same fleet finds the same machines."""
        return ScriptedProvider(self, fleet)

    # -- the script

    def at(self, seconds: float, action: Callable[[], None]) -> None:
        """Lets something happen when the clock says ``seconds``, such as ``lambda: cloud.preempt("a")``."""
        heapq.heappush(self._due, (seconds, next(self._order), action))

    def advance(self) -> None:
        """Lets all happen that is due."""
        now = self._clock()
        while self._due and self._due[0][0] <= now:
            seconds, _, action = heapq.heappop(self._due)
            self._pay(seconds)
            action()
        self._pay(now)

    def set_capacity(self, offer: Offer, machines: int) -> None:
        """From now on there may be as many of these; those above it stay until they are preempted or released."""
        self._capacity[offer.key] = machines
        self._grant()

    def set_price(self, offer: Offer, price: float) -> None:
        """From now on these cost as much, those that run already, too."""
        self._offers[offer.key] = replace(self._offers[offer.key], price=price)

    def set_quota(self, machines: int | None) -> None:
        """From now on there may be as many machines."""
        self._quota = machines

    def preempt(self, name: str, fleet: str = "fleet") -> None:
        """Takes a machine, if there is one of that name that costs."""
        machines = self._machines(fleet)
        if (machine := machines.get(name)) is not None and machine.state in PAID:
            machines.put(replace(machine, state=MachineState.PREEMPTED, detail="preempted"))
            self._grant()

    def break_down(self, name: str, failure: type[ProviderError] | None = None, fleet: str = "fleet") -> None:
        """Lets a machine fail, also one that waits."""
        machines = self._machines(fleet)
        if (machine := machines.get(name)) is not None:
            machines.put(replace(machine, state=MachineState.FAILED, detail="broke down", failure=failure))
            self._grant()

    def say(self, name: str, state: MachineState, fleet: str = "fleet") -> None:
        """Puts a machine, if there is one of that name, into a state, as when one that stops is started again."""
        machines = self._machines(fleet)
        if (machine := machines.get(name)) is not None:
            machines.put(replace(machine, state=state))

    def fail(self, call: Call, error: ProviderError) -> None:
        """The next such call raises that, and nothing is done."""
        self._failures.append((call, error, False))

    def lose_answer(self, call: Call) -> None:
        """The next such call is carried out, but its answer is lost, as ProviderUnavailable."""
        self._failures.append((call, ProviderUnavailable("the connection was lost before the answer"), True))

    # -- what there is

    def machines(self, fleet: str = "fleet") -> tuple[Machine, ...]:
        """Of a fleet, now, without a call that could fail."""
        self.advance()
        return self._machines(fleet).all()

    @property
    def offers(self) -> tuple[Offer, ...]:
        """With today's prices."""
        self.advance()
        return tuple(self._offers.values())

    # -- what providers call

    def answer(self, act: Callable[[], None], call: Call, name: str = "", offer: Offer | None = None) -> None:
        """Takes a call, and carries it out unless it is to fail."""
        self.asked.append(Asked(self._clock(), call, name, offer))
        self.advance()
        at = next((at for at, (of, _, _) in enumerate(self._failures) if of == call), None)
        failure = self._failures.pop(at) if at is not None else None
        if failure is None or failure[2]:
            act()
        if failure is not None:
            raise failure[1]

    def request(self, fleet: str, name: str, offer: Offer) -> None:
        """See ``Provider.request``."""
        machines = self._machines(fleet)
        if machines.get(name) is not None:
            return
        if (known := self._offers.get(offer.key)) is None:
            raise ProviderRefused(f"there is no {offer}")
        everyone = [machine for each in self._fleets.values() for machine in each.all()]
        if self._quota is not None and sum(map(_counts, everyone)) >= self._quota:
            raise QuotaExceeded(f"a quota of {self._quota} machines is used up")
        if not self._waits and not self._room(offer.key):
            raise OutOfCapacity(f"there are no more {offer.type} in {offer.zone} as {offer.price_class}")
        machines.put(Machine(name, known, MachineState.WAITING, created=self._now))
        self._grant()

    def release(self, fleet: str, name: str) -> None:
        """See ``Provider.release``."""
        machines = self._machines(fleet)
        if (machine := machines.get(name)) is None or machine.state is MachineState.STOPPING:
            return
        if machine.state in PAID and self._stop:
            stopping = machines.put(replace(machine, state=MachineState.STOPPING))
            self.at(self._now + self._stop, lambda: self._forget(fleet, stopping))
        else:
            self._forget(fleet, machine)

    async def watch(self, fleet: str) -> AsyncIterator[Machine]:
        """See ``Provider.watch``."""
        self.advance()
        with self._machines(fleet).told() as changes:
            while True:
                wait = max(0.0, self._due[0][0] - self._clock()) if self._due else None
                with contextlib.suppress(TimeoutError):
                    yield await asyncio.wait_for(changes.get(), wait)
                self.advance()

    def _machines(self, fleet: str) -> Machines:
        return self._fleets.setdefault(fleet, Machines())

    def _forget(self, fleet: str, machine: Machine) -> None:
        if (there := self._machines(fleet).get(machine.name)) is not None and there.created == machine.created:
            self._machines(fleet).drop(machine.name)
            self._grant()

    def _room(self, key: OfferKey) -> bool:
        """Whether there is one more."""
        everyone = [machine for each in self._fleets.values() for machine in each.all()]
        used = sum(machine.state in PAID and machine.offer.key == key for machine in everyone)
        return used < self._capacity.get(key, used + 1)

    def _grant(self) -> None:
        """Gives what there is to those that wait, in the order in which they came."""
        for fleet, machines in self._fleets.items():
            for machine in machines.all():
                if machine.state is MachineState.WAITING and self._room(machine.offer.key):
                    granted = machines.put(replace(machine, state=MachineState.STARTING))
                    if self._start:
                        self.at(self._now + self._start, lambda f=fleet, m=granted: self._started(f, m))  # type: ignore[misc]
                    else:
                        self._started(fleet, granted)

    def _started(self, fleet: str, granted: Machine) -> None:
        if self._machines(fleet).get(granted.name) == granted:
            self._machines(fleet).put(replace(granted, state=MachineState.RUNNING))

    def _pay(self, now: float) -> None:
        """For the time since the last change."""
        hours = (now - self._now) / 3600
        for machines in self._fleets.values():
            for machine in machines.all():
                if machine.state in PAID:
                    self.spent += hours * self._offers[machine.offer.key].price
        self._now = now


class ScriptedProvider:
    """A ``ScriptedCloud`` for one fleet. See ``Provider``."""

    name = "scripted"

    def __init__(self, cloud: ScriptedCloud, fleet: str) -> None:
        self._cloud, self._fleet = cloud, fleet

    async def offers(self) -> Sequence[Offer]:
        """See ``Provider``."""
        self._cloud.answer(lambda: None, "offers")
        return self._cloud.offers

    async def list(self) -> Sequence[Machine]:
        """See ``Provider``."""
        self._cloud.answer(lambda: None, "list")
        return self._cloud.machines(self._fleet)

    async def request(self, name: str, offer: Offer) -> Machine:
        """See ``Provider``."""
        self._cloud.answer(lambda: self._cloud.request(self._fleet, name, offer), "request", name, offer)
        return next(machine for machine in self._cloud.machines(self._fleet) if machine.name == name)

    async def release(self, name: str) -> None:
        """See ``Provider``."""
        self._cloud.answer(lambda: self._cloud.release(self._fleet, name), "release", name)

    def watch(self) -> AsyncIterator[Machine]:
        """See ``Provider``."""
        return self._cloud.watch(self._fleet)

    async def close(self) -> None:
        """See ``Provider``."""


def _counts(machine: Machine) -> bool:
    """Whether it counts for the quota."""
    return machine.state in (MachineState.WAITING, *PAID)
