"""Addresses and socket options. Owns no connection."""

from __future__ import annotations

import asyncio
import socket

from spotjax.errors import ConnectionLost, TransportError
from spotjax.transport.join_token import CallerHandshake, JoinToken

KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3}
"""Seconds, seconds, probes: a machine that vanished from an idle connection is noticed in about 11 s."""
USER_TIMEOUT = 10_000
"""Milliseconds that sent bytes may stay unacknowledged. Leases notice a lost machine earlier; this frees sockets."""


def split_address(address: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT``; an IPv6 host is in brackets.

    Raises:
      ValueError: it is no such address.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{address!r} is not HOST:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)


def join_address(name: tuple[str, int] | tuple[str, int, int, int]) -> str:
    """``HOST:PORT`` of a socket's name."""
    host, port = name[0], name[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def peer_of(sock: socket.socket) -> str:
    """``HOST:PORT`` of the other side, ``?`` if it is gone already."""
    try:
        return join_address(sock.getpeername())
    except OSError:
        return "?"


def tune(sock: socket.socket) -> None:
    """Sends small frames at once, and notices dead peers, as far as the platform can."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (*KEEPALIVE.items(), ("TCP_USER_TIMEOUT", USER_TIMEOUT)):
        option = getattr(socket, name, None)
        if option is not None:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)


async def receive_exactly(sock: socket.socket, count: int) -> bytes:
    """So many bytes, and not one more: something else may follow.

    Raises:
      TransportError: the other side hung up before.
      OSError: the connection broke.
    """
    loop, data = asyncio.get_running_loop(), b""
    while len(data) < count:
        more = await loop.sock_recv(sock, count - len(data))
        if not more:
            raise TransportError(f"it hung up after {len(data)} bytes")
        data += more
    return data


async def prove(sock: socket.socket, token: JoinToken, greeting: bytes) -> None:
    """Shows the side that was called that we have the token, and has it show the same.

    Raises:
      ConnectionLost: it has not, or wants none.
    """
    loop, handshake = asyncio.get_running_loop(), CallerHandshake(token, greeting)
    try:
        await loop.sock_sendall(sock, handshake.hello)
        await loop.sock_sendall(sock, handshake.answer(await receive_exactly(sock, handshake.ANSWER)))
    except (TransportError, OSError) as error:
        raise ConnectionLost(f"no proof of the join token came back: {error}; is it the same on both sides?") from error


async def dial(address: str, greeting: bytes, token: JoinToken | None = None) -> socket.socket:
    """A tuned, non-blocking socket that is connected to ``address`` and has sent ``greeting``.

    With a token, both sides have proved that they have it.

    Raises:
      ConnectionLost: nobody answers there, or not with the token.
    """
    loop = asyncio.get_running_loop()
    host, port = split_address(address)
    problem: Exception | None = None
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConnectionLost(f"{address}: the host is not known: {error}") from error
    for family, kind, protocol, _, name in found:
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setblocking(False)
            tune(sock)
            await loop.sock_connect(sock, name)
            await loop.sock_sendall(sock, greeting)
            if token is not None:
                await prove(sock, token, greeting)
            return sock
        except OSError as error:
            sock.close()
            problem = error
        except BaseException:
            sock.close()
            raise
    raise ConnectionLost(f"cannot connect to {address}: {problem}") from problem
