"""Machines of Compute Engine: single instances from a template, spot or on demand. Which calls are made, and when.

What an instance is asked for as, and what answers mean, is in ``gce_machines``; the calls are in ``gce_compute``. All
that is remembered is what came of requests that failed before there was an instance.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from weakref import WeakValueDictionary

from google.cloud import compute_v1

from spotjax.errors import ProviderError, ProviderRefused, ProviderUnavailable
from spotjax.fleet.providers.gce import GceConfig
from spotjax.fleet.providers.gce_compute import Compute
from spotjax.fleet.providers.gce_errors import provider_error
from spotjax.fleet.providers.gce_machines import (
    FLEET,
    NAME,
    chosen,
    has_stopped,
    instance_name,
    machine_of,
    wanted_instance,
    zone_of,
)
from spotjax.fleet.providers.machines import watch_by_listing
from spotjax.fleet.providers.provider import FleetIdentity, Machine, MachineState, Offer

log = logging.getLogger("spotjax.providers")

LOOK_SECONDS = 0.5, 5.0
"""Between two looks at an operation, growing from the first to the second."""
PREEMPTED = "compute.instances.preempted"


@dataclass
class Insert:
    """A request that was accepted.

    Attributes:
      machine: that there is to be.
      following: ends with what came of it: None, or the error.
    """

    machine: Machine
    following: asyncio.Task[ProviderError | None]

    @property
    def failure(self) -> ProviderError | None:
        """Why there is no machine; None if there is one, or it is not known yet."""
        done = self.following.done() and not self.following.cancelled()
        return self.following.result() if done else None


class GceProvider:
    """Rents instances. See ``Provider``."""

    name = "gce"

    def __init__(
        self,
        config: GceConfig,
        fleet: FleetIdentity,
        compute: Compute,
        new_id: Callable[[], str] = lambda: str(uuid.uuid4()),
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Asks nothing yet.

        Args:
          config: what may be rented.
          fleet: for whom.
          compute: the calls; closed with the provider.
          new_id: gives ids of calls, each a UUID that was never there before.
          sleep: waits.
        """
        self._config, self._fleet, self._compute, self._new_id, self._sleep = config, fleet, compute, new_id, sleep
        self._offers = config.all_offers
        self._prices = {offer.key: offer.price for offer in self._offers}
        self._templates: dict[str, compute_v1.InstanceTemplate] = {}
        self._inserts: dict[str, Insert] = {}
        self._taken: dict[int, bool] = {}
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def offers(self) -> Sequence[Offer]:
        """As the configuration has them: there is no list of prices to ask."""
        return self._offers

    async def list(self) -> Sequence[Machine]:
        """See ``Provider``. Without an answer from every zone there is none, as what is not seen is not gone."""
        inserts = dict(self._inserts)
        best, more = chosen(await self._instances())
        for instance in more:
            log.warning("there are two of %s; giving back that in %s", instance.labels[NAME], zone_of(instance))
            await self._compute.delete(zone_of(instance), instance.name, self._new_id())
        machines = {name: await self._machine(instance) for name, instance in best.items()}
        for name, insert in inserts.items():
            if name not in machines and (pending := _pending(insert)) is not None:
                machines[name] = pending
            elif insert.following.done() and self._inserts.get(name) is insert:
                del self._inserts[name]  # from now on the instance speaks for itself
        return tuple(machines.values())

    async def request(self, name: str, offer: Offer) -> Machine:
        """See ``Provider``. An error that comes within ``settle_seconds`` is raised, a later one is the machine's."""
        whole = instance_name(self._fleet.name, name)
        async with self._lock(name):
            if (there := next((each for each in await self.list() if each.name == name), None)) is not None:
                return there
            if offer.key not in self._prices:
                raise ProviderRefused(f"{offer} is no offer; there are {', '.join(map(str, self._offers))}")
            offer = replace(offer, price=self._prices[offer.key])
            path = self._config.template_of(offer)
            script = self._config.start_up_script(self._fleet, name, offer)
            wanted = wanted_instance(self._config, self._fleet.name, name, offer, await self._template(path), script)
            operation = await self._compute.insert(offer.zone, wanted, path, self._new_id())
            if operation is None:
                return await self._existing(offer.zone, whole)
            machine = Machine(name, offer, MachineState.STARTING, "asked for")
            insert = Insert(machine, asyncio.create_task(self._follow(offer, operation)))
            self._inserts[name] = insert
            await asyncio.wait({insert.following}, timeout=self._config.settle_seconds)
            if (failure := insert.failure) is not None:
                self._inserts.pop(name, None)  # who lists meanwhile may have done so
                raise failure
            return machine

    async def release(self, name: str) -> None:
        """See ``Provider``. Disks go with the instance if its template says so (``autoDelete``)."""
        whole = instance_name(self._fleet.name, name)
        async with self._lock(name):
            places = {zone_of(each) for each in await self._instances() if each.name == whole}
            if (insert := self._inserts.get(name)) is not None and insert.failure is None:
                places.add(insert.machine.offer.zone)
            for zone in places:
                await self._compute.delete(zone, whole, self._new_id())
            if (insert := self._inserts.pop(name, None)) is not None:
                insert.following.cancel()

    def watch(self) -> AsyncIterator[Machine]:
        """See ``Provider``. Lists every ``poll_seconds``."""
        return watch_by_listing(self.list, self._config.poll_seconds, self._sleep)

    async def close(self) -> None:
        """Stops following requests and closes connections."""
        following = [insert.following for insert in self._inserts.values()]
        for task in following:
            task.cancel()
        await asyncio.gather(*following, return_exceptions=True)
        await self._compute.close()

    async def _instances(self) -> Sequence[compute_v1.Instance]:
        found = await self._compute.instances(f"labels.{FLEET}={self._fleet.name}")
        return [each for each in found if each.labels.get(FLEET) == self._fleet.name and NAME in each.labels]

    async def _existing(self, zone: str, whole: str) -> Machine:
        """What is there of that name though it was not listed, from a request whose answer was lost."""
        instance = await self._compute.instance(zone, whole)
        if instance is None:
            raise ProviderUnavailable(f"{whole} in {zone} has just gone; ask again")
        if instance.labels.get(FLEET) != self._fleet.name or NAME not in instance.labels:
            raise ProviderRefused(f"there is an instance {whole} in {zone} that is not of this fleet")
        return await self._machine(instance)

    async def _machine(self, instance: compute_v1.Instance) -> Machine:
        return machine_of(instance, self._prices, has_stopped(instance) and await self._was_taken(instance))

    async def _was_taken(self, instance: compute_v1.Instance) -> bool:
        """Whether an instance that has stopped was preempted. Where that cannot be asked, a spot machine was."""
        if instance.scheduling.provisioning_model != "SPOT":
            return False
        if instance.id not in self._taken:
            words = f'(operationType = "{PREEMPTED}") AND (targetId = {instance.id})'
            try:
                self._taken[instance.id] = bool(await self._compute.operations(zone_of(instance), words))
            except ProviderRefused:
                self._taken[instance.id] = True
            except ProviderError:
                return True
        return self._taken[instance.id]

    async def _template(self, path: str) -> compute_v1.InstanceTemplate:
        """Templates never change, so one is read once."""
        if path not in self._templates:
            self._templates[path] = await self._compute.template(path)
        return self._templates[path]

    async def _follow(self, offer: Offer, operation: compute_v1.Operation) -> ProviderError | None:
        """Waits for the end of a request. If that cannot be seen, what is listed counts."""
        pause, most = LOOK_SECONDS
        doing = f"cannot rent {offer}"
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._config.operation_seconds):
                while operation.status != compute_v1.Operation.Status.DONE:
                    await self._sleep(pause)
                    pause = min(1.5 * pause, most)
                    try:
                        operation = await self._compute.operation(offer.zone, operation.name)
                    except ProviderUnavailable:
                        continue
                    except ProviderError as problem:
                        log.warning("cannot see what became of a request: %s", problem)
                        return None
                if codes := [each.code for each in operation.error.errors]:
                    words = "; ".join(each.message for each in operation.error.errors)
                    return provider_error(doing, codes, operation.http_error_status_code, words)
        return None

    def _lock(self, name: str) -> asyncio.Lock:
        return self._locks.setdefault(name, asyncio.Lock())


def _pending(insert: Insert) -> Machine | None:
    """A machine of which no instance is to be seen: not yet, or it could not be made."""
    if (failure := insert.failure) is not None:
        return replace(insert.machine, state=MachineState.FAILED, detail=str(failure), failure=type(failure))
    return None if insert.following.done() else insert.machine
