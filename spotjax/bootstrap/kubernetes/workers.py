"""The workers: pods on spot nodes, each an instance, or a StatefulSet for each TPU slice of several hosts.

Workers of one host are a Deployment, which replaces a pod as soon as its node is lost; a StatefulSet would wait until
the node is known to be gone. Hosts of a slice have numbers and are lost together, so they are a StatefulSet. It is no
JobSet: a slice that left after a notice ends with 0, which a Job takes for done.
"""

from __future__ import annotations

from typing import Any

from spotjax.bootstrap.kubernetes.configuration import (
    COORDINATOR_PORT,
    DATA_PORT,
    SHARED_MEMORY,
    SLICE_SERVICE,
    toml_of,
    worker_config,
)
from spotjax.bootstrap.kubernetes.options import KubernetesOptions
from spotjax.bootstrap.kubernetes.pods import (
    POD_INDEX_LABEL,
    SLICE_LABEL,
    ZONE_LABEL,
    Manifest,
    container,
    empty_directory,
    from_field,
    gone_nodes,
    health_command,
    labels,
    metadata,
    shared_volumes,
    template,
    volume,
)
from spotjax.bootstrap.kubernetes.termination import termination_seconds

NODE_LOST_SECONDS = 10
"""Without an answer from its node, after which another worker is wanted; the fleet went on without it long before."""


def workers(options: KubernetesOptions) -> list[Manifest]:
    """Deployment or StatefulSets, with what belongs to them."""
    if options.hosts == 1:
        return [_deployment(options), _disruption_budget(options)]
    names = [f"slice-{number}" for number in range(options.workers)]
    return [_slice_service(options), *(_slice(options, name) for name in names), _disruption_budget(options)]


def _deployment(options: KubernetesOptions) -> Manifest:
    env = [from_field("SPOTJAX_NAME", "metadata.name"), *_address(options)]
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata(options, "spotjax-worker", "worker"),
        "spec": {
            "replicas": options.workers,
            # one after the other, on the nodes that there are
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}},
            "selector": {"matchLabels": labels("worker")},
            "template": _pod(options, labels("worker"), env, {"topologySpreadConstraints": _spread(options)}),
        },
    }


def _slice(options: KubernetesOptions, name: str) -> Manifest:
    own = labels("worker", **{SLICE_LABEL: name})
    hosts = ",".join(f"spotjax-{name}-{host}.{SLICE_SERVICE}" for host in range(options.hosts))
    index = f"metadata.labels['{POD_INDEX_LABEL}']"
    env = [
        {"name": "SPOTJAX_NAME", "value": name},
        from_field("SPOTJAX_SLICE_HOST", index),
        {"name": "SPOTJAX_SLICE_COORDINATOR", "value": f"spotjax-{name}-0.{SLICE_SERVICE}:{COORDINATOR_PORT}"},
        # how libtpu finds the hosts of its slice
        from_field("TPU_WORKER_ID", index),
        {"name": "TPU_WORKER_HOSTNAMES", "value": hosts},
        *_address(options),
    ]
    meta = metadata(options, f"spotjax-{name}", "worker")
    meta["labels"] = own
    return {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": meta,
        "spec": {
            "replicas": options.hosts,
            "serviceName": SLICE_SERVICE,
            "podManagementPolicy": "Parallel",
            # hosts of two versions could not be one slice: whoever updates deletes all pods of a slice at once
            "updateStrategy": {"type": "OnDelete"},
            "selector": {"matchLabels": own},
            "template": _pod(options, own, env, {"affinity": _slice_affinity(options, name)}),
        },
    }


