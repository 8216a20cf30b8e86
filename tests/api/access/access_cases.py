"""A server on a free port that knows a few callers by keys that are simply their names."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import grpc
from scripted_server import MODEL, Running, Steps

from spotjax.api.access.callers import Caller, CallerLimits, Role
from spotjax.api.server import ApiServer
from spotjax.errors import Unauthenticated
from spotjax.testing.scripted_generation import ScriptedRequest
from spotjax.testing.scripted_service import ScriptedService

CALLERS = (
    Caller("ann"),
    Caller("bob"),
    Caller("busy", limits=CallerLimits(concurrent_requests=1)),
    Caller("brief", limits=CallerLimits(requests_per_minute=2)),
    Caller("elsewhere", models=("another",)),
    Caller("eve", Role.VIEWER),
    Caller("root", Role.ADMIN),
)


class NamesAsKeys:
    """A gate whose keys are the callers' names."""

    def caller_of(self, key: str | None) -> Caller:
        for caller in CALLERS:
            if caller.name == key:
                return caller
        raise Unauthenticated("send an API key")


@asynccontextmanager
async def guarded(log: tuple[ScriptedRequest, ...] = ()) -> AsyncIterator[Running]:
    """A server with these callers. Tokens come as its steps let them."""
    steps = Steps()
    service = ScriptedService(delay=steps, log=log)
    server = ApiServer(readiness_interval=0.01, gate=NamesAsKeys())
    port = await server.start("127.0.0.1:0")
    await server.attach(service, MODEL)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield Running(service, server, steps, port, channel)
        await service.stop()
        await server.stop()


def as_caller(name: str) -> tuple[tuple[str, str], ...]:
    """Metadata of a call."""
    return (("authorization", f"Bearer {name}"),)


async def failure(call: Callable[[], object]) -> grpc.aio.AioRpcError:
    """The error that a call ends with."""
    try:
        result = call()
        if hasattr(result, "read"):
            await result.read()
        else:
            await result  # type: ignore[misc]
    except grpc.aio.AioRpcError as error:
        return error
    raise AssertionError("the call was answered")
