"""A worker whose controller does not come back ends by itself, if it was told to."""

from __future__ import annotations

import asyncio

from spotjax.config import ServeConfig
from spotjax.worker.process import WorkerProcess
from spotjax.worker.session import End


class Alone(WorkerProcess):
    """A worker that is in a fleet until a moment, on the loop's clock, and then never again."""

    def __init__(self, config: ServeConfig, member_until: float) -> None:
        super().__init__(config)
        self._loop = asyncio.get_running_loop()
        self._member_until = member_until
        self.stays = 0

    def _listen(self) -> None:
        """To nobody."""

    async def _stay(self) -> End:
        self.stays += 1
        self._member_at = max(self._member_at, min(self._loop.time(), self._member_until))
        return End.LOST


async def test_a_worker_ends_when_it_was_long_enough_without_a_fleet() -> None:
    began = asyncio.get_running_loop().time()
    worker = Alone(ServeConfig(join="127.0.0.1:1", abandoned_seconds=0.3), began + 0.4)
    assert await asyncio.wait_for(worker.work(), 20) == 0
    assert asyncio.get_running_loop().time() >= began + 0.7
    assert worker.stays > 1


async def test_without_a_limit_it_tries_on() -> None:
    worker = Alone(ServeConfig(join="127.0.0.1:1"), 0.0)
    working = asyncio.create_task(worker.work())
    while worker.stays < 4:
        assert not working.done()
        await asyncio.sleep(0.01)
    working.cancel()
    await asyncio.gather(working, return_exceptions=True)
