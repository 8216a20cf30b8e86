"""Runs a server: listens, loads the model, serves until a signal, drains.

``python -m spotjax.serve`` is ``spotjax serve``.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import signal
import sys
from collections.abc import Sequence
from typing import Any

from spotjax.api.server import ApiServer
from spotjax.api.validation import ServedModel
from spotjax.config import ServeConfig
from spotjax.fleet.status import FleetStatus
from spotjax.telemetry import logs

log = logging.getLogger("spotjax.serve")

FLUSH_SECONDS = 2.0
"""How long streams of finished requests may take to be written out after draining."""


def main(argv: Sequence[str] | None = None) -> int:
    """``spotjax serve`` with these arguments; returns the exit code."""
    from spotjax import cli

    return cli.main(["serve", *(sys.argv[1:] if argv is None else argv)])


def run(config: ServeConfig) -> int:
    """Serves until a signal; returns the exit code: 0 once drained, 128 + number on a second signal, 1 on failure."""
    logs.set_up(config.log_level, config.log_format)
    return asyncio.run(serve(config))


async def serve(config: ServeConfig) -> int:
    """The same inside an event loop.

    Raises:
      ConfigError: the address cannot be bound, or the settings do not go together.
      CheckpointError: the model cannot be loaded.
    """
    signals = Signals()
    server = ApiServer()
    address = f"{host_of(config.listen)}:{await server.start(config.listen)}"
    log.info("listening", extra={"address": address})
    if not is_loopback(config.listen):
        log.warning("anybody who can reach this address can use it: there is no authentication yet")
    try:
        loading = asyncio.create_task(start(config, server, address))
        if not await finishes_before(loading, signals.first):
            return 0
        embedded = loading.result()
        try:
            asked = asyncio.create_task(signals.first.wait())
            await asyncio.wait({asked, embedded.failure}, return_when=asyncio.FIRST_COMPLETED)
            if embedded.failure.done():
                log.critical("the engine failed; the server ends", exc_info=embedded.failure.exception())
                return 1
            log.info("draining", extra={"seconds": config.drain_seconds})
            draining = asyncio.create_task(server.drain(config.drain_seconds))
            if not await finishes_before(draining, signals.second):
                return 128 + signals.number
            if draining.result():
                await server.stop(FLUSH_SECONDS)
            else:
                log.warning("requests were left unfinished", extra={"seconds": config.drain_seconds})
            return 0
        finally:
            await embedded.close()
    finally:
        await server.stop()


async def start(config: ServeConfig, server: ApiServer, address: str) -> Any:
    """Loads the model and begins to serve it. Returns the embedded server."""
    from spotjax import embedded  # imports jax, which the settings above must come before

    started = await embedded.start(config)
    model = ServedModel(started.model_name, started.tokenizer, started.max_model_len)
    await server.attach(started.service, model)
    print(f"spotjax is serving {model.name} on {address} ({mesh_of(started.service.status())})", flush=True)
    return started


class Signals:
    """SIGTERM and SIGINT: the first asks to drain, the second to stop at once, the third gets the default treatment."""

    def __init__(self) -> None:
        self.first, self.second = asyncio.Event(), asyncio.Event()
        self.number = 0
        self._loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._received, number)

    def _received(self, number: signal.Signals) -> None:
        if not self.first.is_set():
            self.first.set()
            return
        self.number = number
        self.second.set()
        for handled in (signal.SIGTERM, signal.SIGINT):
            self._loop.remove_signal_handler(handled)


async def finishes_before(task: asyncio.Task[Any], event: asyncio.Event) -> bool:
    """Waits for either; a task that is too late is cancelled."""
    waiting = asyncio.create_task(event.wait())
    try:
        await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
        return task.done()
    finally:
        waiting.cancel()
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def mesh_of(status: FleetStatus) -> str:
    """``mesh 2x2x2 on 4 instances``."""
    if status.placement is None:
        return "no mesh fits yet"
    instances = len({device.instance for device in status.placement.devices.values()})
    return f"mesh {status.placement.shape} on {instances} instance{'s' * (instances != 1)}"


def host_of(listen: str) -> str:
    """The host part of ``HOST:PORT``."""
    return listen.rpartition(":")[0]


def is_loopback(listen: str) -> bool:
    """Whether only this machine can reach the address."""
    host = host_of(listen).strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    sys.exit(main())
