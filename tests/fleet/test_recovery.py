"""The controller dies at any moment and another goes on from its log: every token once, and KV is used where it is."""

from __future__ import annotations

import asyncio
import contextlib
from random import Random

import pytest
from fleet_cases import TIGHT, PureCluster, Reading, Service, instances, make_service, random_prompt
from hypothesis import given, settings
from hypothesis import strategies as st
from pure_model import turns
from recording_log import RecordingLog
from virtual_time import run

from spotjax.engine.generation import GenerationRequest
from spotjax.engine.request import SamplingParams
from spotjax.errors import RequestExists
from spotjax.fleet.status import Reconfiguration
from spotjax.meshes.instance import InstanceState

PATIENCE = 20.0
pytestmark = pytest.mark.filterwarnings(
    "ignore:coroutine .* was never awaited", "ignore::pytest.PytestUnraisableExceptionWarning"
)  # what had not begun when its controller died


class Client:
    """Follows one request over all the lives of its server, and sees every token once.

    Attributes:
      accepted: the server has said so.
    """

    def __init__(self, request: GenerationRequest) -> None:
        self.request, self.reading, self.accepted = request, Reading(), False

    async def follow(self, service: Service) -> None:
        if not self.accepted:
            with contextlib.suppress(RequestExists):  # it was recorded, and nobody could tell us
                await service.controller.submit(self.request)
            self.accepted = True
        seen = [len(self.reading.tokens.get(choice, ())) for choice in range(self.request.n)]
        async for delta in service.controller.stream(self.request.request_id, seen):
            if delta.choice not in self.reading.finished:
                self.reading.take(delta)


class World:
    """What outlives controllers: instances, the log, clients."""

    def __init__(self, count: int, pages: int, random: Random, *, tight: bool) -> None:
        self.random, self.pages, self.count = random, pages, count
        self.machines = instances(count, 1, TIGHT if tight else 2**30)
        self.cluster = PureCluster(random)
        self.log = RecordingLog(lambda: random.choice((0, 0, 1, 2, 9)))
        self.clients: dict[str, Client] = {}
        self.gone: set[str] = set()

    def start(self) -> Service:
        service = make_service(
            self.random, self.machines, pages=self.pages, cluster=self.cluster, log=self.log, retain_seconds=1e9
        )
        for name in self.gone:
            service.members.set_state(name, InstanceState.GONE)
        for client in self.clients.values():
            service.requests[client.request.request_id] = client.request
        return service

    def new_client(self) -> Client:
        random, name = self.random, f"r{len(self.clients)}"
        prompt = random_prompt(random, (client.request for client in self.clients.values()))
        sampling = SamplingParams(max_tokens=random.randint(1, 16), seed=random.getrandbits(9))
        client = Client(GenerationRequest(name, prompt, sampling, random.randint(1, 3), resumable=True))
        self.clients[name] = client
        return client

    async def life(self, operations: list[str]) -> None:
        """One controller from its start to its death, which comes when this returns."""
        service = self.start()
        starting = asyncio.create_task(service.controller.start())
        if self.random.random() < 0.8:
            await starting
        following = {n: asyncio.create_task(c.follow(service)) for n, c in self.clients.items() if starting.done()}
        changes: list[asyncio.Task[Reconfiguration]] = []
        for operation in operations:
            alive = [i.name for i in service.members.alive() if i.state is InstanceState.READY]
            if operation == "submit" and starting.done():
                client = self.new_client()
                service.requests[client.request.request_id] = client.request
                following[client.request.request_id] = asyncio.create_task(client.follow(service))
            elif operation == "lose" and len(alive) > 1 and starting.done():
                changes.append(asyncio.create_task(service.controller.preempt(self.random.choice(alive), 0)))
            elif operation == "leave" and len(alive) > 1 and starting.done():
                changes.append(asyncio.create_task(service.controller.preempt(self.random.choice(alive), 1000)))
            elif operation == "add" and service.members.having(InstanceState.GONE) and starting.done():
                changes.append(asyncio.create_task(service.controller.add(1)))
            await turns(self.random.choice((0, 1, 2, 8, 30)))
        if starting.done():
            service.controller._dispatcher.check()

    def bury(self) -> None:
        """The controller is dead: what it recorded is what there is."""
        self.log = self.log.after_a_crash()
        self.cluster.outlive()
        self.gone = {machine.name for machine in self.machines if machine.name in self.cluster.lost}

    async def last_life(self) -> None:
        service = self.start()
        await service.controller.start()
        if self.gone:
            await service.controller.add(len(self.gone))
        await asyncio.wait_for(asyncio.gather(*(c.follow(service) for c in self.clients.values())), PATIENCE)
        for name, client in self.clients.items():
            client.reading.check(service.expected(name))
            assert list(service.log.states(name)) == service.expected(name)
        assert await service.controller.drain(PATIENCE)
        await service.controller.close()
        service.controller.check()
        status = service.controller.status()
        assert status.requests_running == status.queued == 0
        assert all(replica.pages_used == 0 for replica in status.replicas)


@settings(max_examples=150, deadline=None)
@given(
    fleet=st.tuples(st.integers(1, 4), st.booleans()),
    pages=st.integers(11, 24),
    lives=st.lists(
        st.lists(st.sampled_from(["submit", "submit", "submit", "lose", "leave", "add", "wait"]), max_size=8),
        min_size=1,
        max_size=4,
    ),
    seed=st.integers(0, 2**32),
)
def test_controllers_that_die_at_any_moment_lose_and_repeat_no_token(
    fleet: tuple[int, bool], pages: int, lives: list[list[str]], seed: int
) -> None:
    count, tight = fleet
    world = World(max(count, 2) if tight else count, pages, Random(seed), tight=tight)
    for operations in lives:
        run(world.life(["submit", *operations]))  # which cancels whatever it leaves behind, wherever that is
        world.bury()
    run(world.last_life())
