"""Puts the positions of a mesh on devices so that the most bytes stay where they are. Chooses no shape, moves nothing.

Maximum-weight bipartite matching (Kuhn 1955; solved with the shortest augmenting paths of Crouse 2016, as SciPy has
them) on exact reusable bytes of parameters and KV, on two levels as in SpotServe (Miao et al. 2024): the M positions of
a stage group on the M devices of a place, then groups on places. A place is M devices of one instance, so that tensor
collectives stay inside it.

Weights are whole bytes, exact in doubles up to 2**53. With one place to an instance, or M = 1, the result is optimal.
An instance of more than M devices is cut into runs of devices that hold the same arrays today, which keeps today's
tensor groups together; then all positions that came to the instance are matched again on all of its devices, and the
devices are regrouped by the result, until that gains nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import chain

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from spotjax.errors import NotEnoughPlaces
from spotjax.meshes.instance import DeviceRef, Instance
from spotjax.meshes.shape import MeshShape, Position
from spotjax.planner.holdings import Holdings, Needs

Weights = NDArray[np.int64]
"""Reusable bytes; rows are positions or groups, columns are devices or places."""

Place = tuple[DeviceRef, ...]
"""Devices of one instance that a stage group can take, as many as the tensor degree."""


def match(
    shape: MeshShape, needs: Mapping[Position, Needs], hosts: Sequence[Instance], holdings: Holdings
) -> dict[Position, DeviceRef]:
    """A device of ``hosts`` for every position, so that the bytes of ``needs`` already in place are the most.

    Ties keep order: positions in (d, p, m) order on hosts in the order given, on devices by index.

    Raises:
      NotEnoughPlaces: the hosts offer fewer than D * P places of M devices.
    """
    groups = [[Position(d, p, m) for m in range(shape.tensor)] for d in range(shape.data) for p in range(shape.stage)]
    places = [place for host in hosts for place in _places(host.devices, shape.tensor, holdings)]
    if len(places) < len(groups):
        raise NotEnoughPlaces(len(groups), len(places))

    @cache
    def bytes_at(position: Position, device: DeviceRef) -> int:
        return holdings.reusable_bytes(device, needs[position])

    def weights(positions: Sequence[Position], devices: Sequence[DeviceRef]) -> Weights:
        return np.array([[bytes_at(p, d) for d in devices] for p in positions], dtype=np.int64)

    best: dict[Position, DeviceRef] = {}
    best_bytes = -1
    while True:
        group_weights = np.array([[_most(weights(group, place)) for place in places] for group in groups])
        host_of = [places[place][0].instance for place in assign(group_weights)]
        matching: dict[Position, DeviceRef] = {}
        regrouped: list[Place] = []
        for host in hosts:
            here = [group for group, name in zip(groups, host_of, strict=True) if name == host.name]
            positions = list(chain.from_iterable(here))
            on = {p: host.devices[i] for p, i in zip(positions, assign(weights(positions, host.devices)), strict=True)}
            spare = [device for device in host.devices if device not in on.values()]
            regrouped += sorted(tuple(sorted(on[p] for p in group)) for group in here)
            regrouped += _places(spare, shape.tensor, holdings)
            matching |= on
        in_place = sum(bytes_at(position, device) for position, device in matching.items())
        if in_place > best_bytes:
            best, best_bytes = matching, in_place
        if in_place < best_bytes or set(regrouped) == set(places):
            return {position: best[position] for position in shape.positions()}
        places = regrouped


def _places(devices: Sequence[DeviceRef], tensor: int, holdings: Holdings) -> list[Place]:
    """Devices of one instance cut into as many runs of M as they make, devices that hold the same arrays together."""
    families: dict[frozenset[str], list[DeviceRef]] = defaultdict(list)
    for device in devices:
        families[frozenset(holdings.at(device))].append(device)
    runs = [tuple(family[i : i + tensor]) for family in families.values() for i in range(0, len(family), tensor)]
    rest = sorted(device for run in runs if len(run) < tensor for device in run)
    mixed = [tuple(rest[i : i + tensor]) for i in range(0, len(rest) - tensor + 1, tensor)]
    return sorted([run for run in runs if len(run) == tensor] + mixed)


def _most(weights: Weights) -> int:
    """Weight of the best assignment of rows to columns."""
    return int(weights[linear_sum_assignment(weights, maximize=True)].sum())


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
