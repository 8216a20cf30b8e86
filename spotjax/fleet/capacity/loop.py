"""The loop that keeps the fleet as large as is wanted: watches provider, members and load, and does what is decided.

Decides nothing; that is ``keeper``'s. Calls to a provider may take their time and fail; nothing here ends the service.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from spotjax.errors import NoFeasibleShape, NoSpareDevices, ProviderError, ProviderUnavailable, UnknownInstance
from spotjax.fleet.capacity.file import CapacitySettings
from spotjax.fleet.capacity.keeper import Keeper
from spotjax.fleet.capacity.ledger import Ledger, counted, on_demand_rate
from spotjax.fleet.capacity.load import Meter
from spotjax.fleet.capacity.next_action import Release, Request, Wait
from spotjax.fleet.capacity.served import Actions, Clocks, Served
from spotjax.fleet.capacity.situation import STAYING
from spotjax.fleet.capacity.wanted import Basis, at_prices, rounded, scale_of
from spotjax.fleet.notices.notice import Notice, NoticeKind, Withdrawn
from spotjax.fleet.providers.machines import GONE
from spotjax.fleet.providers.provider import Machine, MachineState, Provider
from spotjax.fleet.status import CapacityStatus, FleetStatus, MachineStatus
from spotjax.meshes.instance import InstanceState

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""Between two looks; the provider's word ends the wait."""
LIST_SECONDS = 15.0
"""Between two times that the provider is asked for all machines."""
CALL_SECONDS = 120.0
"""After which a call to the provider counts as not answered."""
FORCED_SECONDS = 30.0
"""Notice that an instance gets which must go because of a cap."""
STOPPING_SECONDS = 30.0
"""Notice that it gets when the provider says that it is being taken."""
RESTART_SECONDS = 60.0
"""Longest wait before a loop that failed begins again."""
SCALE_STEPS = 1.25
"""What was measured of the planner's errors is rounded to powers of this."""


Write = Callable[[Ledger], Awaitable[None]]


