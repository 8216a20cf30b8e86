"""Runs a server: listens, loads the model or waits for workers, serves until a signal, drains. Or runs a worker.

``python -m spotjax.serve`` is ``spotjax serve``.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import ssl
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import grpc

from spotjax import local_workers
from spotjax.api.access.callers import Role
from spotjax.api.access.gate import Gate, OpenGate
from spotjax.api.access.key_file import KeyRecord, hash_of
from spotjax.api.access.keyed_gate import KeyedGate
from spotjax.api.http.app import application
from spotjax.api.http.server import HttpServer
from spotjax.api.server import ApiServer
from spotjax.api.validation import ServedModel
from spotjax.config import ServeConfig, mode
from spotjax.exposure import host_of, is_loopback, refuse_exposure
from spotjax.fleet.service import Service
from spotjax.fleet.status import FleetStatus
from spotjax.machine_notices import MachineEnd
from spotjax.telemetry import logs
from spotjax.telemetry.server_telemetry import ServerTelemetry
from spotjax.transport import loop
from spotjax.transport.credentials import server_credentials
from spotjax.transport.join_token import STATUS_KEY, JoinToken
from spotjax.transport.security import renewing_context

log = logging.getLogger("spotjax.serve")
Beside = Callable[[Service], Coroutine[Any, Any, None]]

FLUSH_SECONDS = 2.0
"""How long streams of finished requests may take to be written out after draining."""


def main(argv: Sequence[str] | None = None) -> int:
    """``spotjax serve`` with these arguments; returns the exit code."""
    from spotjax import cli

    return cli.main(["serve", *(sys.argv[1:] if argv is None else argv)])


def run(config: ServeConfig, beside: Beside | None = None) -> int:
    """Serves until a signal; returns the exit code: 0 once drained, 128 + number on a second signal, 1 on failure."""
    local_workers.die_with_parent()
    logs.set_up(config.log_level, config.log_format)
    return loop.run(serve(config, beside))


async def serve(config: ServeConfig, beside: Beside | None = None) -> int:
    """The same inside an event loop.

    Args:
      config: of the server, or of a worker.
      beside: is given the service once it serves, and runs until it returns or the server ends.

    Raises:
      ConfigError: an address cannot be bound, or the settings do not go together.
      CheckpointError: the model cannot be loaded.
    """
    for concern in [*refuse_exposure(config), *unreachable(config)]:
        log.warning("%s", concern)
    if mode(config) == "worker":
        from spotjax.worker import process  # imports jax

        return await process.run(config)
    signals = Signals()
    server = ApiServer(credentials=credentials(config), gate=gate_of(config))
    telemetry = ServerTelemetry(server.backend.status, config.traces)
    address = f"{host_of(config.address)}:{await server.start(config.address)}"
    log.info("listening", extra={"address": address})
    names = None if config.api_keys else http_names(config)
    http = HttpServer(application(server.backend, names, telemetry.registry), https(config))
    try:
        if config.http != "off":
            port = await http.start(config.http)
            log.info("serving HTTP", extra={"address": f"{host_of(config.http)}:{port}"})
        loading = asyncio.create_task(start(config, server, address, telemetry))
        if not await finishes_before(loading, signals.first):
            return 0
        started = loading.result()
        watching = asyncio.create_task(beside(started.service)) if beside is not None else None
        if watching is not None:
            watching.add_done_callback(_say_why)
        try:
            seconds = await until_drained_for(config, signals, started.failure)
            if started.failure.done():
                log.critical("the engine failed; the server ends", exc_info=started.failure.exception())
                return 1
            log.info("draining", extra={"seconds": seconds})
            draining = asyncio.create_task(server.drain(seconds))
            if not await finishes_before(draining, signals.second):
                return 128 + signals.number
            if draining.result():
                await asyncio.gather(server.stop(FLUSH_SECONDS), http.stop(FLUSH_SECONDS))
            else:
                log.warning("requests were left unfinished", extra={"seconds": seconds})
            return 0
        finally:
            if watching is not None:
                watching.cancel()
            await started.close()
    finally:
        await asyncio.gather(server.stop(), http.stop())
        await telemetry.close()


async def until_drained_for(config: ServeConfig, signals: Signals, failure: asyncio.Future[None]) -> float:
    """Waits for what ends a server: a signal, a failure, or the end of the machine that all of it is on.

    Returns: how long draining may take, in seconds.
    """
    end = MachineEnd(config) if mode(config) == "embedded" else None
    causes: set[asyncio.Future[Any]] = {asyncio.create_task(signals.first.wait()), failure}
    if end is not None:
        causes.add(asyncio.create_task(end.near.wait()))
    try:
        await asyncio.wait(causes, return_when=asyncio.FIRST_COMPLETED)
        return config.drain_seconds if end is None else end.seconds(config.drain_seconds)
    finally:
        for waiting in causes - {failure}:
            waiting.cancel()
        if end is not None:
            await end.close()


def _say_why(beside: asyncio.Task[None]) -> None:
    """What runs beside the server has ended; it goes on without."""
    if not beside.cancelled() and (problem := beside.exception()) is not None:
        log.error("nothing more is shown: %s", problem, exc_info=problem)


async def start(config: ServeConfig, server: ApiServer, address: str, telemetry: ServerTelemetry) -> Any:
    """Begins to serve the model. Returns the embedded server, or the fleet's."""
    started: Any
    if mode(config) == "controller":
        from spotjax import fleet_server

        started = await fleet_server.start(config, server, address, telemetry.recorder)
        telemetry.instances = started.reports
    else:
        from spotjax import embedded  # imports jax, which a controller must not

        started = await embedded.start(config, telemetry.recorder)
    model = ServedModel(started.model_name, started.tokenizer, started.max_model_len, started.grammars)
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


