"""A host process of a worker that is a TPU slice: what is the same for the host that leads and for those that follow.

All hosts of the slice are lost together: a process that loses another, or fails a step, ends at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from typing import NoReturn

import jax

from spotjax.config import ServeConfig
from spotjax.protocol.backup import BackupHeader
from spotjax.protocol.beats import Beat
from spotjax.protocol.steps import MaskHeader, StepHeader
from spotjax.runtime.compiled import CompiledModel
from spotjax.runtime.executables import Devices
from spotjax.worker.executor import StageExecutor
from spotjax.worker.process import READ_SECONDS, WorkerProcess
from spotjax.worker.slice_executor import SliceExecutor
from spotjax.worker.slice_hosts import SliceHosts, join_runtime
from spotjax.worker.slice_messages import SliceFrame
from spotjax.worker.slice_peers import SlicePeers

log = logging.getLogger("spotjax.worker")


class SliceProcess(WorkerProcess):
    """This process as a host of a slice.

    Attributes:
      code: that it ends with.
    """

    code = 0

    FRAMES = StepHeader | MaskHeader | BackupHeader | Beat | SliceFrame

    async def open(self) -> None:
        """Meets the other hosts."""
        await super().open()
        self._hosts = await asyncio.to_thread(SliceHosts.meet, self._address)
        self._slice_peers.hosts = self._hosts
        log.info("host of a slice", extra={"host": self._hosts.number, "hosts": len(self._hosts.addresses)})

    def _take_devices(self) -> Devices:
        return tuple(jax.devices())

    def _make_peers(self) -> SlicePeers:
        self._slice_peers = SlicePeers(self._name, self._copies, self._endpoint, self._loop, READ_SECONDS)
        return self._slice_peers

    def _make_executor(self, model: CompiledModel, max_positions: int) -> StageExecutor:
        return SliceExecutor(
            self._name, model, max_positions, self._links.send, self._die, self._watchdog, self._circulate
        )

    def _circulate(self, header: StepHeader, payload: tuple[memoryview, ...]) -> None:
        """See ``slice_executor.Circulate``."""
        raise NotImplementedError

    def _die(self, problem: str) -> NoReturn:
        """The end of the whole slice; the others notice that this connection is gone. From any thread."""
        log.critical("the slice ends: %s", problem)
        os._exit(1)


async def run(config: ServeConfig) -> int:
    """Works as one host of a slice. Does not return: jax would wait for the other hosts at the end of the process.

    Raises:
      ConfigError: the settings do not fit the slice.
    """
    from spotjax.worker.slice_follower import FollowerProcess
    from spotjax.worker.slice_leader import LeaderProcess

    await asyncio.to_thread(join_runtime, config)
    process = LeaderProcess(config) if jax.process_index() == 0 else FollowerProcess(config)
    try:
        await process.open()
        process.code = await process.work()
        await process.close()
    except BaseException:
        log.exception("the slice ends")
        process.code = 1
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(process.code)
