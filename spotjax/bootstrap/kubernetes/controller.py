"""The controller: one pod on a node that is not taken away, its volume with the commit log, and its two Services."""

from __future__ import annotations

from typing import Any

from spotjax.bootstrap.kubernetes.clusters import SPOT_LABELS
from spotjax.bootstrap.kubernetes.configuration import (
    CONTROLLER_SERVICE,
    DATA_PORT,
    GRPC_PORT,
    HTTP_PORT,
    STATE,
    controller_config,
    toml_of,
)
from spotjax.bootstrap.kubernetes.options import KubernetesOptions
from spotjax.bootstrap.kubernetes.pods import (
    ZONE_LABEL,
    Manifest,
    container,
    gone_nodes,
    health_command,
    labels,
    metadata,
    shared_volumes,
    template,
    volume,
)
from spotjax.bootstrap.kubernetes.termination import termination_seconds

FLUSH_SECONDS = 2.0
"""That a server may take beyond ``drain_seconds``, as in ``spotjax.serve``, which is above this."""
NODE_LOST_SECONDS = 30
"""Without an answer from its node, after which the controller is wanted elsewhere."""
PORTS = {"grpc": GRPC_PORT, "http": HTTP_PORT, "data": DATA_PORT}


def controller(options: KubernetesOptions) -> list[Manifest]:
    """Volume, Deployment and Services."""
    return [
        _claim(options),
        _deployment(options),
        _service(options, "spotjax", ["grpc", "http"]),
        _service(options, CONTROLLER_SERVICE, ["grpc", "data"]),
    ]


def _claim(options: KubernetesOptions) -> Manifest:
    spec: Manifest = {
        "accessModes": [options.kind.access_mode],
        "resources": {"requests": {"storage": f"{options.log_gib}Gi"}},
    }
    if options.storage_class:
        spec["storageClassName"] = options.storage_class
    name = metadata(options, "spotjax-log", "controller")
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": name, "spec": spec}


def _deployment(options: KubernetesOptions) -> Manifest:
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata(options, "spotjax-controller", "controller"),
        "spec": {
            "replicas": 1,
            "strategy": {"type": "Recreate"},  # two at once would want the same log
            "selector": {"matchLabels": labels("controller")},
            "template": _pod(options),
        },
    }


def _pod(options: KubernetesOptions) -> Manifest:
    claim = {"persistentVolumeClaim": {"claimName": "spotjax-log"}}
    volumes = [
        volume("log", STATE, claim),
        *shared_volumes(options, options.controller_tls_secret, ("join-token", "keys.toml")),
    ]
    memory = f"{options.controller_memory_gib}Gi"
    resources = {"requests": {"cpu": str(options.controller_cpus), "memory": memory}, "limits": {"memory": memory}}
    one = container(options, "controller", resources=resources, env=[], mounts=[mount for _, mount in volumes])
    one["ports"] = [{"name": name, "containerPort": port} for name, port in PORTS.items()]
    one |= _probes(options)
    if options.pre_stop_seconds:
        one["lifecycle"] = {"preStop": {"sleep": {"seconds": options.pre_stop_seconds}}}
    return template(
        options,
        labels("controller"),
        toml_of(controller_config(options)),
        container=one,
        volumes=[source for source, _ in volumes],
        termination=termination_seconds(options.pre_stop_seconds, options.drain_seconds + FLUSH_SECONDS),
        scheduling=_scheduling(options),
        annotations={"cluster-autoscaler.kubernetes.io/safe-to-evict": "false", **_scraping(options)},
    )


def _scraping(options: KubernetesOptions) -> dict[str, str]:
    """What Prometheus' customary configuration for pods looks for."""
    where = {"port": str(HTTP_PORT), "path": "/metrics", "scheme": "https" if options.tls else "http"}
    return {"prometheus.io/scrape": "true"} | {f"prometheus.io/{name}": value for name, value in where.items()}


def _probes(options: KubernetesOptions) -> Manifest:
    """It answers before it has a model, so starting is quick. Not being ready restarts nothing."""
    alive, ready = _health(options, "liveness"), _health(options, "readiness")
    return {
        "startupProbe": {**alive, "periodSeconds": 2, "timeoutSeconds": 5, "failureThreshold": 60},
        "readinessProbe": {**ready, "periodSeconds": 5, "timeoutSeconds": 5},
        "livenessProbe": {**alive, "periodSeconds": 10, "timeoutSeconds": 5, "failureThreshold": 6},
    }


def _health(options: KubernetesOptions, service: str) -> Manifest:
    """The kubelet's own gRPC probes know no TLS."""
    if options.tls:
        return health_command("controller", *(["--alive"] if service == "liveness" else []))
    return {"grpc": {"port": GRPC_PORT, "service": service}}


def _scheduling(options: KubernetesOptions) -> Manifest:
    on_demand = [{"key": key, "operator": "NotIn", "values": [value]} for key, value in SPOT_LABELS]
    nodes = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [{"matchExpressions": on_demand}]}}
    scheduling: dict[str, Any] = {"affinity": {"nodeAffinity": nodes}, "tolerations": gone_nodes(NODE_LOST_SECONDS)}
    if options.zone:
        scheduling["nodeSelector"] = {ZONE_LABEL: options.zone}
    if options.priority_class:
        scheduling["priorityClassName"] = options.priority_class
    return scheduling


def _service(options: KubernetesOptions, name: str, ports: list[str]) -> Manifest:
    """Leads to the controller whether it is ready or not: it waits for workers, and requests wait for a mesh."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(options, name, "controller"),
        "spec": {
            "type": "ClusterIP",
            "selector": labels("controller"),
            "publishNotReadyAddresses": True,
            "ports": [{"name": port, "port": PORTS[port], "targetPort": port} for port in ports],
        },
    }
