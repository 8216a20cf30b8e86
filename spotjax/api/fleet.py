"""The gRPC service ``spotjax.v1.Fleet``: shows and changes the machines that serve."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from spotjax.api.backend import Backend
from spotjax.api.errors import Context, rpc
from spotjax.api.fleet_messages import event_to, reconfiguration_to, saved_to, status_to
from spotjax.api.proto.spotjax.v1 import fleet_pb2 as pb
from spotjax.api.proto.spotjax.v1 import fleet_pb2_grpc as pb_grpc
from spotjax.errors import InvalidRequest

MAX_GRACE_SECONDS = 3600
MAX_ADDED = 1024
MAX_SAVE_SECONDS = 3600


class FleetServicer(pb_grpc.FleetServicer):
    """Serves the backend's fleet half."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    @rpc
    async def Status(self, request: pb.StatusRequest, context: Context) -> pb.FleetStatus:
        """A snapshot."""
        service, _ = self._backend.get()
        return status_to(service.status())

    @rpc
    async def Watch(self, request: pb.WatchRequest, context: Context) -> None:
        """Streams events until the client leaves or the server stops, or only recent ones."""
        service, _ = self._backend.get()
        if request.recent_only:
            for event in service.recent():
                await context.write(event_to(event))
            return
        events = service.watch()
        try:
            async for event in events:
                await context.write(event_to(event))
        finally:
            if isinstance(events, AsyncGenerator):
                await events.aclose()

    @rpc
    async def Preempt(self, request: pb.PreemptRequest, context: Context) -> pb.Reconfiguration:
        """Takes an instance away."""
        service, _ = self._backend.get()
        require_preempt(request)
        return reconfiguration_to(await service.preempt(request.instance, request.grace_seconds))

    @rpc
    async def Drain(self, request: pb.DrainRequest, context: Context) -> pb.Reconfiguration:
        """Moves off an instance and lets it leave."""
        service, _ = self._backend.get()
        require_instance(request)
        return reconfiguration_to(await service.release(request.instance))

    @rpc
    async def Add(self, request: pb.AddRequest, context: Context) -> pb.Reconfiguration:
        """Lets instances join."""
        service, _ = self._backend.get()
        require_add(request)
        return reconfiguration_to(await service.add(request.count))

    @rpc
    async def Save(self, request: pb.SaveRequest, context: Context) -> pb.Saved:
        """Writes a checkpoint."""
        service, _ = self._backend.get()
        require_save(request)
        saved = await service.save(
            request.directory, parameters=request.parameters, state=request.state, seconds=request.seconds
        )
        return saved_to(saved)


def require_save(request: pb.SaveRequest) -> None:
    """Refuses one that says neither where to, nor what, nor how long."""
    if not (request.directory.startswith("/") or "://" in request.directory):
        raise InvalidRequest("directory", f"must be a path from the root, or a URL, got {request.directory!r}")
    if not (request.parameters or request.state):
        raise InvalidRequest("parameters", "there is nothing to save: ask for parameters, state, or both")
    if request.state and not 0 < request.seconds <= MAX_SAVE_SECONDS:
        raise InvalidRequest("seconds", f"must be in (0, {MAX_SAVE_SECONDS}], got {request.seconds:g}")


def require_preempt(request: pb.PreemptRequest) -> None:
    """Refuses one that names no instance, or gives it too long."""
    require_instance(request)
    if not 0 <= request.grace_seconds <= MAX_GRACE_SECONDS:
        raise InvalidRequest("grace_seconds", f"must be in [0, {MAX_GRACE_SECONDS}], got {request.grace_seconds:g}")


def require_add(request: pb.AddRequest) -> None:
    """Refuses one that asks for none, or too many."""
    if not 1 <= request.count <= MAX_ADDED:
        raise InvalidRequest("count", f"must be in [1, {MAX_ADDED}], got {request.count}")


def require_instance(request: pb.PreemptRequest | pb.DrainRequest) -> None:
    """Refuses a request that names none."""
    if not request.instance:
        raise InvalidRequest("instance", "must name an instance")
