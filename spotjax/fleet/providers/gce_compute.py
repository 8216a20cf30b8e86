"""Calls of Compute Engine, for an event loop: Google's library blocks, so it runs in threads."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import google.auth
import requests
from google.api_core.client_options import ClientOptions
from google.api_core.exceptions import Conflict, GoogleAPICallError, NotFound, RetryError
from google.auth.credentials import Credentials
from google.auth.exceptions import GoogleAuthError
from google.cloud import compute_v1
from google.protobuf.json_format import ParseError

from spotjax.errors import ProviderRefused, ProviderUnavailable
from spotjax.fleet.providers.gce_errors import provider_error

T = TypeVar("T")
THREADS = 8
"""Calls at once."""
PAGE = 500
"""Entries of a page that are asked for; the service may send fewer."""
SCOPES = ("https://www.googleapis.com/auth/compute",)
UNREACHABLE = "UNREACHABLE"


class Clients:
    """Google's clients, for one thread: what they send with is not made for several."""

    def __init__(self, credentials: Credentials, endpoint: str) -> None:
        given: dict[str, Any] = {
            "credentials": credentials,
            "client_options": ClientOptions(api_endpoint=endpoint or None),
        }
        self.instances = compute_v1.InstancesClient(**given)
        self.operations = compute_v1.ZoneOperationsClient(**given)
        self.templates = compute_v1.InstanceTemplatesClient(**given)
        self.regional_templates = compute_v1.RegionInstanceTemplatesClient(**given)

    def close(self) -> None:
        """Closes their connections."""
        for client in (self.instances, self.operations, self.templates, self.regional_templates):
            client.transport.close()  # type: ignore[no-untyped-call]


