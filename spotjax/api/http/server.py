"""Runs an application on uvicorn inside the event loop of the server. Signals and draining are ``serve.py``'s."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl

import uvicorn
from starlette.types import ASGIApp

from spotjax.api.http.connection import LimitedConnection
from spotjax.errors import ConfigError

BACKLOG = 2048
KEEP_ALIVE_SECONDS = 75
"""For which a connection may be idle: longer than load balancers keep theirs, so that it is they who close."""


class HttpServer:
    """Serves HTTP/1.1, or HTTPS with a context for it."""

    def __init__(self, app: ASGIApp, tls: ssl.SSLContext | None = None) -> None:
        """A server that does not listen yet."""
        self._tls = tls
        self._config = uvicorn.Config(
            app, http=LimitedConnection, ws="none", lifespan="off", interface="asgi3", backlog=BACKLOG, log_config=None,
            log_level="critical", access_log=False, server_header=False, timeout_keep_alive=KEEP_ALIVE_SECONDS,
            proxy_headers=False,
        )  # fmt: skip
        self._server = uvicorn.Server(self._config)
        self._ticking: asyncio.Task[None] | None = None
        self._socket: socket.socket | None = None

    async def start(self, listen: str) -> int:
        """Listens on ``HOST:PORT``; port 0 takes a free one. Returns the port.

        Raises:
          ConfigError: the address cannot be bound.
        """
        self._socket = await bound(listen)
        self._config.load()
        self._config.ssl = self._tls
        self._server.lifespan = self._config.lifespan_class(self._config)
        await self._server.startup(sockets=[self._socket])
        self._ticking = asyncio.create_task(self._server.main_loop())
        return int(self._socket.getsockname()[1])

    async def stop(self, grace: float | None = None) -> None:
        """Ends the server; answers may go on for ``grace`` seconds, by default not at all."""
        if self._ticking is None or self._socket is None:
            return
        self._ticking.cancel()
        self._ticking = None
        for listening in self._server.servers:
            listening.close()
        self._socket.close()
        state = self._server.server_state
        for connection in list(state.connections):
            connection.shutdown()  # at once if idle, else after its answer
        if state.tasks:
            await asyncio.wait(state.tasks, timeout=grace or 0)
        for task in state.tasks:
            task.cancel()
        await asyncio.gather(*state.tasks, return_exceptions=True)
        for connection in list(state.connections):
            if isinstance(connection, LimitedConnection):
                connection.transport.abort()  # it would wait for a client that does not read


async def bound(listen: str) -> socket.socket:
    """A socket at ``HOST:PORT``.

    Raises:
      ConfigError: it is taken, or not an address of this machine.
    """
    host, _, port = listen.rpartition(":")
    try:
        family, _, _, _, address = (
            await asyncio.get_running_loop().getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        )[0]
        listening = socket.create_server(address, family=family, backlog=BACKLOG)
    except OSError as error:
        reason = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
        raise ConfigError(f"cannot serve HTTP on {listen}: {reason}; give http another HOST:PORT, or off") from error
    listening.setblocking(False)
    return listening
