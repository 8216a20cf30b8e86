"""What is asked of a deployment on Kubernetes, and what is refused. The manifests follow from it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from spotjax.config import SHOWN, TYPES, where_of
from spotjax.deploy.kubernetes.platforms import PLATFORMS, Platform
from spotjax.deploy.kubernetes.termination import grace_within
from spotjax.errors import ConfigError
from spotjax.settings import checked, refuse_unknown

NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
LABEL = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
TOPOLOGY = re.compile(r"[1-9]\d*x[1-9]\d*(x[1-9]\d*)?")
IMAGE = re.compile(r"[^\s@:]+(:\d+)?[^\s]*")

OWN_SETTINGS = frozenset(
    {"model", "listen", "join", "name", "data_listen", "advertise", "commit_log", "compilation_cache", "drain_seconds"}
    | {"grace_seconds", "devices_per_instance", "slice_hosts", "slice_host", "slice_coordinator", "price_class", "zone"}
    | {"tls_certificate", "tls_key", "tls_authority", "workers", "instances"}
)
"""Settings that the manifests give themselves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Values:
    """A deployment: one controller and its workers, in a namespace of their own.

    Attributes:
      platform: a key of ``PLATFORMS``.
      image: with Spotjax in it, for workers and controller.
      namespace: made by the manifests, for nothing else.
      model: as for ``spotjax serve``; below ``/models`` where ``model_claim`` is given.
      model_claim: PersistentVolumeClaim with models that many nodes can read; empty: none.
      hub_token_secret: Secret whose key ``token`` is one of the Hugging Face hub; empty: none.
      workers: how many; on TPUs, how many slices.
      devices: accelerators of each worker's pod; without accelerators, virtual CPU devices.
      accelerator: value of the platform's ``accelerator_label``; empty where there is none.
      topology: of a TPU slice, such as ``2x4``; empty elsewhere.
      cpus, memory_gib: of each worker's pod. Its shared memory counts towards ``memory_gib``.
      shared_memory_gib: for the parameter store: as much as the parameters of one worker, at least 1.
      controller_cpus, controller_memory_gib: of the controller's pod.
      cache_gib: for fetched models and compiled programs, on the node's disk.
      log_gib, storage_class: of the volume with the commit log; empty: the cluster's default class.
      zone: in which all pods are to be; empty: any, spread.
      notice_seconds: that pods have when a node is taken away; None: what the platform gives by default.
      drain_seconds: how long running requests may go on when the controller's pod is deleted.
      pre_stop_seconds: before the controller is told to end, for proxies in front of it to let go.
      controller_tls_secret, worker_tls_secret: Secrets with ``tls.crt``, ``tls.key`` and ``ca.crt``; both or none.
      priority_class: of the controller's pod; empty: the cluster's default.
      settings: other settings of ``spotjax serve``, for whom they have a meaning.

    Raises:
      ConfigError: a value is out of range, or does not go with the others; names it.
    """

    platform: str
    image: str
    namespace: str = "spotjax"
    model: str = "tiny"
    model_claim: str = ""
    hub_token_secret: str = ""
    workers: int = 2
    devices: int = 1
    accelerator: str = ""
    topology: str = ""
    cpus: int = 1
    memory_gib: int = 4
    shared_memory_gib: int = 1
    controller_cpus: int = 1
    controller_memory_gib: int = 4
    cache_gib: int = 20
    log_gib: int = 10
    storage_class: str = ""
    zone: str = ""
    notice_seconds: float | None = None
    drain_seconds: float = 30.0
    pre_stop_seconds: int = 0
    controller_tls_secret: str = ""
    worker_tls_secret: str = ""
    priority_class: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.platform not in PLATFORMS:
            raise ConfigError(f"platform must be one of {', '.join(PLATFORMS)}, got {self.platform!r}")
        self._refuse_wrong_names()
        self._refuse_wrong_amounts()
        self._refuse_wrong_accelerators()
        if bool(self.controller_tls_secret) != bool(self.worker_tls_secret):
            raise ConfigError(
                "controller_tls_secret and worker_tls_secret go together: TLS needs certificates on both sides"
            )
        refuse_unknown(self.settings, TYPES, "settings")
        for name, value in self.settings.items():
            if name in OWN_SETTINGS:
                raise ConfigError(f"{name} in settings is what the manifests set themselves")
            if not {"controller", "worker"}.intersection(where_of(name)):
                raise ConfigError(f"{name} in settings has no meaning in a fleet; it is {SHOWN[where_of(name)]}")
            checked(name, value, f"{name} in settings")

    def _refuse_wrong_names(self) -> None:
        if not IMAGE.fullmatch(self.image):
            raise ConfigError(f"image must be a reference such as registry/spotjax:0.1.0, got {self.image!r}")
        if not NAME.fullmatch(self.namespace) or self.namespace == "default" or self.namespace.startswith("kube-"):
            raise ConfigError(f"namespace must be a name, of a namespace for Spotjax alone; got {self.namespace!r}")
        for name in ("model_claim", "hub_token_secret", "storage_class", "priority_class", *TLS_SECRETS):
            value = getattr(self, name)
            if value and not all(NAME.fullmatch(part) for part in value.split(".")):
                raise ConfigError(f"{name} must be the name of an object of Kubernetes, got {value!r}")
        for name in ("accelerator", "zone"):
            value = getattr(self, name)
            if value and not LABEL.fullmatch(value):
                raise ConfigError(f"{name} must be the value of a label, got {value!r}")

    def _refuse_wrong_amounts(self) -> None:
        for name in AMOUNTS:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.shared_memory_gib >= self.memory_gib:
            raise ConfigError(
                f"memory_gib ({self.memory_gib}) must be more than shared_memory_gib ({self.shared_memory_gib}), which "
                "counts towards it"
            )
        if not 0 <= self.pre_stop_seconds <= 3600 or not 0 <= self.drain_seconds <= 86400:
            raise ConfigError(
                f"pre_stop_seconds ({self.pre_stop_seconds}) must be 0 to 3600 and drain_seconds "
                f"({self.drain_seconds:g}) 0 to 86400"
            )
        if not 0 < self.grace_seconds <= 3600:
            raise ConfigError(f"notice_seconds ({self.notice_seconds}) must be at most an hour")

    def _refuse_wrong_accelerators(self) -> None:
        kind = self.kind
        if bool(self.accelerator) != bool(kind.accelerator_label):
            needs = f"a value of the label {kind.accelerator_label}" if kind.accelerator_label else "empty"
            raise ConfigError(f"accelerator must be {needs} with platform {self.platform}, got {self.accelerator!r}")
        if bool(self.topology) != bool(kind.topology_label):
            needs = "such as 2x4" if kind.topology_label else "empty"
            raise ConfigError(f"topology must be {needs} with platform {self.platform}, got {self.topology!r}")
        if self.topology and (not TOPOLOGY.fullmatch(self.topology) or self.chips % self.devices):
            raise ConfigError(
                f"topology ({self.topology}) must be such as 2x4, a multiple of one host's devices ({self.devices})"
            )

    @property
    def kind(self) -> Platform:
        """The platform."""
        return PLATFORMS[self.platform]

    @property
    def chips(self) -> int:
        """Accelerators of one instance: those of all its hosts."""
        return math.prod(int(side) for side in self.topology.split("x")) if self.topology else self.devices

    @property
    def hosts(self) -> int:
        """Pods of one instance: more than 1 for a TPU slice of several hosts."""
        return self.chips // self.devices

    @property
    def grace_seconds(self) -> float:
        """The notice that a worker gives the fleet on SIGTERM."""
        return grace_within(self.kind.notice_seconds if self.notice_seconds is None else self.notice_seconds)

    @property
    def tls(self) -> bool:
        """Whether connections use certificates."""
        return bool(self.controller_tls_secret)


TLS_SECRETS = ("controller_tls_secret", "worker_tls_secret")
AMOUNTS = (
    "workers", "devices", "cpus", "memory_gib", "shared_memory_gib", "controller_cpus", "controller_memory_gib",
    "cache_gib", "log_gib",
)  # fmt: skip
