"""Puts the positions of a mesh on devices so that the most bytes stay where they are. Chooses no shape, moves nothing.

Maximum-weight bipartite matching (Kuhn 1955) on exact reusable bytes of parameters and KV, on two levels as in
SpotServe (Miao et al. 2024): the M positions of a stage group on the M devices of a place, then groups on places. A
place is M devices of one instance, so that tensor collectives stay inside it; where the type lets a group span k whole
instances, the group is matched in k parts of M / k positions in a row, on any instances. At equal bytes, the group that
has the most to receive for the network of its instance gets the least: the copying is over earlier.

With one place to an instance, or M = 1, the bytes in place are the most possible. An instance of more than M devices is
cut into places of devices that hold the same arrays today, which keeps today's tensor groups together; groups are then
exchanged between instances while that gains, valued by their best matching on all devices of the instance, so that a
poor cut does not matter.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from spotjax.errors import NotEnoughPlaces
from spotjax.meshes.instance import DeviceRef, Instance
from spotjax.meshes.shape import MeshShape, Position
from spotjax.meshes.slices import Range
from spotjax.meshes.stacks import is_layered
from spotjax.planner.assignment import Seconds, Weights, assign
from spotjax.planner.holdings import Holdings
from spotjax.planner.needs import Needs, StackedNeeds
from spotjax.planner.reuse import Group, Reuse

EXCHANGES_TRIED = 4096
"""Exchanges of groups between instances that are tried at most, the most promising first."""

Place = tuple[int, tuple[int, ...]]
"""A host and M of its devices, by number; all of them where it has only one such place."""


def match(
    shape: MeshShape,
    needs: Mapping[Position, Needs],
    hosts: Sequence[Instance],
    holdings: Holdings,
    replicas: Iterable[int] | None = None,
) -> dict[Position, DeviceRef]:
    """A device of ``hosts`` for every position, so that the bytes of ``needs`` already in place are the most.

    A group spans instances where M is more than the devices of one, and only if all hosts are of one type. With
    ``replicas`` only their positions are placed.

    Ties keep order: positions in (d, p, m) order on hosts in the order given, on devices by index.

    Raises:
      NotEnoughPlaces: the hosts offer fewer places than there are groups, or parts of groups.
    """
    kinds = {host.type for host in hosts}
    width = shape.tensor // max(1, kinds.pop().span(shape.tensor)) if len(kinds) == 1 else shape.tensor
    groups = [
        tuple(Position(d, p, m) for m in range(first, first + width))
        for d in (range(shape.data) if replicas is None else sorted(replicas))
        for p in range(shape.stage)
        for first in range(0, shape.tensor, width)
    ]
    places = [
        (number, devices) for number, host in enumerate(hosts) for devices in _places(host.devices, width, holdings)
    ]
    if len(places) < len(groups):
        raise NotEnoughPlaces(len(groups), len(places))
    wanted = {position: StackedNeeds.of(needs[position]) for group in groups for position in group}
    reuse = Reuse(wanted, groups, hosts, holdings)
    weights = reuse.on_places(places)
    on: list[list[int]] = [[] for _ in hosts]
    for group, place in enumerate(assign(weights, _receiving(weights, wanted, groups, places, hosts, holdings))):
        on[places[place][0]].append(group)
    if any(len(host.devices) >= 2 * width for host in hosts):
        _exchange(on, [len(host.devices) // width for host in hosts], reuse)
    matching: dict[Position, DeviceRef] = {}
    for host, here in enumerate(on):
        if here:
            members = [position for group in sorted(here) for position in groups[group]]
            taken = assign(np.concatenate([reuse.block(group, host) for group in sorted(here)]))
            devices = hosts[host].devices
            matching |= {position: devices[index] for position, index in zip(members, taken, strict=True)}
    return {position: matching[position] for position in shape.positions() if position in matching}


def _receiving(
    weights: Weights,
    needs: Mapping[Position, StackedNeeds],
    groups: Sequence[Group],
    places: Sequence[Place],
    hosts: Sequence[Instance],
    holdings: Holdings,
) -> Seconds:
    """Seconds that each place's network would be busy with what it misses of each group's needs."""
    sizes: dict[tuple[int, ...], int] = {}
    total = np.empty(len(groups))
    for number, group in enumerate(groups):
        key = tuple(id(needs[position].parameters) for position in group)
        if key not in sizes:
            sizes[key] = sum(holdings.bytes_of(needs[position].parameters.items()) for position in group)
        total[number] = sizes[key] + sum(holdings.bytes_of(needs[position].kv.items()) for position in group)
    bandwidth = np.array([hosts[host].type.network_bandwidth for host, _ in places])
    seconds: Seconds = (total[:, None] - weights) / bandwidth[None, :]
    return seconds


def _exchange(on: list[list[int]], capacity: Sequence[int], reuse: Reuse) -> None:
    """Moves groups to other instances, or swaps them with some there, while that gains.

    Args:
      on: groups on each host; changed.
      capacity: groups that each host has devices for.
      reuse: what they are worth where.
    """
    alone = reuse.on_places([(host, tuple(range(len(classes)))) for host, classes in enumerate(reuse.device_class)])
    worth = [reuse.most(here, host) for host, here in enumerate(on)]
    groups = sum(map(len, on))
    adds, at = np.zeros(groups, dtype=np.int64), np.zeros(groups, dtype=np.int64)

    def value(host: int) -> None:
        """What each group adds to its host."""
        for group in on[host]:
            at[group] = host
            adds[group] = worth[host] - reuse.most([other for other in on[host] if other != group], host)

    def try_move(group: int, there: int) -> bool:
        here = int(at[group])
        left = [other for other in on[here] if other != group]
        for partner in [*([None] if len(on[there]) < capacity[there] else []), *on[there]]:
            come = sorted([*left] if partner is None else [*left, partner])
            stay = sorted([other for other in on[there] if other != partner] + [group])
            after = reuse.most(come, here), reuse.most(stay, there)
            if sum(after) > worth[here] + worth[there]:
                on[here], on[there] = come, stay
                worth[here], worth[there] = after
                value(here)
                value(there)
                return True
        return False

    for host in range(len(on)):
        value(host)
    offers = np.array(capacity) > 0
    tried = 0
    gained = True
    while gained and tried < EXCHANGES_TRIED:
        # Alone on another instance a group must be worth more than what it adds to its own.
        gain = np.where(offers[None, :], alone - adds[:, None], 0)
        gain[np.arange(groups), at] = 0
        pairs = np.argwhere(gain > 0)
        order = np.argsort(-gain[pairs[:, 0], pairs[:, 1]], kind="stable")[: EXCHANGES_TRIED - tried]
        gained = False
        for group, there in pairs[order]:
            tried += 1
            if try_move(int(group), int(there)):
                gained = True
                break


def _places(devices: Sequence[DeviceRef], tensor: int, holdings: Holdings) -> list[tuple[int, ...]]:
    """Devices of one instance cut into as many runs of M as they make, devices that hold the same layers together.

    Where they make only one, all devices are in it: the best M of them count.
    """
    if len(devices) // tensor == 1:
        return [tuple(range(len(devices)))]
    families: dict[frozenset[tuple[str, tuple[Range, ...]]], list[int]] = defaultdict(list)
    for number, device in enumerate(devices):
        held = holdings.at(device).items()
        layers = ((stack, tuple(box[0] for box in boxes) if is_layered(stack) else ()) for stack, boxes in held)
        families[frozenset(layers)].append(number)
    runs = [tuple(family[i : i + tensor]) for family in families.values() for i in range(0, len(family), tensor)]
    rest = sorted(device for run in runs if len(run) < tensor for device in run)
    mixed = [tuple(rest[i : i + tensor]) for i in range(0, len(rest) - tensor + 1, tensor)]
    return sorted([run for run in runs if len(run) == tensor] + mixed)
