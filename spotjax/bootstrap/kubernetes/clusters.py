"""What differs between clusters: how spot nodes and accelerators are labelled, tainted and asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SPOT_LABELS = (
    ("cloud.google.com/gke-spot", "true"),
    ("eks.amazonaws.com/capacityType", "SPOT"),
    ("karpenter.sh/capacity-type", "spot"),
    ("kubernetes.azure.com/scalesetpriority", "spot"),
)
"""Labels of nodes that can be taken away, on all clouds: the controller stays off them."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """A kind of cluster.

    Attributes:
      resource: how pods ask for accelerators; empty where workers compute on CPUs.
      spot_labels: of nodes that can be taken away; one of them is enough. Empty: workers go anywhere.
      accelerator_label: of nodes, with the kind of accelerator or machine as its value; empty where there is none.
      topology_label: of nodes, with the shape of their TPU slice; empty elsewhere.
      node_pool_label: of nodes, the same for all hosts of one TPU slice; empty elsewhere.
      tolerations: of taints that spot nodes and nodes with accelerators have.
      notice_seconds: between SIGTERM and SIGKILL of a pod when its node is taken away.
      access_mode: of the controller's volume.
    """

    resource: str
    spot_labels: tuple[tuple[str, str], ...]
    accelerator_label: str
    tolerations: tuple[Mapping[str, Any], ...]
    notice_seconds: float
    topology_label: str = ""
    node_pool_label: str = ""
    access_mode: str = "ReadWriteOncePod"


def tainted(key: str, value: str = "") -> Mapping[str, Any]:
    """Tolerates a taint that keeps other pods away, with that value or any."""
    with_value = {"operator": "Equal", "value": value} if value else {"operator": "Exists"}
    return {"key": key, **with_value, "effect": "NoSchedule"}


GKE_SPOT = (SPOT_LABELS[0],)
GKE_NOTICE_SECONDS = 15.0
"""Of the 30 s that GKE has, what is left for pods that are not critical to the system."""

CLUSTERS: Mapping[str, Cluster] = {
    "local": Cluster("", (), "", (), 30.0, access_mode="ReadWriteOnce"),  # what comes with kind and minikube
    "gke-gpu": Cluster(
        "nvidia.com/gpu",
        GKE_SPOT,
        "cloud.google.com/gke-accelerator",
        (tainted("cloud.google.com/gke-spot", "true"), tainted("nvidia.com/gpu")),
        GKE_NOTICE_SECONDS,
    ),
    "gke-tpu": Cluster(
        "google.com/tpu",
        GKE_SPOT,
        "cloud.google.com/gke-tpu-accelerator",
        (tainted("cloud.google.com/gke-spot", "true"), tainted("google.com/tpu")),
        GKE_NOTICE_SECONDS,
        topology_label="cloud.google.com/gke-tpu-topology",
        node_pool_label="cloud.google.com/gke-nodepool",
    ),
    "eks": Cluster(
        "nvidia.com/gpu",
        (SPOT_LABELS[1], SPOT_LABELS[2]),
        "node.kubernetes.io/instance-type",
        (tainted("nvidia.com/gpu"),),
        90.0,  # of two minutes, with something in the cluster that drains nodes when AWS announces
    ),
    "aks": Cluster(
        "nvidia.com/gpu",
        (SPOT_LABELS[3],),
        "node.kubernetes.io/instance-type",
        (tainted("kubernetes.azure.com/scalesetpriority", "spot"), tainted("nvidia.com/gpu"), tainted("sku", "gpu")),
        25.0,  # of 30 s, the same
    ),
}