class CapacityLoop:
    """Runs until cancelled.

    Args:
      settings: the operator's limits.
      provider: who rents machines out.
      keeper: what is known, with the ledger as it was read.
      write: puts the ledger on disk; when it returns, it is there.
      meter: what the controller measures the load with.
      served: the service, None before a worker has told what to serve at.
      clocks: time.

    Attributes:
      meter: as given.
    """

    def __init__(
        self,
        settings: CapacitySettings,
        provider: Provider,
        keeper: Keeper,
        write: Write,
        meter: Meter,
        served: Callable[[], Served | None],
        clocks: Clocks,
    ) -> None:
        self._settings, self._provider, self._keeper, self._write = settings, provider, keeper, write
        self.meter, self._served, self._clocks = meter, served, clocks
        self._stir = asyncio.Event()
        self._releases: set[asyncio.Task[None]] = set()
        self._told_to_go: set[str] = set()
        self._list_at = float("-inf")
        self._saved, self._saving = keeper.ledger, asyncio.Lock()
        self._waiting = Wait()
        self._scale = 1.0
        self._last_basis: Basis | None = None
        self._actions = Actions(served, clocks)

    async def run(self) -> None:
        """Keeps the fleet as wanted. A failure is told and begins anew after a while; the service goes on."""
        failures = 0
        try:
            while True:
                began = self._clocks.monotonic()
                try:
                    await self._run()
                except Exception:
                    failures = failures + 1 if self._clocks.monotonic() < began + RESTART_SECONDS else 1
                    seconds = min(RESTART_SECONDS, 2.0**failures)
                    log.critical("capacity is not kept; trying again in %g s", seconds, exc_info=True)
                    await self._clocks.sleep(seconds)
        finally:
            await self._provider.close()

    async def add(self, count: int) -> Sequence[str]:
        """An operator wants more instances, for a time. Returns: their names, once they are members.

        Raises:
          NoSpareDevices: more than ``most``, or they have not come in the time for which they were wanted.
        """
        keeper, before = self._keeper, self._joined()
        floor = max(len(before), keeper.wanted.instances if keeper.wanted else 0) + count
        if floor > self._settings.most:
            raise NoSpareDevices(f"{floor - count} instances are wanted, and capacity allows {self._settings.most}")
        asked = self._clocks.monotonic()
        keeper.hold(floor, self._clocks.wall())
        await self._save()
        self._stir.set()
        while len(self._joined()) < floor:
            if self._clocks.monotonic() > asked + self._settings.add_seconds:
                why = self._waiting.why or "they did not join"
                raise NoSpareDevices(f"{floor} instances were wanted, {len(self._joined())} are there: {why}")
            await self._clocks.sleep(LOOK_SECONDS)
        return sorted(self._joined() - before)

    def status(self) -> CapacityStatus:
        """What operators see of it."""
        keeper, settings = self._keeper, self._settings
        spent = counted(keeper.ledger, self._clocks.wall(), (), {})
        wanted = keeper.wanted
        return CapacityStatus(
            provider=self._provider.name,
            wanted=wanted.instances if wanted else 0,
            why=wanted.why if wanted else "the provider has not answered yet",
            waiting=self._waiting.why,
            cost_per_hour=spent.rate,
            most_per_hour=settings.cost_per_hour,
            spent_today=spent.spent,
            most_per_day=settings.cost_per_day,
            machines=tuple(
                MachineStatus(
                    held.name, held.entry.type, held.entry.zone, held.entry.price_class, held.entry.price,
                    str(held.machine.state) if held.machine else "not listed", str(held.standing),
                )
                for held in keeper.situation.machines
            ),
            actions=self._actions.last(),
            on_demand_per_hour=on_demand_rate(keeper.ledger, keeper.offers),
            spent=spent.total,
        )  # fmt: skip

    async def _run(self) -> None:
        watching = asyncio.create_task(self._watch())
        try:
            while True:
                await self._look()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_SECONDS):
                        await self._stir.wait()
                self._stir.clear()
                if watching.done():
                    watching.result()
                    raise ProviderUnavailable("the provider's watch has ended")
        finally:
            tasks = [watching, *self._releases]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._keeper.history.leaving.clear()
            await self._save()

    async def _watch(self) -> None:
        """Takes the provider's word as it comes, whatever goes wrong in between."""
        while True:
            try:
                async for machine in self._provider.watch():
                    self._keeper.told(machine, self._clocks.wall())
                    self._tell_fleet(machine)
                    self._stir.set()
            except ProviderError as problem:
                log.warning("the provider tells nothing: %s", problem)
            await self._clocks.sleep(LIST_SECONDS)

    async def _look(self) -> None:
        """One round: looks, decides, and does at most one thing."""
        keeper, now = self._keeper, self._clocks.monotonic()
        if now >= self._list_at and now >= keeper.history.provider.until:
            await self._list()
        served = self._served()
        members = served.members() if served is not None else ()
        basis, advised = None, frozenset[str]()
        if served is not None:
            status = served.status()
            running = sum(replica.running for replica in status.replicas)
            queued = status.queued + sum(replica.waiting for replica in status.replicas)
            self.meter.sample(now, running, queued, status.tokens_committed)
            basis = self._basis(served, status)
            advised = frozenset(instance.name for instance in status.instances if instance.advised)
        action = keeper.decide(now, self._clocks.wall(), members, self.meter.measured(now), basis, advised)
        if isinstance(action, Request):
            await self._request(action)
        elif isinstance(action, Release):
            await self._begin_release(action)
        elif action is not None:
            self._wait(action)
        if keeper.ledger != self._saved:
            await self._save()

    async def _list(self) -> None:
        """Asks the provider for everything: machines, and what can be had."""
        keeper, began, wall = self._keeper, self._clocks.monotonic(), self._clocks.wall()
        try:
            async with asyncio.timeout(CALL_SECONDS):
                keeper.offers = await self._provider.offers()
                machines = await self._provider.list()
        except (ProviderError, TimeoutError) as problem:
            log.warning("the provider lists nothing: %s", problem or "no answer")
            keeper.history.unavailable(self._clocks.monotonic(), str(problem), _patience(problem))
            return
        now = self._clocks.monotonic()
        keeper.listed(machines, now, began, wall)
        self._list_at = now + LIST_SECONDS
        for machine in machines:
            self._tell_fleet(machine)

    def _tell_fleet(self, machine: Machine) -> None:
        """What the provider knows of a member before the fleet does."""
        served = self._served()
        members = {member.name for member in served.members()} if served is not None else set()
        if served is None or machine.name not in members:
            self._told_to_go.discard(machine.name)
            return
        why = f"({self._provider.name}: {machine.state} {machine.detail})"
        source = f"provider-{self._provider.name}"  # the machine's own sources say what they know more exactly
        if machine.state in (MachineState.PREEMPTED, MachineState.FAILED) or machine.detail == GONE:
            served.gone(machine.name, why)
        elif machine.state is MachineState.RUNNING and machine.name in self._told_to_go:
            self._told_to_go.discard(machine.name)
            served.noticed(Withdrawn(source, machine.name, why))
        elif machine.state is MachineState.STOPPING and machine.name not in self._told_to_go:
            self._told_to_go.add(machine.name)
            deadline = self._clocks.monotonic() + STOPPING_SECONDS
            served.noticed(Notice(source, NoticeKind.PREEMPT, machine.name, deadline, machine.detail))

    def _basis(self, served: Served, status: FleetStatus) -> Basis | None:
        """What the load is planned on: instances at the offers' prices, and how fast they turned out to be."""
        members = [member for member in served.members() if member.state in STAYING]
        if not members:
            return self._last_basis
        spot, on_demand = (
            min((offer.price for offer in self._keeper.offers if offer.price_class == each), default=0.0)
            for each in ("spot", "on_demand")
        )
        kind = at_prices(members[0].type, spot, on_demand)
        measured = self.meter.measured(self._clocks.monotonic())
        if status.placement is not None:
            self._scale = scale_of(served.planning, status.placement, kind, measured) or self._scale
        instances = tuple(replace(member, type=at_prices(member.type, spot, on_demand)) for member in members)
        self._last_basis = Basis(served.planning, instances, kind, rounded(self._scale, SCALE_STEPS))
        return self._last_basis

    async def _request(self, request: Request) -> None:
        """Asks for a machine; the ledger has it before the provider does."""
        keeper, offer = self._keeper, request.offer
        name = keeper.asking(offer, self._clocks.monotonic(), self._clocks.wall())
        await self._save()
        try:
            async with asyncio.timeout(CALL_SECONDS):
                machine = await self._provider.request(name, offer)
        except (ProviderUnavailable, TimeoutError) as problem:
            keeper.unanswered(name, problem, _patience(problem), self._clocks.monotonic())
            log.warning("whether %s was asked for is not known: %s", name, problem or "no answer")
        except ProviderError as problem:
            keeper.not_asked(name, offer, problem, self._clocks.monotonic())
            message = f"{offer} was refused: {problem}"
            self._actions.record("stockout", message, type=offer.type, zone=offer.zone, price_class=offer.price_class)
        else:
            keeper.asked(machine, self._clocks.monotonic())
            self._list_at = float("-inf")
            message = f"{name} was asked for as {offer}: {request.why}"
            self._actions.record("requested", message, instance=name, price=offer.price, price_class=offer.price_class)

    async def _begin_release(self, release: Release) -> None:
        self._keeper.giving_back(release, self._clocks.monotonic())
        task = asyncio.create_task(self._release(release))
        self._releases.add(task)
        task.add_done_callback(self._releases.discard)

    async def _release(self, release: Release) -> None:
        """Has the fleet move off a machine, if it is a member, and gives it back."""
        name, served, keeper = release.name, self._served(), self._keeper
        try:
            if release.drain and served is not None:
                with contextlib.suppress(UnknownInstance):
                    await (served.preempt(name, FORCED_SECONDS) if release.forced else served.release(name))
            async with asyncio.timeout(CALL_SECONDS):
                await self._provider.release(name)
        except (NoFeasibleShape, ProviderError, TimeoutError) as problem:
            keeper.kept(name, problem, self._clocks.monotonic())
            log.warning("%s is not given back: %s", name, problem or "no answer")
            return
        except Exception as problem:  # a mistake in the program must not leave a machine that nobody gives back
            keeper.kept(name, problem, self._clocks.monotonic())
            log.critical("%s could not be given back; it is tried again", name, exc_info=True)
            return
        keeper.given_back(name, self._clocks.monotonic())
        self._list_at = float("-inf")
        self._actions.record("released", f"{name} was given back: {release.why}", instance=name)
        self._stir.set()

    def _wait(self, wait: Wait) -> None:
        """Tells once why nothing is done that should be."""
        if wait.kind == "cap" and self._waiting.kind != "cap":
            self._actions.record("cap", f"nothing more is bought: {wait.why}")
        elif wait.kind == "stockout" and self._waiting.kind != "stockout":
            log.warning("%s", wait.why)
        self._waiting = wait

    def _joined(self) -> set[str]:
        """Members that stay."""
        served = self._served()
        return {member.name for member in served.members() if member.state is InstanceState.READY} if served else set()

    async def _save(self) -> None:
        """Has the ledger on disk as it is now."""
        async with self._saving:
            ledger = self._keeper.ledger
            await self._write(ledger)
            self._saved = ledger


def _patience(problem: Exception) -> float | None:
    """Seconds after which a provider said to try again."""
    return problem.retry_after if isinstance(problem, ProviderUnavailable) else None
