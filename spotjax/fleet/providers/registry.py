"""Which providers there are, and how one is opened from the table that describes it. Reads no file, knows no cloud.

A provider's module is imported when its table is read, and no other one's: the libraries of the other clouds may be
missing.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import msgspec

from spotjax.config import is_any
from spotjax.errors import ConfigError
from spotjax.fleet.providers.provider import FleetIdentity, Provider, ProviderConfig

KINDS: Mapping[str, str] = {
    "local": "LocalConfig",
    "trace": "TraceConfig",
    "command": "CommandConfig",
    "tpu": "TpuConfig",
    "gce": "GceConfig",
    "ray": "RayConfig",
}
"""What ``kind`` may be, and the class of its table in the module ``spotjax.fleet.providers.KIND``."""


def provider_config(table: Mapping[str, Any], where: str) -> ProviderConfig:
    """The description of a provider.

    Args:
      table: with ``kind`` and what that provider needs.
      where: what the table is called in errors, such as ``[provider] in fleet.toml``.

    Raises:
      ConfigError: there is no such provider, a key is unknown, or a value is out of its range; names the key.
    """
    kind = str(table.get("kind", ""))
    if kind not in KINDS:
        close = difflib.get_close_matches(kind, KINDS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(KINDS)}"
        raise ConfigError(f"kind in {where} is {kind!r}, which is no provider; {hint}")
    described = getattr(import_module(f"spotjax.fleet.providers.{kind}"), KINDS[kind])
    try:
        config: ProviderConfig = msgspec.convert(table, described)
    except msgspec.ValidationError as problem:
        raise ConfigError(f"{where}: {problem}") from problem
    return config


async def open_provider(config: ProviderConfig, fleet: FleetIdentity) -> Provider:
    """Opens it for a fleet. What it made for that fleet earlier is found again.

    Raises:
      ConfigError: something that it needs is not installed, what it is to use is not there, or its machines could not
        reach the controller.
      ProviderError: as from every call of a provider.
    """
    if is_any(fleet.join) and not config.near:
        raise ConfigError(
            f"listen ({fleet.join}) is every address of this machine; advertise must say which one of them machines "
            "that are rented can reach"
        )
    return await config.open(fleet)
