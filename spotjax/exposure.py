"""Who can reach a process, and whether they have to show anything: a server that strangers could use does not start.

Pure functions of the settings. How callers and workers show who they are is in ``api.access`` and ``transport``.
"""

from __future__ import annotations

import ipaddress

from spotjax.config import ServeConfig, mode
from spotjax.errors import ConfigError


def exposures(config: ServeConfig) -> list[str]:
    """What anybody could do who can reach an address that is not this machine's alone; what would prevent it."""
    mutual = bool(config.tls_authority)  # on the data plane always; for clients unless they are let off
    clients_known = bool(config.api_keys) or (mutual and config.client_certificates)
    workers_known = bool(config.join_token) or (mutual and config.client_certificates)
    serving, fleet = mode(config) != "worker", mode(config) != "embedded"
    found = []
    for name, address in (("listen", config.address), ("http", config.http)):
        if serving and address != "off" and not is_loopback(address) and not clients_known:
            found.append(
                f"{name} ({address}) lets anybody send requests and take machines away: give api_keys a file that "
                "spotjax keys makes, or clients certificates (tls_authority)"
            )
    if serving and fleet and not is_loopback(config.address) and not workers_known:
        found.append(
            f"listen ({config.address}) lets anybody join as a worker: give controller and workers the join_token that "
            "spotjax keys join-token makes, or certificates (tls_authority)"
        )
    if fleet and not is_loopback(config.data_listen) and not (config.join_token or mutual):
        found.append(
            f"data_listen ({config.data_listen}) lets anybody read and change what the model computes: give controller "
            "and workers the join_token that spotjax keys join-token makes, or certificates (tls_authority)"
        )
    return found


def concerns(config: ServeConfig) -> list[str]:
    """What is protected, but not well; for the log."""
    found = []
    addresses = [config.address, *([config.http] if config.http != "off" else [])]
    if config.api_keys and not config.tls_certificate and not all(map(is_loopback, addresses)):
        found.append("API keys cross the network readable, unless a proxy does TLS: give tls_certificate and tls_key")
    exposed = mode(config) != "embedded" and not is_loopback(config.data_listen)
    if exposed and config.join_token and not config.tls_certificate:
        found.append("activations and KV cross the network readable: give tls_certificate and its like to encrypt them")
    return found


def refuse_exposure(config: ServeConfig) -> list[str]:
    """What is to be logged of a process that may start.

    Raises:
      ConfigError: strangers could use it, and ``insecure`` does not say that they may.
    """
    found = exposures(config)
    if found and not config.insecure:
        raise ConfigError(f"{found[0]}; or, where nobody else can connect, set insecure")
    return [*found, *concerns(config)]


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
