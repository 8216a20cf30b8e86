"""What a new TPU slice is asked for as. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from google.cloud.tpu_v2 import (
    AcceleratorConfig,
    CreateQueuedResourceRequest,
    NetworkConfig,
    Node,
    QueuedResource,
    SchedulingConfig,
    ServiceAccount,
)
from google.protobuf.duration_pb2 import Duration

from spotjax.errors import ProviderRefused
from spotjax.fleet.providers.tpu_config import Script, TpuConfig, TpuOffer
from spotjax.fleet.providers.tpu_machines import id_of

SCOPE = "https://www.googleapis.com/auth/cloud-platform"
CHIPS: Mapping[str, int] = {
    "v2": AcceleratorConfig.Type.V2,
    "v3": AcceleratorConfig.Type.V3,
    "v4": AcceleratorConfig.Type.V4,
    "v5litepod": AcceleratorConfig.Type.V5LITE_POD,
    "v5p": AcceleratorConfig.Type.V5P,
    "v6e": AcceleratorConfig.Type.V6E,
}
"""What a topology can be given for, by the first part of the accelerator type."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Whom slices are made for, the same for all of them.

    Attributes:
      fleet: its name.
      join: HOST:PORT at which they reach the controller.
      script: writes what each host of a machine runs at boot.
    """

    fleet: str
    join: str
    script: Script


def queued_resource_request(
    config: TpuConfig, origin: Origin, name: str, attempt: int, offer: TpuOffer
) -> CreateQueuedResourceRequest:
    """The whole request for one life of a machine.

    Raises:
      ProviderRefused: no machine can have that name, or a topology is given for chips that have none.
    """
    key = id_of(origin.fleet, name, attempt)
    parent = parent_of(config.project, offer.zone)
    node = _node(config, origin, name, offer)
    spec = QueuedResource.Tpu.NodeSpec(parent=parent, node_id=key, node=node)
    queued = QueuedResource(
        tpu=QueuedResource.Tpu(node_spec=[spec]),
        queueing_policy=QueuedResource.QueueingPolicy(
            valid_until_duration=Duration(seconds=round(config.wait_seconds))
        ),
    )
    if offer.price_class == "spot":
        queued.spot = QueuedResource.Spot()
    else:
        queued.guaranteed = QueuedResource.Guaranteed()
        queued.reservation_name = config.reservation
    return CreateQueuedResourceRequest(parent=parent, queued_resource_id=key, queued_resource=queued)


def parent_of(project: str, zone: str) -> str:
    """The full name of a zone."""
    return f"projects/{project}/locations/{zone}"


def _node(config: TpuConfig, origin: Origin, name: str, offer: TpuOffer) -> Node:
    node = Node(
        runtime_version=offer.runtime_version or config.runtime_version,
        description=f"Spotjax worker {name} of fleet {origin.fleet}",
        network_config=NetworkConfig(
            network=config.network, subnetwork=config.subnetwork, enable_external_ips=config.external_ips
        ),
        service_account=ServiceAccount(email=config.service_account, scope=[SCOPE]),
        tags=config.tags,
        labels={
            **config.labels,
            "spotjax-fleet": origin.fleet,
            "spotjax-name": name,
            "spotjax-type": offer.type,
        },
        metadata={
            **config.metadata,
            "startup-script": origin.script(name, offer.offer),
            "spotjax-fleet": origin.fleet,
            "spotjax-name": name,
            "spotjax-join": origin.join,
            "spotjax-price": f"{offer.price:g}",
        },
    )
    if offer.topology:
        node.accelerator_config = AcceleratorConfig(
            type_=AcceleratorConfig.Type(_chips(offer.type)), topology=offer.topology
        )
    else:
        node.accelerator_type = offer.type
    if config.reservation and offer.price_class == "on_demand":
        node.scheduling_config = SchedulingConfig(reserved=True)
    return node


def _chips(accelerator_type: str) -> int:
    kind = re.split("-", accelerator_type)[0]
    if kind not in CHIPS:
        raise ProviderRefused(f"{accelerator_type} cannot have a topology; only {', '.join(CHIPS)} can")
    return CHIPS[kind]
