"""TPU slices of Google Cloud, by queued resources: the calls. Uses version 2 of the API.

What the answers mean is in ``tpu_states``, which machines they come to in ``tpu_machines``, what a slice is asked for
as in ``tpu_request``. Nothing is remembered: every call asks all zones anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator, Sequence
from typing import Any, TypeVar, cast

import google.auth
import grpc.aio
from google.api_core.client_options import ClientOptions
from google.api_core.exceptions import AlreadyExists, FailedPrecondition, GoogleAPICallError, NotFound
from google.auth.credentials import Credentials
from google.auth.exceptions import GoogleAuthError
from google.cloud.tpu_v2 import (
    CreateQueuedResourceRequest,
    DeleteNodeRequest,
    DeleteQueuedResourceRequest,
    ListNodesRequest,
    ListQueuedResourcesRequest,
    Node,
    QueuedResource,
    TpuAsyncClient,
)
from google.cloud.tpu_v2.services.tpu.transports import TpuGrpcAsyncIOTransport

from spotjax.errors import ProviderRefused, ProviderUnavailable
from spotjax.fleet.providers.machines import watch_by_listing
from spotjax.fleet.providers.provider import Machine, MachineState, Offer
from spotjax.fleet.providers.tpu_config import Script, TpuConfig
from spotjax.fleet.providers.tpu_errors import from_status, provider_error, said
from spotjax.fleet.providers.tpu_machines import Life, lives, machines, of_name, require_name
from spotjax.fleet.providers.tpu_request import SCOPE, Origin, parent_of, queued_resource_request

T = TypeVar("T")
PAGE = 500
"""Entries of a page that are asked for; the service may send fewer."""
SETTLE_PAUSE = 0.25
BUSY_SECONDS = 10.0
"""After which a resource is asked for again to go that was too busy to."""

__all__ = ["TpuConfig", "TpuProvider", "credentials", "open_client"]


async def credentials() -> Credentials:
    """The rights that this machine has: those of its account, or of who has logged in.

    Raises:
      ProviderRefused: it has none.
    """
    with _translated("cannot use Cloud TPU"):
        found, _ = await asyncio.to_thread(google.auth.default, scopes=[SCOPE])  # may ask a metadata server
    return found


def open_client(endpoint: str, rights: Credentials | None) -> TpuAsyncClient:
    """A client of the API.

    Args:
      endpoint: HOST:PORT; empty for Google's.
      rights: whose; None for a stand-in that asks for none and speaks no TLS.
    """
    if rights is None:
        return TpuAsyncClient(transport=TpuGrpcAsyncIOTransport(channel=grpc.aio.insecure_channel(endpoint)))
    return TpuAsyncClient(credentials=rights, client_options=ClientOptions(api_endpoint=endpoint or None))


class TpuProvider:
    """Rents TPU slices, spot or guaranteed. See ``Provider``."""

    name = "tpu"

    def __init__(self, config: TpuConfig, fleet: str, join: str, script: Script, client: TpuAsyncClient) -> None:
        """Asks nothing yet.

        Args:
          config: what may be asked for.
          fleet: its name, which is part of all ids.
          join: HOST:PORT at which machines reach the controller.
          script: writes what each host of a machine runs at boot.
          client: of the API; closed with the provider.
        """
        self._config, self._client = config, client
        self._origin = Origin(fleet, join, script)
        self._offers = tuple(offer.offer for offer in config.offers)

    async def offers(self) -> Sequence[Offer]:
        """As the configuration has them: the API knows no prices."""
        return self._offers

    async def list(self) -> Sequence[Machine]:
        """See ``Provider``. Without an answer from every zone there is none, as what is not seen is not gone."""
        return machines(await self._lives(), self._offers)

    async def request(self, name: str, offer: Offer) -> Machine:
        """See ``Provider``. A machine whose deletion has not ended is asked for under the next number."""
        require_name(self._origin.fleet, name)
        wanted = next((each for each in self._config.offers if each.offer.key == offer.key), None)
        if wanted is None:
            known = ", ".join(f"{each.type} in {each.zone} as {each.price_class}" for each in self._offers)
            raise ProviderRefused(f"{offer.type} in {offer.zone} as {offer.price_class} is no offer; there are {known}")
        found = of_name(await self._lives(), name)
        if any(not life.is_ending for life in found):
            return next(machine for machine in machines(found, self._offers) if machine.name == name)
        attempt = 1 + max((life.attempt for life in found), default=0)
        await self._create(queued_resource_request(self._config, self._origin, name, attempt, wanted))
        return Machine(name, wanted.offer, MachineState.WAITING)

    async def release(self, name: str) -> None:
        """See ``Provider``. All lives of a name go, in all zones; what is already going is left alone."""
        found = of_name(await self._lives(), name)
        await _all(self._delete(life) for life in found if not life.is_ending)

    def watch(self) -> AsyncIterator[Machine]:
        """See ``Provider``. Asks all zones every ``poll_seconds``."""
        return watch_by_listing(self.list, self._config.poll_seconds)

    async def close(self) -> None:
        """Closes the connection."""
        await self._client.transport.close()  # type: ignore[no-untyped-call]

    async def _lives(self) -> Sequence[Life]:
        zones = await _all(self._zone(zone) for zone in self._config.all_zones)
        return tuple(itertools.chain.from_iterable(zones))

    async def _zone(self, zone: str) -> Sequence[Life]:
        """What is in a zone. Requests first: the node of one that is active must be among the nodes then."""
        parent, seconds = parent_of(self._config.project, zone), self._config.call_seconds
        requests: list[QueuedResource] = []
        nodes: list[Node] = []
        silent: list[str] = []
        with _translated(f"cannot list TPUs in {zone}"):
            asked = ListQueuedResourcesRequest(parent=parent, page_size=PAGE)
            listed = await self._client.list_queued_resources(asked, retry=None, timeout=seconds)
            async for page in listed.pages:
                requests += page.queued_resources
                silent += page.unreachable
            of_nodes = await self._client.list_nodes(
                ListNodesRequest(parent=parent, page_size=PAGE), retry=None, timeout=seconds
            )
            async for nodes_page in of_nodes.pages:
                nodes += nodes_page.nodes
                silent += nodes_page.unreachable
        if silent:
            raise ProviderUnavailable(f"cannot list TPUs in {zone}: the service does not reach {', '.join(silent)}")
        return lives(self._origin.fleet, zone, requests, nodes)

    async def _create(self, request: CreateQueuedResourceRequest) -> None:
        """Asks for a slice. One that is there already was asked for by a call that never heard the answer."""
        doing = f"cannot ask for {request.queued_resource_id} in {request.parent}"
        with _translated(doing), contextlib.suppress(AlreadyExists):
            started = await self._client.create_queued_resource(request, retry=None, timeout=self._config.call_seconds)
            await self._settle(started.operation.name, doing)

    async def _settle(self, operation: str, doing: str) -> None:
        """Waits a little for an error; what else becomes of the request is seen when machines are listed."""
        loop = asyncio.get_running_loop()
        until = loop.time() + self._config.settle_seconds
        while loop.time() < until:
            try:
                now = await self._client.get_operation(
                    {"name": operation}, retry=None, timeout=self._config.call_seconds
                )
            except GoogleAPICallError:
                return  # the request was taken; its operation is of interest only for an early error
            if now.done:
                if now.HasField("error"):
                    raise said(doing, from_status(now.error))
                return
            await asyncio.sleep(SETTLE_PAUSE)

    async def _delete(self, life: Life) -> None:
        """Deletes a request with its node, or a node that has none. Somebody may have done so before."""
        with _translated(f"cannot delete {life.id} in {life.zone}"):
            try:
                if await self._deletes_request(life):
                    return
                if life.node is not None:
                    gone = DeleteNodeRequest(name=life.node.name)
                    await self._client.delete_node(gone, retry=None, timeout=self._config.call_seconds)
            except NotFound:
                return
            except FailedPrecondition as problem:  # such as one that is being made or suspended: it can go in a while
                raise ProviderUnavailable(f"cannot delete {life.id} yet: {problem.message}", BUSY_SECONDS) from problem

    async def _deletes_request(self, life: Life) -> bool:
        """Whether there was a request, with which the node goes. One that came after it was looked for counts."""
        if life.queued is None and life.node is not None and not life.node.queued_resource:
            return False
        path = f"{parent_of(self._config.project, life.zone)}/queuedResources/{life.id}"
        try:
            forced = DeleteQueuedResourceRequest(name=path, force=True)
            await self._client.delete_queued_resource(forced, retry=None, timeout=self._config.call_seconds)
        except NotFound:
            return False
        return True


async def _all(calls: Iterable[Coroutine[Any, Any, T]]) -> Sequence[T]:
    """All results, or the first error when all have ended: no call goes on unseen."""
    ended = await asyncio.gather(*calls, return_exceptions=True)
    for each in ended:
        if isinstance(each, BaseException):
            raise each
    return cast(Sequence[T], ended)


@contextlib.contextmanager
def _translated(doing: str) -> Iterator[None]:
    """Raises what Google's client raises as an error of a provider."""
    try:
        yield
    except (GoogleAPICallError, GoogleAuthError) as problem:
        raise said(doing, provider_error(problem)) from problem
