"""All manifests of a deployment, in the order in which they are applied, and their text."""

from __future__ import annotations

from typing import Any

import yaml

from spotjax.bootstrap.kubernetes.access import account, namespace, network_policies
from spotjax.bootstrap.kubernetes.configuration import controller_config, toml_of, worker_config
from spotjax.bootstrap.kubernetes.controller import controller
from spotjax.bootstrap.kubernetes.options import KubernetesOptions
from spotjax.bootstrap.kubernetes.pods import NAME_LABEL, Manifest
from spotjax.bootstrap.kubernetes.workers import workers


def render(options: KubernetesOptions) -> str:
    """YAML for ``kubectl apply -f``.

    Raises:
      ConfigError: settings contradict each other.
    """
    return str(yaml.dump_all(manifests(options), Dumper=_Plain, sort_keys=False, width=120))


def manifests(options: KubernetesOptions) -> list[Manifest]:
    """The same as data.

    Raises:
      ConfigError: settings contradict each other.
    """
    return [
        namespace(options),
        account(options),
        settings(options),
        *network_policies(options),
        *controller(options),
        *workers(options),
    ]


def settings(options: KubernetesOptions) -> Manifest:
    """The files that controller and workers are started with."""
    files = {"controller.toml": toml_of(controller_config(options)), "worker.toml": toml_of(worker_config(options))}
    meta = {"name": "spotjax-settings", "namespace": options.namespace, "labels": {NAME_LABEL: "spotjax"}}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": files}


class _Plain(yaml.SafeDumper):  # type: ignore[misc]  # it has no types
    """Writes what is there twice twice, and text of several lines as such."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _text(dumper: _Plain, text: str) -> Any:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Plain.add_representer(str, _text)
