"""Which replicas need not be placed again in a change of the mesh. Pure; places nothing."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from spotjax.meshes.placement import Placement
from spotjax.planner.optimizer import Decision


def could_stay(current: Placement | None, decision: Decision, running: Collection[int]) -> frozenset[int]:
    """Running replicas that are as they should be, on instances that may carry the next mesh."""
    if current is None or current.layers != decision.layers or current.shape.tensor != decision.shape.tensor:
        return frozenset()
    hosts = {host.name for host in decision.hosts}
    elsewhere = {at.data for at, device in current.devices.items() if device.instance not in hosts}
    return frozenset(running) - elsewhere


def stay(current: Placement, decision: Decision, able: Mapping[int, int]) -> dict[int, int]:
    """Old to new number of replicas that need not be placed again: nothing else fits on their instances.

    They have all that they need where they are, so it costs no bytes to leave them out of the matching, and the fewer
    are left to match, the sooner that is done. Where an instance has places to spare, its groups are matched as well.
    """
    tensor, free = decision.shape.tensor, {host.name: host.type.devices for host in decision.hosts}
    if any(devices < tensor for devices in free.values()):
        return {}
    standing: dict[int, set[str]] = {old: set() for old in able}
    for at, device in current.devices.items():
        if at.data in able:
            standing[at.data].add(device.instance)
            free[device.instance] -= 1
    staying = dict(able)
    while leaving := [old for old in staying if any(free[name] >= tensor for name in standing[old])]:
        for old in leaving:
            del staying[old]
            for device in current.devices_of(old):
                free[device.instance] += 1
    return staying
