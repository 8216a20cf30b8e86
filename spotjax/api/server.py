"""The gRPC server: both services, health and reflection on one port. Listens before there is a model to serve."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from spotjax.api.access.gate import Gate, OpenGate
from spotjax.api.access.grpc_interceptor import AccessInterceptor
from spotjax.api.backend import Backend
from spotjax.api.fleet import FleetServicer
from spotjax.api.generation import GenerationServicer
from spotjax.api.proto.spotjax.v1 import fleet_pb2, fleet_pb2_grpc, generation_pb2, generation_pb2_grpc
from spotjax.api.validation import MAX_MESSAGE_BYTES, ServedModel
from spotjax.errors import ConfigError
from spotjax.fleet.service import Service

SERVICES = tuple(
    module.DESCRIPTOR.services_by_name[name].full_name
    for module, name in ((generation_pb2, "Generation"), (fleet_pb2, "Fleet"))
)
LIVENESS = ("", "liveness")
READINESS = ("readiness", SERVICES[0])

MAX_METADATA_BYTES = 16 * 2**10
MAX_CALLS = 1024
"""At once, on one connection."""
MAX_CONNECTIONS = 4096

OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),  # a second server on the port must fail, not share it
    ("grpc.keepalive_time_ms", 30_000),  # a client whose machine died must not keep its request running
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),  # clients may ask as often whether we live
    ("grpc.max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
    ("grpc.max_concurrent_streams", MAX_CALLS),
    ("grpc.max_allowed_incoming_connections", MAX_CONNECTIONS),
    ("grpc.server_handshake_timeout_ms", 10_000),  # for whoever connects and says nothing
)


class ApiServer:
    """Serves ``spotjax.v1`` and grpc.health.v1.

    Health: ``""`` and ``liveness`` are SERVING as long as the server answers; ``readiness`` and
    ``spotjax.v1.Generation`` are SERVING while requests are served and new ones taken.

    Attributes:
      backend: what is served; HTTP serves the same.
    """

    def __init__(
        self,
        readiness_interval: float = 0.2,
        handlers: Sequence[grpc.GenericRpcHandler] = (),
        credentials: grpc.ServerCredentials | None = None,
        gate: Gate | None = None,
    ) -> None:
        """A server without a model.

        Args:
          readiness_interval: seconds between two looks at whether the service is ready.
          handlers: of services besides ``spotjax.v1``'s.
          credentials: of the server; without them it takes plaintext only, with them none.
          gate: knows who may call; by default everybody.
        """
        self._credentials = credentials
        self.backend = Backend(gate=gate or OpenGate())
        self._interval = readiness_interval
        self._health = health.aio.HealthServicer()
        self._following: asyncio.Task[None] | None = None
        self._server = grpc.aio.server(options=OPTIONS, interceptors=[AccessInterceptor(self.backend.gate)])
        generation_pb2_grpc.add_GenerationServicer_to_server(GenerationServicer(self.backend), self._server)
        fleet_pb2_grpc.add_FleetServicer_to_server(FleetServicer(self.backend), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        self.add_handlers(handlers)

    def add_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Answers other services' calls too, from now on; also while the server runs."""
        self._server.add_generic_rpc_handlers(tuple(handlers))

    async def start(self, listen: str) -> int:
        """Listens on ``HOST:PORT``; port 0 takes a free one. Returns the port.

        Raises:
          ConfigError: the address cannot be bound.
        """
        try:
            if self._credentials is None:
                port = self._server.add_insecure_port(listen)
            else:
                port = self._server.add_secure_port(listen, self._credentials)
        except RuntimeError as error:
            raise ConfigError(f"cannot listen on {listen}: it is in use or not an address of this machine") from error
        await self._show_readiness()
        for name in LIVENESS:
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        await self._server.start()
        self._following = asyncio.create_task(self._follow_readiness())
        return port

    async def attach(self, service: Service, model: ServedModel) -> None:
        """From now on there is something to serve."""
        self.backend.attach(service, model)
        await self._show_readiness()

    async def drain(self, seconds: float) -> bool:
        """Takes no new requests and waits for the accepted ones, at most ``seconds``. Returns whether all finished."""
        self.backend.draining = True
        await self._show_readiness()
        return self.backend.service is None or await self.backend.service.drain(seconds)

    async def stop(self, grace: float | None = None) -> None:
        """Ends the server; streams may go on for ``grace`` seconds, by default not at all."""
        if self._following is not None:
            self._following.cancel()
        await self._server.stop(grace)

    async def _show_readiness(self) -> None:
        status = (
            health_pb2.HealthCheckResponse.SERVING if self.backend.ready else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        for name in READINESS:
            await self._health.set(name, status)

    async def _follow_readiness(self) -> None:
        while True:
            await asyncio.sleep(self._interval)
            await self._show_readiness()
