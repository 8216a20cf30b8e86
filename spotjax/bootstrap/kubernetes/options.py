"""What is asked of a deployment on Kubernetes, and what of it does not go together. The manifests follow from it."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, get_type_hints

import msgspec
from msgspec import Meta

from spotjax.bootstrap.kubernetes.clusters import CLUSTERS, Cluster
from spotjax.bootstrap.kubernetes.termination import SLACK_SECONDS, grace_within
from spotjax.bootstrap.options import IMAGE
from spotjax.config import SHOWN, TYPES, where_of
from spotjax.errors import ConfigError
from spotjax.settings import checked, refuse_unknown

OBJECT = r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?"
"""Names of Kubernetes' objects."""
LABEL = r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
"""Values of labels."""
TOPOLOGY = r"[1-9]\d{0,2}x[1-9]\d{0,2}(x[1-9]\d{0,2})?"
DECIDED = frozenset(
    {
        "model",
        "listen",
        "http",
        "join",
        "name",
        "data_listen",
        "advertise",
        "commit_log",
        "compilation_cache",
        "drain_seconds",
    }
    | {"grace_seconds", "devices_per_instance", "slice_hosts", "slice_host", "slice_coordinator", "price_class", "zone"}
    | {"tls_certificate", "tls_key", "tls_authority", "workers", "instances"}
    | {"join_token", "api_keys", "http"}
)
"""Settings that follow from the options."""

Amount = Annotated[int, Meta(ge=1, le=1_000_000)]


class KubernetesOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A deployment: one controller and its workers, in a namespace of their own.

    Raises:
      ConfigError: an option is out of range, or does not go with the others; names it.
    """

    cluster: Annotated[
        Literal["local", "gke-gpu", "gke-tpu", "eks", "aks"],
        Meta(description="kind of cluster; local: workers compute on CPUs, on any node"),
    ]
    image: Annotated[
        str, Meta(pattern=rf"^{IMAGE}\Z", description="container image of Spotjax, for controller and workers")
    ]
    namespace: Annotated[
        str,
        Meta(
            pattern=r"^(?!default\Z|kube-)[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?\Z",
            description="to be made, for one deployment alone",
        ),
    ] = "spotjax"
    model: Annotated[
        str, Meta(min_length=1, description="what to serve, as for spotjax serve; below /models with --model-claim")
    ] = "tiny"
    model_claim: Annotated[
        str,
        Meta(pattern=rf"^({OBJECT})?\Z", description="PersistentVolumeClaim with models that many nodes can read"),
    ] = ""
    hub_token_secret: Annotated[
        str, Meta(pattern=rf"^({OBJECT})?\Z", description="Secret whose key token is one of the Hugging Face hub")
    ] = ""
    workers: Annotated[Amount, Meta(description="how many; of TPUs, how many slices")] = 2
    devices: Annotated[
        Amount, Meta(description="accelerators of each worker's pod; on CPUs, devices of each worker")
    ] = 1
    accelerator: Annotated[
        str,
        Meta(
            pattern=rf"^({LABEL})?\Z",
            description="its name at GKE, such as nvidia-l4 or tpu-v5-lite-podslice; elsewhere the type of machine",
        ),
    ] = ""
    topology: Annotated[
        str, Meta(pattern=rf"^({TOPOLOGY})?\Z", description="shape of a TPU slice in chips, such as 2x4")
    ] = ""
    cpus: Annotated[Amount, Meta(description="of each worker's pod")] = 1
    memory_gib: Annotated[Amount, Meta(description="GiB of each worker's pod, its shared memory included")] = 4
    shared_memory_gib: Annotated[
        Amount, Meta(description="GiB for the parameter store: as much as the parameters of one worker")
    ] = 1
    controller_cpus: Annotated[Amount, Meta(description="of the controller's pod")] = 1
    controller_memory_gib: Annotated[Amount, Meta(description="GiB of the controller's pod")] = 4
    cache_gib: Annotated[
        Amount, Meta(description="GiB on each node's disk for fetched models and compiled programs")
    ] = 20
    log_gib: Annotated[Amount, Meta(description="GiB of the volume with the commit log")] = 10
    storage_class: Annotated[
        str, Meta(pattern=rf"^({OBJECT})?\Z", description="of that volume; empty: the cluster's default")
    ] = ""
    zone: Annotated[
        str, Meta(pattern=rf"^({LABEL})?\Z", description="in which all pods are to be; empty: spread over all")
    ] = ""
    notice_seconds: Annotated[
        float,
        Meta(ge=0, le=3600, description="that pods have when a node is taken; 0: what the cluster gives by default"),
    ] = 0.0
    drain_seconds: Annotated[
        float,
        Meta(ge=0, le=86400, description="how long running requests may go on when the controller's pod is deleted"),
    ] = 30.0
    pre_stop_seconds: Annotated[
        int,
        Meta(ge=0, le=3600, description="before the controller is told to end, for a proxy in front of it to let go"),
    ] = 0
    controller_tls_secret: Annotated[
        str, Meta(pattern=rf"^({OBJECT})?\Z", description="Secret with tls.crt, tls.key and ca.crt of the controller")
    ] = ""
    worker_tls_secret: Annotated[
        str, Meta(pattern=rf"^({OBJECT})?\Z", description="the same of the workers; both or none")
    ] = ""
    access_secret: Annotated[
        str,
        Meta(
            pattern=rf"^({OBJECT})?\Z",
            description="Secret with join-token, made by spotjax keys join-token, and keys.toml, made by spotjax keys "
            "add; empty: with TLS, certificates alone say who may do what",
        ),
    ] = "spotjax-access"
    priority_class: Annotated[
        str, Meta(pattern=rf"^({OBJECT})?\Z", description="of the controller's pod; empty: the cluster's default")
    ] = ""
    settings: dict[str, str | int | float | bool] = {}
    """More settings of ``spotjax serve``, for whom they have a meaning."""

    def __post_init__(self) -> None:
        for option in msgspec.structs.fields(type(self)):
            try:
                msgspec.convert(getattr(self, option.name), FIELDS[option.name], strict=True)
            except msgspec.ValidationError as error:
                raise ConfigError(f"{option.name}: {error}, got {getattr(self, option.name)!r}") from error
        if self.shared_memory_gib >= self.memory_gib:
            raise ConfigError(
                f"memory_gib ({self.memory_gib}) must be more than shared_memory_gib ({self.shared_memory_gib}), which "
                "counts towards it"
            )
        if 0 < self.notice_seconds <= SLACK_SECONDS:
            raise ConfigError(f"notice_seconds ({self.notice_seconds:g}) must be more than {SLACK_SECONDS:g}")
        if bool(self.controller_tls_secret) != bool(self.worker_tls_secret):
            raise ConfigError(
                "controller_tls_secret and worker_tls_secret go together: TLS needs certificates on both sides"
            )
        if not self.access_secret and not self.tls and not self.settings.get("insecure"):
            raise ConfigError(
                "access_secret may be empty with TLS only (controller_tls_secret, worker_tls_secret), or with the "
                "setting insecure: anybody in the cluster could use and change the fleet"
            )
        self._refuse_wrong_accelerators()
        self._refuse_wrong_settings()

    def _refuse_wrong_accelerators(self) -> None:
        kind = self.kind
        if bool(self.accelerator) != bool(kind.accelerator_label):
            needs = f"a value of the label {kind.accelerator_label}" if kind.accelerator_label else "empty"
            raise ConfigError(f"accelerator must be {needs} on {self.cluster}, got {self.accelerator!r}")
        if bool(self.topology) != bool(kind.topology_label):
            needs = "such as 2x4" if kind.topology_label else "empty"
            raise ConfigError(f"topology must be {needs} on {self.cluster}, got {self.topology!r}")
        if self.chips % self.devices:
            raise ConfigError(f"topology ({self.topology}) must be a multiple of one host's devices ({self.devices})")

    def _refuse_wrong_settings(self) -> None:
        refuse_unknown(self.settings, TYPES, "settings")
        for name, value in self.settings.items():
            if name in DECIDED:
                raise ConfigError(f"setting {name} follows from the other options")
            if not {"controller", "worker"}.intersection(where_of(name)):
                raise ConfigError(f"setting {name} has no meaning in a fleet; it is {SHOWN[where_of(name)]}")
            checked(name, value, f"setting {name}", strict=True)

    @property
    def kind(self) -> Cluster:
        """The kind of cluster."""
        return CLUSTERS[self.cluster]

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
        return grace_within(self.notice_seconds or self.kind.notice_seconds)

    @property
    def tls(self) -> bool:
        """Whether connections use certificates."""
        return bool(self.controller_tls_secret)


FIELDS: dict[str, Any] = get_type_hints(KubernetesOptions, include_extras=True)
