"""Instances of Compute Engine as machines, and machines as instances. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import datetime

from google.cloud import compute_v1

from spotjax.errors import ProviderRefused
from spotjax.fleet.providers.gce import GceConfig
from spotjax.fleet.providers.provider import Machine, MachineState, Offer, OfferKey
from spotjax.meshes.instance import PriceClass

FLEET, NAME = "spotjax-fleet", "spotjax-name"
"""Labels: whose an instance is, and which machine. The second is also a key of its metadata."""
VALID = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")
MOST = 63
STATES: Mapping[str, MachineState] = {
    "PROVISIONING": MachineState.STARTING,
    "STAGING": MachineState.STARTING,
    "RUNNING": MachineState.RUNNING,
    "REPAIRING": MachineState.STARTING,
    "PENDING": MachineState.STARTING,
    "PENDING_STOP": MachineState.STOPPING,
    "STOPPING": MachineState.STOPPING,
    "SUSPENDING": MachineState.STOPPING,
    "DEPROVISIONING": MachineState.STOPPING,
    "STOPPED": MachineState.FAILED,
    "TERMINATED": MachineState.FAILED,
    "SUSPENDED": MachineState.FAILED,
}
"""Without a word of a preemption, what has stopped did so by itself."""


def instance_name(fleet: str, name: str) -> str:
    """How the instance of a machine is called: the machines of several fleets have different ones.

    Raises:
      ProviderRefused: no instance can have that name.
    """
    whole = f"{fleet}-{name}"
    if not VALID.fullmatch(name) or len(whole) > MOST:
        raise ProviderRefused(
            f"{name!r} cannot be the name of an instance: use a-z, 0-9 and hyphens, at most {MOST - len(fleet) - 1}"
        )
    return whole


def wanted_instance(
    config: GceConfig, fleet: str, name: str, offer: Offer, template: compute_v1.InstanceTemplate, script: str
) -> compute_v1.Instance:
    """What of an instance is not as its template says. Labels and metadata are all: they replace the template's.

    Args:
      config: of the provider.
      fleet: whose it is.
      name: of the machine.
      offer: what it is rented as.
      template: that it is made from.
      script: what it runs at boot; empty: as the template says.
    """
    properties = template.properties
    metadata = {item.key: item.value for item in properties.metadata.items} | {NAME: name}
    if script:
        metadata["startup-script"] = script
    return compute_v1.Instance(
        name=instance_name(fleet, name),
        machine_type=f"zones/{offer.zone}/machineTypes/{offer.type}",
        labels=dict(properties.labels) | {FLEET: fleet, NAME: name},
        metadata=compute_v1.Metadata(items=[compute_v1.Items(key=k, value=v) for k, v in metadata.items()]),
        scheduling=_scheduling(config, offer.price_class, properties.scheduling),
    )


def _scheduling(config: GceConfig, price_class: PriceClass, given: compute_v1.Scheduling) -> compute_v1.Scheduling:
    if price_class == "on_demand":  # GPUs cannot be moved to another host while they run
        return compute_v1.Scheduling(
            provisioning_model="STANDARD", on_host_maintenance="TERMINATE", automatic_restart=True
        )
    scheduling = compute_v1.Scheduling(
        provisioning_model="SPOT", on_host_maintenance="TERMINATE", automatic_restart=False,
        instance_termination_action=config.termination.upper(),
    )  # fmt: skip
    if config.notice_seconds is not None:
        scheduling.preemption_notice_duration = compute_v1.Duration(seconds=config.notice_seconds)
    elif "preemption_notice_duration" in given:
        scheduling.preemption_notice_duration = given.preemption_notice_duration
    return scheduling


def machine_of(instance: compute_v1.Instance, prices: Mapping[OfferKey, float], preempted: bool = False) -> Machine:
    """The machine that an instance is. One that is no longer offered has the price 0.

    Args:
      instance: with the labels of a fleet.
      prices: of what is offered.
      preempted: it has stopped because it was taken.
    """
    price_class: PriceClass = "spot" if instance.scheduling.provisioning_model == "SPOT" else "on_demand"
    kind, zone = _last(instance.machine_type), _last(instance.zone)
    offer = Offer(kind, zone, price_class, prices.get((kind, zone, price_class), 0.0))
    state = STATES.get(instance.status, MachineState.STARTING)
    detail = " ".join(filter(None, (instance.status, instance.status_message)))
    if state is MachineState.FAILED:
        detail += ": it was taken" if preempted else ": it shut itself down, or somebody did"
        state = MachineState.PREEMPTED if preempted else state
    return Machine(instance.labels[NAME], offer, state, detail, _seconds(instance.creation_timestamp))


def chosen(
    instances: Iterable[compute_v1.Instance],
) -> tuple[dict[str, compute_v1.Instance], list[compute_v1.Instance]]:
    """One instance for each machine, and those that are too many.

    A machine has two when its controller ended in between, and asked again in another zone: the one that is alive
    counts, of several the oldest.
    """
    dead = (MachineState.FAILED, MachineState.STOPPING)
    best: dict[str, compute_v1.Instance] = {}
    more = []
    once = {instance.id: instance for instance in instances}  # a list that changes may tell one on two of its pages
    for instance in sorted(
        once.values(), key=lambda one: (STATES.get(one.status) in dead, one.creation_timestamp, one.id)
    ):
        if instance.labels[NAME] in best:
            more.append(instance)
        else:
            best[instance.labels[NAME]] = instance
    return best, more


def has_stopped(instance: compute_v1.Instance) -> bool:
    """Whether nothing but its remains is left."""
    return STATES.get(instance.status) is MachineState.FAILED


def zone_of(instance: compute_v1.Instance) -> str:
    """Where it is."""
    return _last(instance.zone)


def _last(path: str) -> str:
    return path.rpartition("/")[2]


def _seconds(timestamp: str) -> float:
    """Unix seconds of a time that Google writes; 0 if there is none."""
    return datetime.fromisoformat(timestamp).timestamp() if timestamp else 0.0
