"""Keeps a migration within the memory of every device: what may be pre-copied, and the order of the rest.

While decoding goes on nothing can be given up, so a device pre-copies only what its free memory takes, front layers
first. The rest moves after the stop, layer by layer, and what a layer no longer needs is given up when that layer is
done, in an order that keeps every device within its bound: SpotServe's memory-optimised migration (Miao et al. 2024,
Algorithm 2). If no order does, layers come in the order that keeps the greatest excess least, and the plan says so.
KV is not counted: its pages are allocated once for all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from spotjax.meshes.instance import DeviceRef
from spotjax.meshes.slices import ArraySlice, remainder
from spotjax.meshes.stacks import depth, is_layered
from spotjax.planner.holdings import Holdings
from spotjax.planner.kv_cohorts import cohort_of
from spotjax.planner.links import Link, Links
from spotjax.planner.needs import StackedNeeds
from spotjax.planner.plan import MemoryUse, MigrationPlan, Phase, Transfer

Bytes = NDArray[np.int64]
"""Bytes by layer (row) and device (column); row 0 is what comes before the layers, the last one what comes after."""


@dataclass(frozen=True)
class LayerOrder:
    """An order in which layers migrate after the stop.

    Attributes:
      rows: of the byte tables, in order.
      peak: the most bytes that each device ever holds beyond what it held before.
    """

    rows: tuple[int, ...]
    peak: NDArray[np.int64]


def bounded_order(arriving: Bytes, leaving: Bytes, used: NDArray[np.int64], room: NDArray[np.int64]) -> LayerOrder:
    """The order of layers in which devices exceed their room the least; not at all if that can be found.

    Takes the frontmost layer that fits everywhere; if there is none, the one after which the worst excess is least.

    Args:
      arriving: bytes that a layer brings to each device, before anything leaves.
      leaving: bytes that each device gives up when the layer is done everywhere.
      used: bytes that each device has taken already.
      room: bytes that each device may take beyond what it holds.
    """
    storage, peak = used.copy(), used.copy()
    left = list(range(len(arriving)))
    order: list[int] = []
    while left:
        excess = (storage + arriving[left] - room).max(axis=1)
        fits = np.flatnonzero(excess <= 0)
        if len(fits):
            chosen = int(fits[0])
        else:
            # The least excess now; then what frees the most where memory is shortest.
            freed = (leaving[left] - arriving[left])[:, int(np.argmax(storage - room))]
            chosen = int(np.lexsort((np.arange(len(left)), -freed, excess))[0])
        layer = left.pop(chosen)
        peak = np.maximum(peak, storage + arriving[layer])
        storage = storage + arriving[layer] - leaving[layer]
        order.append(layer)
    return LayerOrder(tuple(order), peak)


def within_memory(
    plan: MigrationPlan,
    needs: Mapping[DeviceRef, StackedNeeds],
    holdings: Holdings,
    room: Mapping[DeviceRef, int],
    links: Links,
) -> MigrationPlan:
    """The same transfers, those that do not fit beside what is held put off until after the stop, and ordered.

    Args:
      plan: from ``plan_migration`` without a bound.
      needs: what every target device must have.
      holdings: what it has now.
      room: free bytes of every target device.
      links: as for the plan.
    """
    devices = sorted(needs)
    column = {device: number for number, device in enumerate(devices)}
    stops = (index[0][1] for mine in needs.values() for stack, index in mine.parameters.items() if is_layered(stack))
    layers = 1 + max(stops, default=0)
    free = np.array([room[device] for device in devices], dtype=np.int64)
    kv = [transfer for transfer in plan.transfers if cohort_of(transfer.pieces[0].name) is not None]
    parameters = [one for t in plan.transfers if cohort_of(t.pieces[0].name) is None for one in _by_layer(t)]
    arriving = np.zeros((layers + 1, len(devices)), dtype=np.int64)
    for row, transfer in parameters:
        arriving[min(row, layers), column[transfer.target]] += transfer.bytes
    fits = np.cumsum(arriving, axis=0) <= free
    used = np.where(fits, arriving, 0).sum(axis=0)
    order = bounded_order(np.where(fits, 0, arriving), _given_up(needs, holdings, devices, layers), used, free)
    rank = {row: number for number, row in enumerate(order.rows)}
    early: list[Transfer] = []
    late: list[tuple[int, Transfer]] = []
    for row, transfer in parameters:
        row = min(row, layers)
        if fits[row, column[transfer.target]]:
            early.append(transfer)
        else:
            late.append((rank[row], replace(transfer, phase=Phase.FINAL)))
    late.sort(key=lambda entry: entry[0])
    early += [transfer for transfer in kv if transfer.phase is Phase.PRECOPY]
    kv = [transfer for transfer in kv if transfer.phase is Phase.FINAL]
    transfers = (*early, *kv, *(transfer for _, transfer in late))
    worst = int(np.max(order.peak - free, initial=0))
    return replace(
        plan,
        transfers=transfers,
        link_seconds={phase: _busy([t for t in transfers if t.phase is phase], links) for phase in Phase},
        lower_bound_seconds=_bounds(plan, bool(late)),
        memory=MemoryUse(
            peak={device: int(order.peak[number]) for device, number in column.items()},
            excess=worst,
            deferred=sum(transfer.bytes for _, transfer in late),
            layer_order=tuple(row - 1 for row in order.rows),
        ),
    )


def _by_layer(transfer: Transfer) -> list[tuple[int, Transfer]]:
    """A transfer cut into one for each layer, by row of the byte tables; a very large row is behind all layers."""
    element_bytes = transfer.bytes // sum(piece.size for piece in transfer.pieces)
    rows: dict[int, list[ArraySlice]] = defaultdict(list)
    for piece in transfer.pieces:
        if is_layered(piece.name):
            for layer in range(*piece.index[0]):
                rows[layer + 1].append(ArraySlice(piece.name, ((layer, layer + 1), *piece.index[1:])))
        else:
            rows[0 if depth(piece.name) < 0 else 1 << 30].append(piece)
    return [
        (row, replace(transfer, pieces=tuple(pieces), bytes=element_bytes * sum(piece.size for piece in pieces)))
        for row, pieces in rows.items()
    ]


def _given_up(
    needs: Mapping[DeviceRef, StackedNeeds], holdings: Holdings, devices: Sequence[DeviceRef], layers: int
) -> Bytes:
    """Bytes of parameters that each device has and does not need, by layer."""
    table = np.zeros((layers + 1, len(devices)), dtype=np.int64)
    for number, device in enumerate(devices):
        wanted = needs[device].parameters
        for stack, boxes in holdings.at(device).items():
            if cohort_of(stack) is not None:
                continue
            needed = [wanted[stack]] if stack in wanted else []
            for box in (piece for held in boxes for piece in remainder(held, needed)):
                size = holdings.bytes_of([(stack, box)])
                if is_layered(stack):
                    start, stop = box[0]
                    table[start + 1 : stop + 1, number] += size // (stop - start)
                else:
                    table[0 if depth(stack) < 0 else layers, number] += size
    return table


def _busy(transfers: Sequence[Transfer], links: Links) -> dict[Link, float]:
    busy: dict[Link, float] = defaultdict(float)
    for transfer in transfers:
        for link in links.between(transfer.source, transfer.target):
            busy[link] += links.seconds(link, transfer.bytes)
    return dict(busy)


def _bounds(plan: MigrationPlan, deferred: bool) -> Mapping[Phase, float]:
    """Once parameters are put off, only the bound of KV still holds."""
    if not deferred:
        return plan.lower_bound_seconds
    return {Phase.PRECOPY: 0.0, Phase.FINAL: plan.lower_bound_seconds[Phase.FINAL]}
