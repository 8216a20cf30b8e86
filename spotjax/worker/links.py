"""A worker's connections for step frames: to the next stages' workers and to the controller."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import Callable, Collection, Mapping

import msgspec
import numpy as np

from spotjax.errors import ConnectionLost, TransportError
from spotjax.transport.connection import Connection
from spotjax.transport.endpoint import Endpoint
from spotjax.worker.executor import CONTROLLER

CONNECT_SECONDS = 2.0


class Links:
    """Sends frames to instances by name. ``send`` may be called from any thread, the rest on the loop.

    Args:
      endpoint: of this process.
      broken: told on the loop to which instance steps were lost, and why.

    Attributes:
      addresses: HOST:PORT by instance; the controller's under ``CONTROLLER``.
      onward: instances that steps are sent to, the controller included: the end of a connection there may lose some.
    """

    def __init__(self, endpoint: Endpoint, broken: Callable[[str, str], None]) -> None:
        self.addresses: Mapping[str, str] = {}
        self.onward: Collection[str] = ()
        self._endpoint, self._broken = endpoint, broken
        self._loop = asyncio.get_running_loop()
        self._open: dict[str, Connection] = {}

    async def connect(self, instance: str) -> None:
        """Makes sure that there is a connection.

        Raises:
          ConnectionLost: the instance cannot be reached.
        """
        if instance not in self.addresses:
            raise ConnectionLost(f"the address of instance {instance} is not known")
        connection = await self._endpoint.connect(self.addresses[instance], CONNECT_SECONDS)
        if self._open.get(instance) is not connection:
            self._open[instance] = connection
            connection.closed.add_done_callback(lambda _: self._closed(instance, connection))

    def _closed(self, instance: str, connection: Connection) -> None:
        if self._open.get(instance) is connection:
            del self._open[instance]
            if instance in self.onward:
                self._broken(instance, "the connection closed")

    def connected(self, instance: str) -> bool:
        """Whether the connection that was made last still is."""
        return instance in self._open

    def send(self, instance: str, header: msgspec.Struct, payload: tuple[memoryview, ...]) -> None:
        """Sends a frame, from any thread."""
        self._loop.call_soon_threadsafe(self._send, instance, header, payload)

    def push(self, instance: str, header: msgspec.Struct, payload: np.ndarray) -> concurrent.futures.Future[None]:
        """Sends a frame, from any thread, connecting if need be; done when there is room for more.

        Raises, in the future:
          ConnectionLost: the instance cannot be reached.
        """
        return asyncio.run_coroutine_threadsafe(self._push(instance, header, payload), self._loop)

    async def _push(self, instance: str, header: msgspec.Struct, payload: np.ndarray) -> None:
        await self.connect(instance)
        connection = self._open[instance]
        connection.send(header, payload.data)
        await connection.drain()

    def _send(self, instance: str, header: msgspec.Struct, payload: tuple[memoryview, ...]) -> None:
        try:
            self._open[instance].send(header, *payload)
        except KeyError:
            self._broken(instance, "there is no connection")
        except TransportError as problem:
            self._broken(instance, str(problem))

    @property
    def controller(self) -> str:
        """Address of the controller's data endpoint."""
        return self.addresses[CONTROLLER]