class Compute:
    """Compute Engine, of one project.

    Raises, from every call: what a ``Provider`` raises. Nothing is tried twice: who calls does that.
    """

    def __init__(
        self, project: str, call_seconds: float, endpoint: str = "", credentials: Credentials | None = None
    ) -> None:
        """Finds credentials.

        Args:
          project: its id.
          call_seconds: for the answer to a call.
          endpoint: of the API; empty for Google's.
          credentials: whose rights to use; by default those that this machine has.

        Raises:
          ProviderRefused: this machine has none.
        """
        self.project, self._seconds, self._endpoint = project, call_seconds, endpoint
        if credentials is None:
            with translated("cannot use Compute Engine"):
                credentials, _ = google.auth.default(scopes=SCOPES)
        self._credentials = credentials
        self._threads = ThreadPoolExecutor(THREADS, "compute")
        self._here = threading.local()
        self._all: list[Clients] = []

    async def insert(
        self, zone: str, instance: compute_v1.Instance, template: str, request_id: str
    ) -> compute_v1.Operation | None:
        """Begins to make an instance; None if there is one of that name in the zone, whoever made it."""
        request = compute_v1.InsertInstanceRequest(
            project=self.project, zone=zone, instance_resource=instance, source_instance_template=template,
            request_id=request_id,
        )  # fmt: skip

        def call(clients: Clients) -> compute_v1.Operation | None:
            try:
                return clients.instances.insert_unary(request, timeout=self._seconds, retry=None)
            except Conflict as problem:
                if "alreadyExists" in _reasons(problem):
                    return None
                raise

        return await self._call(f"cannot rent {instance.name} in {zone}", call)

    async def delete(self, zone: str, name: str, request_id: str) -> compute_v1.Operation | None:
        """Begins to delete an instance, with its disks as the template says; None if there is none."""
        request = compute_v1.DeleteInstanceRequest(
            project=self.project, zone=zone, instance=name, request_id=request_id
        )

        def call(clients: Clients) -> compute_v1.Operation | None:
            try:
                return clients.instances.delete_unary(request, timeout=self._seconds, retry=None)
            except NotFound:
                return None

        return await self._call(f"cannot give back {name} in {zone}", call)

    async def instance(self, zone: str, name: str) -> compute_v1.Instance | None:
        """An instance, whoever made it; None if there is none."""

        def call(clients: Clients) -> compute_v1.Instance | None:
            request = compute_v1.GetInstanceRequest(project=self.project, zone=zone, instance=name)
            try:
                return clients.instances.get(request, timeout=self._seconds, retry=None)
            except NotFound:
                return None

        return await self._call(f"cannot look at {name} in {zone}", call)

    async def instances(self, filter: str) -> list[compute_v1.Instance]:
        """All instances of all zones that the filter lets through.

        Raises:
          ProviderUnavailable: not all zones answered, too: what is not seen is not gone.
        """
        request = compute_v1.AggregatedListInstancesRequest(project=self.project, filter=filter, max_results=PAGE)

        def call(clients: Clients) -> list[compute_v1.Instance]:
            found: list[compute_v1.Instance] = []
            pager = clients.instances.aggregated_list(request, timeout=self._seconds, retry=None)
            for page in pager.pages:
                silent = list(page.unreachables)
                for zone, scoped in page.items.items():
                    found += scoped.instances
                    silent += [zone] * (scoped.warning.code == UNREACHABLE)  # type: ignore[attr-defined]  # not Python's
                if silent:
                    raise ProviderUnavailable(f"cannot list instances: {', '.join(silent)} did not answer")
            return found

        return await self._call("cannot list instances", call)

    async def operation(self, zone: str, name: str) -> compute_v1.Operation:
        """What became of an operation so far."""
        request = compute_v1.GetZoneOperationRequest(project=self.project, zone=zone, operation=name)
        return await self._call(
            f"cannot look at operation {name} in {zone}",
            lambda clients: clients.operations.get(request, timeout=self._seconds, retry=None),
        )

    async def operations(self, zone: str, filter: str) -> list[compute_v1.Operation]:
        """The operations of a zone that the filter lets through."""
        request = compute_v1.ListZoneOperationsRequest(project=self.project, zone=zone, filter=filter, max_results=PAGE)
        return await self._call(
            f"cannot list operations in {zone}",
            lambda clients: list(clients.operations.list(request, timeout=self._seconds, retry=None)),
        )

    async def template(self, path: str) -> compute_v1.InstanceTemplate:
        """The template ``projects/P/global/instanceTemplates/N``, or of ``regions/R``."""
        _, project, *where, _, name = path.split("/")

        def call(clients: Clients) -> compute_v1.InstanceTemplate:
            if where == ["global"]:
                return clients.templates.get(
                    compute_v1.GetInstanceTemplateRequest(project=project, instance_template=name),
                    timeout=self._seconds, retry=None,
                )  # fmt: skip
            return clients.regional_templates.get(
                compute_v1.GetRegionInstanceTemplateRequest(
                    project=project, region=where[1], instance_template=name
                ),
                timeout=self._seconds, retry=None,
            )  # fmt: skip

        return await self._call(f"cannot read the template {path}", call)

    async def close(self) -> None:
        """Waits for calls that are under way and closes connections."""
        await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)
        for clients in self._all:
            clients.close()

    async def _call(self, doing: str, call: Callable[[Clients], T]) -> T:
        def run() -> T:
            with translated(doing):
                if (clients := getattr(self._here, "clients", None)) is None:
                    clients = self._here.clients = Clients(self._credentials, self._endpoint)
                    self._all.append(clients)
                return call(clients)

        return await asyncio.get_running_loop().run_in_executor(self._threads, run)


@contextlib.contextmanager
def translated(doing: str) -> Iterator[None]:
    """Raises what the library raises as an error of a provider, which says what could not be done."""
    try:
        yield
    except GoogleAPICallError as problem:
        raise provider_error(
            doing, _reasons(problem), int(problem.code or 0), problem.message or "", _retry_after(problem)
        ) from problem
    except GoogleAuthError as problem:
        if problem.retryable:
            raise ProviderUnavailable(f"{doing}: no credentials for now: {problem}") from problem
        raise ProviderRefused(
            f"{doing}: no credentials: {problem}; give this machine a service account, or log in with gcloud"
        ) from problem
    except (requests.RequestException, RetryError, ParseError, UnicodeDecodeError) as problem:
        raise ProviderUnavailable(f"{doing}: {type(problem).__name__}: {problem}") from problem


def _reasons(problem: GoogleAPICallError) -> list[str]:
    return [str(each["reason"]) for each in problem.errors if isinstance(each, dict) and each.get("reason")]


def _retry_after(problem: GoogleAPICallError) -> float | None:
    """Seconds that the answer says to wait, if it does."""
    headers = getattr(problem.response, "headers", None) or {}
    text = str(headers.get("Retry-After", ""))
    return float(text) if text.isdigit() else None
