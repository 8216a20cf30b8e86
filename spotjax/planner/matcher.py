"""Puts the positions of a mesh on devices so that the most bytes stay where they are. Chooses no shape, moves nothing.

Maximum-weight bipartite matching (Kuhn 1955; solved with the shortest augmenting paths of Crouse 2016, as SciPy has
them) on exact reusable bytes of parameters and KV, on two levels as in SpotServe (Miao et al. 2024): the M positions of
a stage group on the M devices of a place, then groups on places. A place is M devices of one instance, so that tensor
collectives stay inside it.

Weights are whole bytes, exact in doubles up to 2**53. With one place to an instance, or M = 1, the result is optimal.
An instance of more than M devices is cut into places of devices that hold the same arrays today, which keeps today's
tensor groups together; groups are then exchanged between instances while that gains, valued by their best matching on
all devices of the instance, so that a poor cut does not matter.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, permutations, product

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from spotjax.errors import NotEnoughPlaces
from spotjax.meshes.instance import DeviceRef, Instance
from spotjax.meshes.shape import MeshShape, Position
from spotjax.meshes.slices import Index
from spotjax.planner.holdings import Holdings, Needs, covered

Weights = NDArray[np.int64]
"""Reusable bytes; rows are positions or groups, columns are devices or places."""

Group = tuple[Position, ...]
"""Positions: the M tensor shards of one stage of one replica, or several such."""

Devices = tuple[DeviceRef, ...]
"""Devices of one instance: a place of as many as the tensor degree, or all."""


def match(
    shape: MeshShape, needs: Mapping[Position, Needs], hosts: Sequence[Instance], holdings: Holdings
) -> dict[Position, DeviceRef]:
    """A device of ``hosts`` for every position, so that the bytes of ``needs`` already in place are the most.

    Ties keep order: positions in (d, p, m) order on hosts in the order given, on devices by index.

    Raises:
      NotEnoughPlaces: the hosts offer fewer than D * P places of M devices.
    """
    groups = [
        tuple(Position(d, p, m) for m in range(shape.tensor)) for d in range(shape.data) for p in range(shape.stage)
    ]
    places = [place for host in hosts for place in _places(host.devices, shape.tensor, holdings)]
    if len(places) < len(groups):
        raise NotEnoughPlaces(len(groups), len(places))
    positions = list(shape.positions())
    devices = [device for host in hosts for device in host.devices]
    reuse = _Reuse(positions, devices, reusable(needs, positions, devices, holdings))
    chosen = assign(np.array([[reuse.most(group, place) for place in places] for group in groups]))
    devices_of = {host.name: host.devices for host in hosts}
    on: dict[Devices, list[Group]] = {host.devices: [] for host in hosts}
    for group, place in zip(groups, chosen, strict=True):
        on[devices_of[places[place][0].instance]].append(group)
    while _exchange(on, shape.tensor, reuse):
        pass
    matching: dict[Position, DeviceRef] = {}
    for offered, here in on.items():
        members = tuple(chain.from_iterable(sorted(here)))
        taken = assign(reuse.weights(members, offered))
        matching |= {position: offered[index] for position, index in zip(members, taken, strict=True)}
    return {position: matching[position] for position in positions}


def reusable(
    needs: Mapping[Position, Needs], positions: Sequence[Position], devices: Sequence[DeviceRef], holdings: Holdings
) -> Weights:
    """Bytes of the needs of every position (row) that every device (column) already has."""
    wanted: dict[str, dict[Index, list[int]]] = defaultdict(lambda: defaultdict(list))
    for row, position in enumerate(positions):
        for name, index in needs[position].items():
            wanted[name][index].append(row)
    held: dict[str, dict[tuple[Index, ...], list[int]]] = defaultdict(lambda: defaultdict(list))
    for column, device in enumerate(devices):
        for name, boxes in holdings.at(device).items():
            held[name][boxes].append(column)
    table = np.zeros((len(positions), len(devices)), dtype=np.int64)
    # Replicas need the same and hold the same, so there are few distinct pairs of a need and a holding.
    for name in wanted.keys() & held.keys():
        for (index, rows), (boxes, columns) in product(wanted[name].items(), held[name].items()):
            table[np.ix_(rows, columns)] += covered(index, boxes) * holdings.element_bytes
    return table


class _Reuse:
    """The table of reusable bytes by position and device, and the best matchings of parts of it."""

    def __init__(self, positions: Sequence[Position], devices: Sequence[DeviceRef], table: Weights) -> None:
        self._row = {position: row for row, position in enumerate(positions)}
        self._column = {device: column for column, device in enumerate(devices)}
        self._table = table
        self._most: dict[tuple[Group, Devices], int] = {}

    def weights(self, positions: Group, devices: Devices) -> Weights:
        """For every position (row) on every device (column)."""
        return self._table[np.ix_([self._row[p] for p in positions], [self._column[d] for d in devices])]

    def most(self, positions: Group, devices: Devices) -> int:
        """By the best assignment of all positions."""
        if (positions, devices) not in self._most:
            table = self.weights(positions, devices)
            self._most[positions, devices] = int(table[linear_sum_assignment(table, maximize=True)].sum())
        return self._most[positions, devices]


def _exchange(on: dict[Devices, list[Group]], tensor: int, reuse: _Reuse) -> bool:
    """Moves one group to another instance, or swaps it with one there, if that gains. Returns whether it did.

    Only needed, and only tried, where groups share an instance: else groups on places are an optimum already.
    """
    if all(len(devices) < 2 * tensor for devices in on):
        return False

    def most(groups: Iterable[Group], devices: Devices) -> int:
        return reuse.most(tuple(chain.from_iterable(sorted(groups))), devices)

    for here, there in permutations(on, 2):
        free = (len(on[there]) + 1) * tensor <= len(there)
        for group in on[here]:
            left = [other for other in on[here] if other != group]
            if most([group], there) <= most(on[here], here) - most(left, here):
                continue  # alone on the other instance it has no more than it adds to this one
            for partner in [*([None] if free else []), *on[there]]:
                come = [] if partner is None else [partner]
                stay = [other for other in on[there] if other != partner]
                after = most([*left, *come], here) + most([*stay, group], there)
                if after > most(on[here], here) + most(on[there], there):
                    on[here], on[there] = [*left, *come], [*stay, group]
                    return True
    return False


def _places(devices: Sequence[DeviceRef], tensor: int, holdings: Holdings) -> list[Devices]:
    """Devices of one instance cut into as many runs of M as they make, devices that hold the same arrays together."""
    families: dict[frozenset[str], list[DeviceRef]] = defaultdict(list)
    for device in devices:
        families[frozenset(holdings.at(device))].append(device)
    runs = [tuple(family[i : i + tensor]) for family in families.values() for i in range(0, len(family), tensor)]
    rest = sorted(device for run in runs if len(run) < tensor for device in run)
    mixed = [tuple(rest[i : i + tensor]) for i in range(0, len(rest) - tensor + 1, tensor)]
    return sorted([run for run in runs if len(run) == tensor] + mixed)


def assign(weights: Weights) -> list[int]:
    """A column for every row, all different, of the greatest total weight; columns are at least as many as rows.

    Columns that are equal for all rows are taken from the left, and rows that are equal for all columns have theirs in
    order, so that ties keep order.
    """
    if not len(weights):
        return []
    chosen = linear_sum_assignment(weights, maximize=True)[1]
    same_column = np.unique(weights, axis=1, return_inverse=True)[1].reshape(-1)
    for kind in np.unique(same_column[chosen]):
        takers = np.flatnonzero(same_column[chosen] == kind)
        chosen[takers] = np.flatnonzero(same_column == kind)[: len(takers)]
    same_row = np.unique(weights, axis=0, return_inverse=True)[1].reshape(-1)
    for kind in np.unique(same_row):
        alike = np.flatnonzero(same_row == kind)
        chosen[alike] = np.sort(chosen[alike])
    return [int(column) for column in chosen]
