"""Who may do what: the namespace, an account without rights, and which pods may speak to which."""

from __future__ import annotations

from spotjax.bootstrap.kubernetes.configuration import DATA_PORT, GRPC_PORT, HTTP_PORT
from spotjax.bootstrap.kubernetes.options import KubernetesOptions
from spotjax.bootstrap.kubernetes.pods import CLIENT_LABEL, NAME_LABEL, SLICE_LABEL, Manifest, labels, metadata


def namespace(options: KubernetesOptions) -> Manifest:
    """The namespace, in which only pods without privileges may be."""
    meta = {
        "name": options.namespace,
        "labels": {NAME_LABEL: "spotjax", "pod-security.kubernetes.io/enforce": "restricted"},
    }
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": meta}


def account(options: KubernetesOptions) -> Manifest:
    """The account of all pods; they do not speak to Kubernetes, so they get no token."""
    meta = {"name": "spotjax", "namespace": options.namespace, "labels": {NAME_LABEL: "spotjax"}}
    return {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": meta, "automountServiceAccountToken": False}


def network_policies(options: KubernetesOptions) -> list[Manifest]:
    """What may come in; what goes out is free, for model hubs and metadata servers.

    Clients are pods with the client label in the namespace, and all pods of namespaces with it. Hosts of one slice may
    use all ports between them: those of libtpu are not listed anywhere.
    """
    of_workers, of_controller = _pods("worker"), _pods("controller")
    client = {"matchLabels": {CLIENT_LABEL: "true"}}
    from_clients = [{"podSelector": client}, {"namespaceSelector": client}]
    policies = [
        _policy(
            options,
            "controller",
            [
                _rule([of_workers, *from_clients], GRPC_PORT),
                _rule(from_clients, HTTP_PORT),
                _rule([of_workers], DATA_PORT),
            ],
        ),
        _policy(options, "worker", [_rule([of_controller, of_workers], DATA_PORT)]),
    ]
    if options.hosts > 1:
        policies += [_slice_policy(options, f"slice-{number}") for number in range(options.workers)]
    return policies


def _slice_policy(options: KubernetesOptions, name: str) -> Manifest:
    hosts = {"matchLabels": labels("worker", **{SLICE_LABEL: name})}
    policy = _policy(options, "worker", [{"from": [{"podSelector": hosts}]}])
    policy["metadata"]["name"] = f"spotjax-{name}"
    policy["spec"]["podSelector"] = hosts
    return policy


def _policy(options: KubernetesOptions, component: str, ingress: list[Manifest]) -> Manifest:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": metadata(options, f"spotjax-{component}", component),
        "spec": {"podSelector": {"matchLabels": labels(component)}, "policyTypes": ["Ingress"], "ingress": ingress},
    }


def _rule(sources: list[Manifest], port: int) -> Manifest:
    return {"from": sources, "ports": [{"protocol": "TCP", "port": port}]}


def _pods(component: str) -> Manifest:
    return {"podSelector": {"matchLabels": labels(component)}}
