"""``/fleet``: what the gRPC service ``Fleet`` shows and does, as JSON; events as a stream that can be taken up again.

JSON has the names of the dataclasses of ``fleet.status``, as ``spotjax status --json`` has. Who may call what is
decided before, in ``api.access``; that no other site's page calls it, in ``origin``.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Annotated, Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from spotjax.api.access.callers import Right
from spotjax.api.access.current import current_caller
from spotjax.api.backend import Backend
from spotjax.api.fleet import require_add, require_instance, require_preempt
from spotjax.api.http.errors import JSON
from spotjax.api.http.event_stream import EventStream, event
from spotjax.api.http.reading import read_bytes
from spotjax.api.plain import plain
from spotjax.api.proto.spotjax.v1 import fleet_pb2 as pb
from spotjax.errors import InvalidRequest
from spotjax.fleet.service import FleetService
from spotjax.fleet.status import Reconfiguration

RETRY_MILLISECONDS = 1000
"""After which a browser's ``EventSource`` tries again."""


class Preempt(msgspec.Struct, forbid_unknown_fields=True):
    """See ``PreemptRequest``."""

    instance: str = ""
    grace_seconds: float = 0.0


class Release(msgspec.Struct, forbid_unknown_fields=True):
    """See ``DrainRequest``."""

    instance: str = ""


class Add(msgspec.Struct, forbid_unknown_fields=True):
    """See ``AddRequest``."""

    count: Annotated[int, msgspec.Meta(ge=0, lt=2**32)] = 0


Asked = TypeVar("Asked", Preempt, Release, Add)


def routes(backend: Backend) -> list[Route]:
    """``GET`` of status and events, ``POST`` of what changes the fleet."""
    run = secrets.token_hex(4)  # events are counted anew by every process

    async def status(request: Request) -> Response:
        service, _ = backend.get()
        return json_response(service.status())

    async def caller(request: Request) -> Response:
        one = current_caller()
        rights = sorted(right for right in Right if one.may(right))
        return json_response({"name": one.name, "role": one.role, "rights": rights})

    async def events(request: Request) -> Response:
        service, _ = backend.get()
        seen = seen_of(request.headers.get("last-event-id"), run)
        return EventStream(event_pieces(service, run, seen), {"cache-control": "no-store"}, lambda: None)

    async def preempt(request: Request) -> Response:
        asked = await asked_for(request, Preempt)
        require_preempt(pb.PreemptRequest(instance=asked.instance, grace_seconds=asked.grace_seconds))
        return await done(lambda service: service.preempt(asked.instance, asked.grace_seconds))

    async def release(request: Request) -> Response:
        asked = await asked_for(request, Release)
        require_instance(pb.DrainRequest(instance=asked.instance))
        return await done(lambda service: service.release(asked.instance))

    async def add(request: Request) -> Response:
        asked = await asked_for(request, Add)
        require_add(pb.AddRequest(count=asked.count))
        return await done(lambda service: service.add(asked.count))

    async def done(change: Callable[[FleetService], Awaitable[Reconfiguration]]) -> Response:
        service, _ = backend.get()
        return json_response(await change(service))

    return [
        Route("/fleet/status", status),
        Route("/fleet/caller", caller),
        Route("/fleet/events", events),
        Route("/fleet/preempt", preempt, methods=["POST"]),
        Route("/fleet/release", release, methods=["POST"]),
        Route("/fleet/add", add, methods=["POST"]),
    ]


def json_response(value: Any) -> Response:
    """The value, which changes from one moment to the next."""
    return Response(msgspec.json.encode(plain(value)), headers={"Cache-Control": "no-store"}, media_type=JSON)


async def asked_for(request: Request, kind: type[Asked]) -> Asked:
    """What the body asks for.

    Raises:
      InvalidRequest: it is not JSON, is not sent as such, or has fields that the request has not.
    """
    sent_as = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if sent_as != JSON:
        raise InvalidRequest("body", f"must be sent as {JSON}, came as {sent_as or 'nothing'}")
    try:
        return msgspec.json.decode(await read_bytes(request), type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest("body", str(error)) from error


def seen_of(last_event_id: str | None, run: str) -> int:
    """The number of the last event that a client has seen; 0 if it was another process's, or none."""
    of, _, number = (last_event_id or "").partition("-")
    return int(number) if of == run and number.isascii() and number.isdecimal() and len(number) < 19 else 0


async def event_pieces(service: FleetService, run: str, seen: int) -> AsyncGenerator[bytes, None]:
    """Events with ids by which a client that comes back goes on where it was.

    One that reads too slowly holds no memory here: it loses the oldest, which their numbers tell.
    """
    yield f"retry: {RETRY_MILLISECONDS}\n\n".encode()
    events = service.watch(seen)
    try:
        async for one in events:
            yield event(f"{run}-{one.number}", msgspec.json.encode(plain(one)))
    finally:
        if isinstance(events, AsyncGenerator):
            await events.aclose()
