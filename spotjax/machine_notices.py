"""What this process's machine hears of its end, from all sources that the settings name. Imports no jax.

Which there are is in ``fleet.notices``; what is done about it is up to whoever listens.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from math import inf
from pathlib import Path
from socket import gethostname

from spotjax.config import ServeConfig
from spotjax.errors import MetadataUnavailable
from spotjax.fleet.notices.azure import AzureSource
from spotjax.fleet.notices.detect import Machine, Platform, detect_patiently, sources_of
from spotjax.fleet.notices.gce import GPU_MAINTENANCE_SECONDS, MAINTENANCE_SECONDS
from spotjax.fleet.notices.hook import CommandSource, FileSource
from spotjax.fleet.notices.listen import Listener
from spotjax.fleet.notices.patience import METADATA, metadata_client
from spotjax.fleet.notices.signals import SignalSource
from spotjax.fleet.notices.standing import Standing, Word, acted_on_from

log = logging.getLogger("spotjax.notices")

NVIDIA = Path("/dev/nvidia0")
"""Where there are GPUs of NVIDIA."""
MARGIN_SECONDS = 2.0
"""For a server to end in, after it has drained."""


class MachineNotices:
    """Listens from its making until it is closed. For the thread of the running event loop.

    Args:
      config: names the sources.
      instance: that notices are about.
      heard: called with every word; deadlines are on ``time.monotonic``.
      signals: whether SIGTERM and SIGINT are a notice, too.
      gpu: whether the machine has GPUs, which is told of maintenance earlier.
    """

    def __init__(
        self, config: ServeConfig, instance: str, heard: Callable[[Word], None], *, signals: bool, gpu: bool
    ) -> None:
        self._listener = Listener(heard)
        self._client = metadata_client()
        self._azure: AzureSource | None = None
        self._machine = Machine(
            instance,
            config.metadata_url or METADATA,
            config.notice_seconds,
            GPU_MAINTENANCE_SECONDS if gpu else MAINTENANCE_SECONDS,
        )
        if signals:
            self._listener.add([SignalSource(instance, time.monotonic, config.grace_seconds)])
        if config.notice_file:
            self._listener.add([FileSource(instance, time.monotonic, Path(config.notice_file))])
        if config.notice_command:
            self._listener.add([CommandSource(instance, time.monotonic, config.notice_command)])
        self._finding = asyncio.create_task(self._find(config.notices))
        self._finding.add_done_callback(_found)

    async def acknowledge(self) -> None:
        """Lets the cloud take the machine now, if it announced that and can be told."""
        if self._azure is None:
            return
        try:
            begun = await self._azure.acknowledge()
        except MetadataUnavailable as problem:
            log.warning("the cloud takes the machine when it said, it could not be told to earlier: %s", problem)
        else:
            log.info("the cloud may take the machine", extra={"events": " ".join(begun)})

    async def close(self) -> None:
        """Listens no more; signals have their default treatment again."""
        self._finding.cancel()
        await asyncio.gather(self._finding, return_exceptions=True)
        await self._listener.close()
        await self._client.aclose()

    async def _find(self, notices: str) -> None:
        """Adds the sources of the machine's platform, once it is known."""
        if notices == "auto":
            found = await detect_patiently(self._client, self._machine.base_url)
            platforms = [found] if found is not None else []
        else:
            platforms = [Platform(name) for name in notices.split(",") if name != "none"]
        for platform in platforms:
            sources = sources_of(platform, self._machine, self._client, time.monotonic)
            self._azure = next((source for source in sources if isinstance(source, AzureSource)), self._azure)
            self._listener.add(sources)


def _found(finding: asyncio.Task[None]) -> None:
    """Nobody waits for the platform to be found, so nobody else would tell that it failed."""
    if not finding.cancelled() and (problem := finding.exception()) is not None:
        log.error("the machine's platform cannot be found, it gets no notices from a cloud", exc_info=problem)


class MachineEnd:
    """Whether a server that is alone on its machine has to end, and how long it may take. It has nobody to move to.

    Attributes:
      near: set when it is time to drain.
    """

    def __init__(self, config: ServeConfig) -> None:
        self.near = asyncio.Event()
        self._standing = Standing()
        self._timer: asyncio.TimerHandle | None = None
        self._notices = MachineNotices(config, gethostname(), self._heard, signals=False, gpu=NVIDIA.exists())

    def seconds(self, wanted: float) -> float:
        """That draining may take: what is wanted, or what the machine has, less ``MARGIN_SECONDS`` to end in."""
        notice = self._standing.notice
        if notice is None or notice.deadline is None:
            return wanted
        return max(0.0, min(wanted, notice.deadline - time.monotonic() - MARGIN_SECONDS))

    async def close(self) -> None:
        """Listens no more."""
        if self._timer is not None:
            self._timer.cancel()
        await self._notices.close()

    def _heard(self, word: Word) -> None:
        self._standing = self._standing.hear(word, time.monotonic())
        self._look()

    def _look(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        left = acted_on_from(self._standing.notice) - time.monotonic()
        if left <= 0:
            self.near.set()
        elif left < inf:
            self._timer = asyncio.get_running_loop().call_later(left, self._look)
