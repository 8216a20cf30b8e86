"""What all pods have in common: labels, an unprivileged user, a read-only root, and volumes where Spotjax writes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from spotjax.bootstrap.kubernetes.configuration import ACCESS, CACHE, CERTIFICATES, MODELS, SETTINGS, TEMPORARY
from spotjax.bootstrap.kubernetes.options import KubernetesOptions

Manifest = dict[str, Any]

USER = 10001
"""Of the image; files in volumes belong to the group of the same number."""
NAME_LABEL, COMPONENT_LABEL = "app.kubernetes.io/name", "app.kubernetes.io/component"
SLICE_LABEL, CLIENT_LABEL = "spotjax/slice", "spotjax/client"
POD_INDEX_LABEL = "apps.kubernetes.io/pod-index"
ZONE_LABEL = "topology.kubernetes.io/zone"


def labels(component: str, **others: str) -> dict[str, str]:
    """Of the objects of one component, ``controller`` or ``worker``."""
    return {NAME_LABEL: "spotjax", COMPONENT_LABEL: component, **others}


def metadata(options: KubernetesOptions, name: str, component: str) -> Manifest:
    """Of an object in the namespace."""
    return {"name": name, "namespace": options.namespace, "labels": labels(component)}


def from_field(variable: str, path: str) -> Manifest:
    """A variable with something of its own pod."""
    return {"name": variable, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def volume(name: str, path: str, source: Mapping[str, Any], read_only: bool = False) -> tuple[Manifest, Manifest]:
    """A volume of a pod and its mount in the container."""
    mount = {"name": name, "mountPath": path} | ({"readOnly": True} if read_only else {})
    return {"name": name, **source}, mount


def empty_directory(size_gib: int, medium: str = "") -> Manifest:
    """A source that begins empty with the pod and outlives its containers; ``Memory`` counts towards their limit."""
    return {"emptyDir": {"sizeLimit": f"{size_gib}Gi"} | ({"medium": medium} if medium else {})}


def shared_volumes(options: KubernetesOptions, secret: str, access: Sequence[str]) -> list[tuple[Manifest, Manifest]]:
    """Volumes of controller and workers alike.

    Args:
      options: of the deployment.
      secret: with the certificate, if there are certificates.
      access: which files of the secret for access a pod gets.
    """
    volumes = [
        volume("settings", SETTINGS, {"configMap": {"name": "spotjax-settings"}}, read_only=True),
        volume("temporary", TEMPORARY, empty_directory(1)),
        volume("cache", CACHE, empty_directory(options.cache_gib)),
    ]
    if options.model_claim:
        claim = {"persistentVolumeClaim": {"claimName": options.model_claim, "readOnly": True}}
        volumes.append(volume("models", MODELS, claim, read_only=True))
    if options.access_secret:
        items = [{"key": name, "path": name} for name in access]
        kept = {"secret": {"secretName": options.access_secret, "defaultMode": 0o440, "items": items}}
        volumes.append(volume("access", ACCESS, kept, read_only=True))
    if options.tls:
        certificate = {"secret": {"secretName": secret, "defaultMode": 0o440}}
        volumes.append(volume("certificates", CERTIFICATES, certificate, read_only=True))
    return volumes


def environment(options: KubernetesOptions) -> list[Manifest]:
    """Variables of all containers. Its home is where libraries put their caches."""
    variables: list[Manifest] = [{"name": "SPOTJAX_CACHE", "value": CACHE}, {"name": "HOME", "value": CACHE}]
    if options.hub_token_secret:
        token = {"name": options.hub_token_secret, "key": "token"}
        variables.append({"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": token}})
    return variables


def container(
    options: KubernetesOptions,
    component: str,
    *,
    resources: Mapping[str, Any],
    env: Sequence[Manifest],
    mounts: Sequence[Manifest],
) -> Manifest:
    """The only container of a pod, without ports and probes."""
    return {
        "name": component,
        "image": options.image,
        "command": ["spotjax", "serve", "--config", settings_file(component)],
        "env": [*environment(options), *env],
        "resources": dict(resources),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": list(mounts),
    }


def template(
    options: KubernetesOptions,
    pod_labels: Mapping[str, str],
    settings: str,
    *,
    container: Manifest,
    volumes: Sequence[Manifest],
    termination: int,
    scheduling: Mapping[str, Any],
    annotations: Mapping[str, str] | None = None,
) -> Manifest:
    """A pod.

    Args:
      options: of the deployment.
      pod_labels: of the pod.
      settings: text of its settings; a change of them makes other pods.
      container: in it.
      volumes: of it.
      termination: seconds from its deletion to SIGKILL.
      scheduling: fields of the spec that say where it goes.
      annotations: of the pod.
    """
    digest = hashlib.sha256(settings.encode()).hexdigest()[:16]
    return {
        "metadata": {"labels": dict(pod_labels), "annotations": {"spotjax/settings": digest, **(annotations or {})}},
        "spec": {
            "serviceAccountName": "spotjax",
            "automountServiceAccountToken": False,
            # variables for services would begin like those of settings, and be refused as unknown ones
            "enableServiceLinks": False,
            "terminationGracePeriodSeconds": termination,
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": USER,
                "runAsGroup": USER,
                "fsGroup": USER,
                "fsGroupChangePolicy": "OnRootMismatch",
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            **scheduling,
            "containers": [container],
            "volumes": list(volumes),
        },
    }


def gone_nodes(seconds: int) -> list[Manifest]:
    """Lets a pod go from a node that does not answer after so long, not after five minutes."""
    return [
        {
            "key": f"node.kubernetes.io/{state}",
            "operator": "Exists",
            "effect": "NoExecute",
            "tolerationSeconds": seconds,
        }
        for state in ("not-ready", "unreachable")
    ]


def settings_file(component: str) -> str:
    """Path of the settings of ``controller`` or ``worker``."""
    return f"{SETTINGS}/{component}.toml"


def health_command(component: str, *flags: str) -> Manifest:
    """A probe by command, with the settings of the container that it is run in."""
    return {"exec": {"command": ["spotjax", "health", "--config", settings_file(component), *flags]}}
