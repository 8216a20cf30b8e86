"""The settings of the controller and of the workers in their pods: files of a ConfigMap, and the paths in them."""

from __future__ import annotations

from typing import Any

import msgspec

from spotjax.bootstrap.kubernetes.options import KubernetesOptions
from spotjax.bootstrap.rendering import toml
from spotjax.config import TLS, ServeConfig, refuse_contradictions, where_of

CONTROLLER_SERVICE = "spotjax-controller"
SLICE_SERVICE = "spotjax-slices"

GRPC_PORT = 8470
HTTP_PORT = 8471
DATA_PORT = 8472
"""Not 8471, at which libtpu meets the other hosts of a slice; the controller, which has HTTP there, has no TPU."""
COORDINATOR_PORT = 8482

SETTINGS = "/etc/spotjax"
CERTIFICATES = "/etc/spotjax-tls"
ACCESS = "/etc/spotjax-access"
STATE = "/var/lib/spotjax"
CACHE = "/var/cache/spotjax"
MODELS = "/models"
SHARED_MEMORY = "/dev/shm"
TEMPORARY = "/tmp"


def controller_config(options: KubernetesOptions) -> ServeConfig:
    """Settings of the controller."""
    config = ServeConfig(
        model=options.model,
        listen=f"0.0.0.0:{GRPC_PORT}",
        http=f"0.0.0.0:{HTTP_PORT}",
        data_listen=f"0.0.0.0:{DATA_PORT}",
        commit_log=f"{STATE}/log",
        drain_seconds=options.drain_seconds,
        log_format="json",
    )
    return _complete(config, options, "controller")


def worker_config(options: KubernetesOptions) -> ServeConfig:
    """Settings that all workers share; name, address and number of a host are in the environment of its pod."""
    config = ServeConfig(
        join=f"{CONTROLLER_SERVICE}:{GRPC_PORT}",
        data_listen=f"0.0.0.0:{DATA_PORT}",
        advertise="the-pods-own",
        grace_seconds=options.grace_seconds,
        devices_per_instance=options.chips,
        slice_hosts=options.hosts,
        zone=options.zone,
        log_format="json",
    )
    return msgspec.structs.replace(_complete(config, options, "worker"), advertise="")


def toml_of(config: ServeConfig) -> str:
    """A file for ``--config``, with the settings that are not at their defaults."""
    lines = (
        f"{setting.name} = {toml(value)}\n"
        for setting in msgspec.structs.fields(ServeConfig)
        if (value := getattr(config, setting.name)) != setting.default
    )
    return "".join(lines)


def _complete(config: ServeConfig, options: KubernetesOptions, mode: str) -> ServeConfig:
    """With certificates and what else was asked for. Raises ConfigError for settings that contradict each other."""
    others: dict[str, Any] = {name: value for name, value in options.settings.items() if mode in where_of(name)}
    if options.access_secret:
        others["join_token"] = f"{ACCESS}/join-token"
        if mode == "controller":
            others["api_keys"] = f"{ACCESS}/keys.toml"
    if options.tls:
        files = zip(TLS, ("tls.crt", "tls.key", "ca.crt"), strict=True)
        others |= {setting: f"{CERTIFICATES}/{file}" for setting, file in files}
    config = msgspec.structs.replace(config, **others)
    refuse_contradictions(config)
    return config
