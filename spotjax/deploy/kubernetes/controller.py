"""The controller: one pod on a node that is not taken away, its volume with the commit log, and its two Services."""

from __future__ import annotations

from typing import Any

from spotjax.deploy.kubernetes.configuration import (
    CONTROLLER_SERVICE,
    DATA_PORT,
    GRPC_PORT,
    STATE,
    controller_config,
    toml_of,
)
from spotjax.deploy.kubernetes.platforms import SPOT_LABELS
from spotjax.deploy.kubernetes.pods import (
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
from spotjax.deploy.kubernetes.termination import termination_seconds
from spotjax.deploy.kubernetes.values import Values
from spotjax.serve import FLUSH_SECONDS

NODE_LOST_SECONDS = 30
"""Without an answer from its node, after which the controller is wanted elsewhere."""
PORTS = {"grpc": GRPC_PORT, "data": DATA_PORT}


def controller(values: Values) -> list[Manifest]:
    """Volume, Deployment and Services."""
    return [
        _claim(values),
        _deployment(values),
        _service(values, "spotjax", ["grpc"]),
        _service(values, CONTROLLER_SERVICE, ["grpc", "data"]),
    ]


def _claim(values: Values) -> Manifest:
    spec: Manifest = {
        "accessModes": [values.kind.access_mode],
        "resources": {"requests": {"storage": f"{values.log_gib}Gi"}},
    }
    if values.storage_class:
        spec["storageClassName"] = values.storage_class
    name = metadata(values, "spotjax-log", "controller")
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": name, "spec": spec}


def _deployment(values: Values) -> Manifest:
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata(values, "spotjax-controller", "controller"),
        "spec": {
            "replicas": 1,
            "strategy": {"type": "Recreate"},  # two at once would want the same log
            "selector": {"matchLabels": labels("controller")},
            "template": _pod(values),
        },
    }


def _pod(values: Values) -> Manifest:
    claim = {"persistentVolumeClaim": {"claimName": "spotjax-log"}}
    volumes = [volume("log", STATE, claim), *shared_volumes(values, values.controller_tls_secret)]
    memory = f"{values.controller_memory_gib}Gi"
    resources = {"requests": {"cpu": str(values.controller_cpus), "memory": memory}, "limits": {"memory": memory}}
    one = container(values, "controller", resources=resources, env=[], mounts=[mount for _, mount in volumes])
    one["ports"] = [{"name": name, "containerPort": port} for name, port in PORTS.items()]
    one |= _probes(values)
    if values.pre_stop_seconds:
        one["lifecycle"] = {"preStop": {"sleep": {"seconds": values.pre_stop_seconds}}}
    return template(
        values,
        labels("controller"),
        toml_of(controller_config(values)),
        container=one,
        volumes=[source for source, _ in volumes],
        termination=termination_seconds(values.pre_stop_seconds, values.drain_seconds + FLUSH_SECONDS),
        scheduling=_scheduling(values),
        annotations={"cluster-autoscaler.kubernetes.io/safe-to-evict": "false"},
    )


def _probes(values: Values) -> Manifest:
    """It answers before it has a model, so starting is quick. Not being ready restarts nothing."""
    alive, ready = _health(values, "liveness"), _health(values, "readiness")
    return {
        "startupProbe": {**alive, "periodSeconds": 2, "timeoutSeconds": 5, "failureThreshold": 60},
        "readinessProbe": {**ready, "periodSeconds": 5, "timeoutSeconds": 5},
        "livenessProbe": {**alive, "periodSeconds": 10, "timeoutSeconds": 5, "failureThreshold": 6},
    }


def _health(values: Values, service: str) -> Manifest:
    """The kubelet's own gRPC probes know no TLS."""
    if values.tls:
        return health_command("controller", *(["--alive"] if service == "liveness" else []))
    return {"grpc": {"port": GRPC_PORT, "service": service}}


def _scheduling(values: Values) -> Manifest:
    on_demand = [{"key": key, "operator": "NotIn", "values": [value]} for key, value in SPOT_LABELS]
    nodes = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [{"matchExpressions": on_demand}]}}
    scheduling: dict[str, Any] = {"affinity": {"nodeAffinity": nodes}, "tolerations": gone_nodes(NODE_LOST_SECONDS)}
    if values.zone:
        scheduling["nodeSelector"] = {ZONE_LABEL: values.zone}
    if values.priority_class:
        scheduling["priorityClassName"] = values.priority_class
    return scheduling


def _service(values: Values, name: str, ports: list[str]) -> Manifest:
    """Leads to the controller whether it is ready or not: it waits for workers, and requests wait for a mesh."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(values, name, "controller"),
        "spec": {
            "type": "ClusterIP",
            "selector": labels("controller"),
            "publishNotReadyAddresses": True,
            "ports": [{"name": port, "port": PORTS[port], "targetPort": port} for port in ports],
        },
    }
