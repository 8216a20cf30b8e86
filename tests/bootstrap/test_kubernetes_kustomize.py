"""The manifests as Kubernetes' own tool reads them, and as it patches them for who wants something else."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from kubernetes_cases import DEPLOYMENTS, Manifest, deployment

from spotjax.bootstrap.kubernetes.manifests import render

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl, but no cluster")


def built(directory: Path, name: str, patches: str = "") -> dict[tuple[str, str], Manifest]:
    """What ``kubectl kustomize`` makes of a deployment, by kind and name."""
    (directory / "spotjax.yaml").write_text(render(DEPLOYMENTS[name]))
    (directory / "kustomization.yaml").write_text(f"resources: [spotjax.yaml]\n{patches}")
    done = subprocess.run(["kubectl", "kustomize", str(directory)], capture_output=True, text=True, check=True)
    return {key_of(manifest): manifest for manifest in yaml.safe_load_all(done.stdout)}


def key_of(manifest: Manifest) -> tuple[str, str]:
    return manifest["kind"], manifest["metadata"]["name"]


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_what_is_read_is_what_was_written(tmp_path: Path, name: str) -> None:
    assert built(tmp_path, name) == {key_of(manifest): manifest for manifest in deployment(name)}


def test_what_is_no_option_can_be_patched(tmp_path: Path) -> None:
    patch = '[{"op": "replace", "path": "/spec/type", "value": "LoadBalancer"}]'
    patches = f"patches:\n- target: {{kind: Service, name: ^spotjax$}}\n  patch: '{patch}'\n"
    found = built(tmp_path, "local", patches)
    assert found["Service", "spotjax"]["spec"]["type"] == "LoadBalancer"
    assert found["Service", "spotjax-controller"]["spec"]["type"] == "ClusterIP"
