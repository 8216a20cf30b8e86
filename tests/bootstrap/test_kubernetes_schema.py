"""Every manifest is what the API servers of several versions of Kubernetes take, without a field unknown to them."""

from __future__ import annotations

import copy

import kubernetes_validate
import pytest
from kubernetes_cases import DEPLOYMENTS, Manifest, deployment

VERSIONS = ("1.32", "1.37")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_every_manifest_is_valid(name: str, version: str) -> None:
    for manifest in deployment(name):
        kubernetes_validate.validate(manifest, version, strict=True)


def test_unknown_fields_and_wrong_types_are_found() -> None:
    one = next(m for m in deployment("local") if m["kind"] == "Deployment")

    def spoiled(**fields: object) -> Manifest:
        wrong = copy.deepcopy(one)
        wrong["spec"]["template"]["spec"].update(fields)
        return wrong

    for wrong in (spoiled(terminationGracePeriod=5), spoiled(terminationGracePeriodSeconds="5"), spoiled(containers=0)):
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(wrong, VERSIONS[0], strict=True)
