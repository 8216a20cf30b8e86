"""What the tests of the API share: a server with a scripted service behind it, and tokens that come on demand."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import grpc

from spotjax.api.proto.spotjax.v1 import fleet_pb2_grpc, generation_pb2_grpc
from spotjax.api.server import ApiServer
from spotjax.api.validation import ServedModel
from spotjax.testing.scripted_service import ByteTokenizer, ScriptedService, ScriptedStructures

MODEL = ServedModel("scripted", ByteTokenizer(), max_model_len=256, structures=ScriptedStructures())


class Steps:
    """Lets tokens out one by one, or all of them."""

    def __init__(self) -> None:
        self._semaphore = asyncio.Semaphore(0)
        self._all = False

    async def __call__(self) -> None:
        if not self._all:
            await self._semaphore.acquire()

    def let(self, count: int) -> None:
        for _ in range(count):
            self._semaphore.release()

    def let_all(self) -> None:
        self._all = True
        self.let(1000)


@dataclass
class Running:
    """A server and stubs that are connected to it."""

    service: ScriptedService
    server: ApiServer
    steps: Steps
    port: int
    channel: grpc.aio.Channel
    generation: Any = field(init=False)
    fleet: Any = field(init=False)

    def __post_init__(self) -> None:
        self.generation = generation_pb2_grpc.GenerationStub(self.channel)
        self.fleet = fleet_pb2_grpc.FleetStub(self.channel)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"


async def until(condition: Callable[[], object]) -> None:
    """Waits until something that the server does in the background is done; pytest's timeout ends a vain wait."""
    while not condition():
        await asyncio.sleep(0.002)
