"""``/health``, ``/ready`` and ``/version``: for load balancers and people."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from spotjax import __version__
from spotjax.api.backend import Backend
from spotjax.api.errors import Unavailable
from spotjax.api.http.errors import JSON
from spotjax.errors import Draining

VERSION = msgspec.json.encode({"version": __version__})


def routes(backend: Backend) -> list[Route]:
    """``GET`` of each; ``/health`` is 200 as long as the server answers, ``/ready`` while it takes requests."""

    async def health(request: Request) -> Response:
        return Response(b'{"status":"alive"}', media_type=JSON)

    async def ready(request: Request) -> Response:
        if backend.ready:
            return Response(b'{"status":"ready"}', media_type=JSON)
        if backend.draining:
            raise Draining("the server is draining and takes no new requests")
        backend.get()
        raise Unavailable(
            "the server cannot serve at the moment: no mesh fits the instances, or its log is not written"
        )

    async def version(request: Request) -> Response:
        return Response(VERSION, media_type=JSON)

    return [Route("/health", health), Route("/ready", ready), Route("/version", version)]
