"""All manifests of a deployment, in the order in which they are applied, and their text."""

from __future__ import annotations

from typing import Any

import yaml

from spotjax.deploy.kubernetes.access import account, namespace, network_policies
from spotjax.deploy.kubernetes.configuration import controller_config, toml_of, worker_config
from spotjax.deploy.kubernetes.controller import controller
from spotjax.deploy.kubernetes.pods import NAME_LABEL, Manifest
from spotjax.deploy.kubernetes.values import Values
from spotjax.deploy.kubernetes.workers import workers


def render(values: Values) -> str:
    """YAML for ``kubectl apply -f``.

    Raises:
      ConfigError: settings contradict each other.
    """
    return str(yaml.dump_all(manifests(values), Dumper=_Plain, sort_keys=False, width=120))


def manifests(values: Values) -> list[Manifest]:
    """The same as data.

    Raises:
      ConfigError: settings contradict each other.
    """
    return [
        namespace(values),
        account(values),
        settings(values),
        *network_policies(values),
        *controller(values),
        *workers(values),
    ]


def settings(values: Values) -> Manifest:
    """The files that controller and workers are started with."""
    files = {"controller.toml": toml_of(controller_config(values)), "worker.toml": toml_of(worker_config(values))}
    meta = {"name": "spotjax-settings", "namespace": values.namespace, "labels": {NAME_LABEL: "spotjax"}}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": files}


class _Plain(yaml.SafeDumper):  # type: ignore[misc]  # it has no types
    """Writes what is there twice twice, and text of several lines as such."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _text(dumper: _Plain, text: str) -> Any:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Plain.add_representer(str, _text)
