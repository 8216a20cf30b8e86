"""Deployments of every kind, and ways into their manifests."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import yaml

from spotjax.bootstrap.kubernetes.manifests import render
from spotjax.bootstrap.kubernetes.options import KubernetesOptions

Manifest = dict[str, Any]
IMAGE = "registry.example:5000/spotjax:0.1.0"
TLS = {"controller_tls_secret": "controller-tls", "worker_tls_secret": "worker-tls"}
GPUS: dict[str, Any] = {"image": IMAGE, "devices": 2, "cpus": 8, "memory_gib": 64, "shared_memory_gib": 32}
TPUS: dict[str, Any] = {"image": IMAGE, "cluster": "gke-tpu", "accelerator": "tpu-v5-lite-podslice", "devices": 4}

DEPLOYMENTS = {
    "local": KubernetesOptions(cluster="local", image=IMAGE),
    "gke-gpu": KubernetesOptions(cluster="gke-gpu", accelerator="nvidia-l4", zone="europe-west4-a", **GPUS),
    "gke-tpu": KubernetesOptions(topology="2x2", **TPUS),
    "gke-tpu-slices": KubernetesOptions(topology="4x4", workers=3, **TLS, **TPUS),
    "eks": KubernetesOptions(cluster="eks", accelerator="g6.12xlarge", hub_token_secret="hub", **GPUS),
    "aks": KubernetesOptions(
        cluster="aks", accelerator="Standard_NC48ads_A100_v4", model="/models/llama", model_claim="models",
        settings={"max_batch": 8, "kv_backup": False, "attention": "gpu", "log_level": "debug"}, **TLS, **GPUS,
    ),
    "proxied": KubernetesOptions(
        cluster="local", image=IMAGE, pre_stop_seconds=15, drain_seconds=60, priority_class="high", notice_seconds=20.5,
        storage_class="fast",
    ),
}  # fmt: skip


def applied(options: KubernetesOptions) -> list[Manifest]:
    """What a cluster would read."""
    return list(yaml.load_all(render(options), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))


@functools.cache
def deployment(name: str) -> list[Manifest]:
    """That of a name in ``DEPLOYMENTS``; not to be changed."""
    return applied(DEPLOYMENTS[name])


def of_kind(manifests: list[Manifest], kind: str) -> list[Manifest]:
    """Manifests of one kind."""
    return [manifest for manifest in manifests if manifest["kind"] == kind]


def pods(manifests: list[Manifest]) -> Iterator[tuple[Manifest, Manifest]]:
    """Every template of pods, with the manifest that it is in."""
    for manifest in manifests:
        if "template" in manifest.get("spec", {}):
            yield manifest, manifest["spec"]["template"]


def container_of(template: Manifest) -> Manifest:
    """The only container of a pod."""
    (container,) = template["spec"]["containers"]
    return container


def selects(selector: Manifest, labels: Manifest) -> bool:
    """Whether a selector with ``matchLabels`` and ``NotIn`` means something with these labels."""
    if set(selector) - {"matchLabels", "matchExpressions"}:
        raise ValueError(f"not understood: {selector}")
    for expression in selector.get("matchExpressions", ()):
        if expression["operator"] != "NotIn":
            raise ValueError(f"not understood: {expression}")
        if labels.get(expression["key"]) in expression["values"]:
            return False
    return selector.get("matchLabels", {}).items() <= labels.items()
