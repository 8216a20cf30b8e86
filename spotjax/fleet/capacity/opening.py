"""Puts together what keeps a controller's capacity, from the file that its settings name."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

from spotjax.config import ServeConfig, is_any
from spotjax.fleet.capacity.file import CapacitySettings, read
from spotjax.fleet.capacity.keeper import Keeper
from spotjax.fleet.capacity.ledger import Ledger
from spotjax.fleet.capacity.ledger_file import LedgerFile
from spotjax.fleet.capacity.load import Meter
from spotjax.fleet.capacity.loop import CapacityLoop
from spotjax.fleet.capacity.served import Clocks, Served
from spotjax.fleet.providers.provider import FleetIdentity, Provider
from spotjax.fleet.providers.registry import open_provider, provider_config


async def open_described(config: ServeConfig, address: str) -> tuple[CapacitySettings, Provider]:
    """The operator's limits, and the provider, opened.

    Args:
      config: of a controller, with ``capacity``.
      address: HOST:PORT that it listens on.

    Raises:
      ConfigError: the file is not as it must be, or something that the provider needs is not there.
      ProviderError: it cannot be opened.
    """
    path = Path(config.capacity).expanduser()
    table, settings = read(path)
    if is_any(address) and config.advertise:
        address = f"{config.advertise}:{address.rpartition(':')[2]}"
    provider = await open_provider(
        provider_config(table, f"[provider] in {path}"), FleetIdentity(settings.fleet, address, config)
    )
    return settings, provider


async def open_capacity(
    config: ServeConfig, address: str, directory: Path | None, served: Callable[[], Served | None]
) -> CapacityLoop:
    """What is to be run.

    Args:
      config, address: see ``open_described``.
      directory: of the commit log, where the account of spending is kept, too.
      served: see ``CapacityLoop``.

    Raises: see ``open_described``.
    """
    file = LedgerFile(directory)
    ledger = file.read()
    settings, provider = await open_described(config, address)
    clocks = Clocks(time.monotonic, time.time)
    keeper = Keeper(settings, ledger, Random(), clocks.monotonic())
    meter = Meter(settings.window_seconds, clocks.monotonic())

    async def write(ledger: Ledger) -> None:
        await asyncio.to_thread(file.write, ledger)

    return CapacityLoop(settings, provider, keeper, write, meter, served, clocks)