def _pod(options: KubernetesOptions, pod_labels: dict[str, str], env: list[Manifest], scheduling: Manifest) -> Manifest:
    """A pod of a worker.

    SIGTERM is its notice to the fleet, so it has no preStop hook, which would only take from the time. It has no
    liveness probe: the controller's lease and the worker's watchdog end what hangs.
    """
    memory = volume("shared-memory", SHARED_MEMORY, empty_directory(options.shared_memory_gib, "Memory"))
    volumes = [memory, *shared_volumes(options, options.worker_tls_secret, ("join-token",))]
    config = worker_config(options)
    one = container(options, "worker", resources=_resources(options), env=env, mounts=[mount for _, mount in volumes])
    one["ports"] = [{"name": "data", "containerPort": DATA_PORT}]
    one["readinessProbe"] = {**health_command("worker"), "periodSeconds": 15, "timeoutSeconds": 10}
    placed = _nodes(options)
    affinity = placed.pop("affinity", {}) | scheduling.pop("affinity", {})
    if affinity:
        placed["affinity"] = affinity
    return template(
        options,
        pod_labels,
        toml_of(config),
        container=one,
        volumes=[source for source, _ in volumes],
        termination=termination_seconds(0, config.grace_seconds),
        scheduling={**placed, **scheduling},
    )


def _address(options: KubernetesOptions) -> list[Manifest]:
    """Where others reach the pod; its zone too, which a pod knows since Kubernetes 1.35 and is empty before."""
    zone = [] if options.zone else [from_field("SPOTJAX_ZONE", f"metadata.labels['{ZONE_LABEL}']")]
    return [from_field("SPOTJAX_ADVERTISE", "status.podIP"), *zone]


def _resources(options: KubernetesOptions) -> Manifest:
    """Without a limit for CPU, which would only slow down who has the node to itself."""
    limits: dict[str, Any] = {"memory": f"{options.memory_gib}Gi"}
    if options.kind.resource:
        limits[options.kind.resource] = str(options.devices)
    return {"requests": {"cpu": str(options.cpus), **limits}, "limits": limits}


def _nodes(options: KubernetesOptions) -> Manifest:
    """Spot nodes with the accelerator."""
    kind = options.kind
    selector = {
        label: value
        for label, value in (
            (kind.accelerator_label, options.accelerator),
            (kind.topology_label, options.topology),
            (ZONE_LABEL, options.zone),
        )
        if label and value
    }
    placed: Manifest = {"tolerations": [*map(dict, kind.tolerations), *gone_nodes(NODE_LOST_SECONDS)]}
    if selector:
        placed["nodeSelector"] = selector
    if kind.spot_labels:
        terms = [
            {"matchExpressions": [{"key": key, "operator": "In", "values": [value]}]} for key, value in kind.spot_labels
        ]
        required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}
        placed["affinity"] = {"nodeAffinity": required}
    return placed


def _spread(options: KubernetesOptions) -> list[Manifest]:
    """Over nodes, and over zones unless all are to be in one: zones lose their spot machines one at a time."""
    keys = ["kubernetes.io/hostname"] + ([] if options.zone else [ZONE_LABEL])
    selector = {"matchLabels": labels("worker")}
    return [
        {"maxSkew": 1, "topologyKey": key, "whenUnsatisfiable": "ScheduleAnyway", "labelSelector": selector}
        for key in keys
    ]


def _slice_affinity(options: KubernetesOptions, name: str) -> Manifest:
    """All hosts of a slice on one node pool, which no other slice has: a node pool is a slice of TPUs."""
    key = options.kind.node_pool_label
    with_us = {"matchLabels": labels("worker", **{SLICE_LABEL: name})}
    others = {
        "matchLabels": labels("worker"),
        "matchExpressions": [{"key": SLICE_LABEL, "operator": "NotIn", "values": [name]}],
    }
    rule = "requiredDuringSchedulingIgnoredDuringExecution"
    return {
        "podAffinity": {rule: [{"topologyKey": key, "labelSelector": with_us}]},
        "podAntiAffinity": {rule: [{"topologyKey": key, "labelSelector": others}]},
    }


def _slice_service(options: KubernetesOptions) -> Manifest:
    """Names for the hosts of slices, which meet before they are ready."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(options, SLICE_SERVICE, "worker"),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": labels("worker"),
            "ports": [
                {"name": "data", "port": DATA_PORT, "targetPort": "data"},
                {"name": "coordinator", "port": COORDINATOR_PORT},
            ],
        },
    }


def _disruption_budget(options: KubernetesOptions) -> Manifest:
    """Whoever empties nodes takes one worker at a time; one that is not in the fleet has nothing to lose."""
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": metadata(options, "spotjax-worker", "worker"),
        "spec": {
            "maxUnavailable": 1,
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
            "selector": {"matchLabels": labels("worker")},
        },
    }
