"""The workers' door with a join token: real gRPC, real sessions of workers, and those that lack the token."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from spotjax.fleet.door import Door
from spotjax.meshes.instance import InstanceType
from spotjax.protocol import control
from spotjax.transport.join_token import JoinToken
from spotjax.worker.session import End, Session

OURS, THEIRS = JoinToken("sjx-join-" + "a" * 43), JoinToken("sjx-join-" + "b" * 43)
KIND = InstanceType("box", 2, 2**30, 1e9, 1e9, 1e9, 1e9)
REGISTRATION = control.Register(control.VERSION, "a", "1", KIND, "cpu", False, "", "127.0.0.1:1")


@asynccontextmanager
async def door(token: JoinToken | None) -> AsyncIterator[tuple[list[Any], grpc.aio.Channel]]:
    """Registrations that came in, and a channel. Whoever comes in is released."""
    came: list[Any] = []

    async def join(requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        came.append(await context.read())
        await context.write(control.Release(at_once=False))

    entrance = Door(token)
    entrance.join = join
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((entrance.handler(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield came, channel
    await server.stop(None)


async def nothing(welcome: control.Welcome) -> Any:
    raise AssertionError("nobody is welcomed here")


@pytest.mark.parametrize("token", [OURS, None], ids=["token", "none"])
async def test_a_worker_comes_in_that_has_what_the_controller_has(token: JoinToken | None) -> None:
    async with door(token) as (came, channel), asyncio.timeout(20):
        assert await Session(channel, REGISTRATION, nothing, token=token).run() is End.RELEASED
        assert came == [REGISTRATION]


@pytest.mark.parametrize(("controller", "worker"), [(OURS, None), (OURS, THEIRS), (None, OURS)])
async def test_a_worker_stays_out_that_has_something_else(
    controller: JoinToken | None, worker: JoinToken | None, caplog: pytest.LogCaptureFixture
) -> None:
    async with door(controller) as (came, channel), asyncio.timeout(20):
        assert await Session(channel, REGISTRATION, nothing, token=worker).run() is End.LOST
        assert not came
    assert "join token" in caplog.text


async def test_a_stranger_that_knows_the_protocol_but_not_the_token_stays_out() -> None:
    async with door(OURS) as (came, channel), asyncio.timeout(20):
        for nonce in (None, "zz", "00", "00" * 32):
            for first in (REGISTRATION, control.Proof(b""), control.Proof(b"x" * 32)):
                call = channel.stream_stream(control.METHOD, control.encode, control.decode_from_controller)(
                    metadata=() if nonce is None else ((control.NONCE_KEY, nonce),)
                )
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await call.write(first)
                    await call.read()
                assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert not came