def credentials(config: ServeConfig) -> grpc.ServerCredentials | None:
    """TLS if the settings name a certificate; mutual, if they name an authority for those of clients."""
    if not config.tls_certificate:
        return None
    authority = config.tls_authority if config.client_certificates else ""
    return server_credentials(config.tls_certificate, config.tls_key, authority)


def https(config: ServeConfig) -> ssl.SSLContext | None:
    """The same for HTTP."""
    if not config.tls_certificate:
        return None
    authority = config.tls_authority if config.client_certificates else ""
    return renewing_context(config.tls_certificate, config.tls_key, authority)


def gate_of(config: ServeConfig) -> Gate:
    """Who lets callers in.

    Raises:
      ConfigError: the file of API keys cannot be used.
    """
    if not config.api_keys:
        return OpenGate()
    others = {}
    if config.join_token:  # workers ask whether they are in the fleet
        token = JoinToken.from_file(config.join_token)
        others["@workers"] = KeyRecord(hash=hash_of(token.key_for(STATUS_KEY)), role=Role.VIEWER)
    return KeyedGate(Path(config.api_keys), time.monotonic, others=others)


def unreachable(config: ServeConfig) -> list[str]:
    """That too few can reach this process, if so."""
    local = is_loopback(config.join or config.address)
    if mode(config) != "embedded" and not local and not config.workers and is_loopback(config.data_listen):
        return [f"workers on other machines cannot reach data_listen ({config.data_listen})"]
    return []


def mesh_of(status: FleetStatus) -> str:
    """``mesh 2x2x2 on 4 instances``."""
    if status.placement is None:
        return "no mesh fits yet"
    instances = len({device.instance for device in status.placement.devices.values()})
    return f"mesh {status.placement.shape} on {instances} instance{'s' * (instances != 1)}"


def http_names(config: ServeConfig) -> list[str]:
    """Names under which HTTP is reached: those that the settings give."""
    return [host_of(config.http), *filter(None, config.http_names.split(","))]


if __name__ == "__main__":
    sys.exit(main())
