"""Bytes that would stay where they are: every stage group of a new mesh against every host. Decides nothing.

Replicas need the same and hold the same, so devices fall into few classes by the parameters they have and positions
into few by those they need; one small table holds what each class has for the other. KV ties a replica to the devices
of its predecessor: those pairs, few too, are kept apart and added where they occur.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
from numpy.typing import NDArray

from spotjax.meshes.instance import Instance
from spotjax.meshes.shape import Position
from spotjax.meshes.slices import Boxes, Index
from spotjax.planner.assignment import Weights, heaviest_pairs
from spotjax.planner.holdings import Holdings
from spotjax.planner.needs import StackedNeeds

Group = tuple[Position, ...]
"""The M tensor shards of one stage of one replica."""


class Classes:
    """Numbers things by their content, equal content by equal numbers.

    Attributes:
      contents: of each class, in order of first appearance.
    """

    def __init__(self) -> None:
        self.contents: list[tuple[tuple[str, Boxes], ...]] = []
        self._numbers: dict[tuple[tuple[str, Boxes], ...], int] = {}

    def number(self, content: tuple[tuple[str, Boxes], ...]) -> int:
        """The number of a content."""
        number = self._numbers.setdefault(content, len(self.contents))
        if number == len(self.contents):
            self.contents.append(content)
        return number


def parameters_held(stacks: Mapping[str, Boxes]) -> tuple[tuple[str, Boxes], ...]:
    """What a device has apart from KV."""
    return tuple(item for item in stacks.items() if "@" not in item[0])


def parameters_needed(needs: StackedNeeds) -> tuple[tuple[str, Boxes], ...]:
    """What a position needs apart from KV."""
    return tuple((stack, (index,)) for stack, index in needs.parameters.items())


def overlaps(needed: Sequence[Index], held: Sequence[Boxes]) -> NDArray[np.int64]:
    """Elements that every needed index (row) and every device's disjoint boxes (column) have in common."""
    flat = np.array([box for boxes in held for box in boxes], dtype=np.int64)  # boxes, axes, (start, stop)
    wanted = np.array(needed, dtype=np.int64)
    common = np.minimum(wanted[:, None, :, 1], flat[None, :, :, 1]) - np.maximum(
        wanted[:, None, :, 0], flat[None, :, :, 0]
    )
    elements: NDArray[np.int64] = np.maximum(common, 0).prod(axis=2)
    firsts = np.cumsum([0, *(len(boxes) for boxes in held)])[:-1]
    return np.add.reduceat(elements, firsts, axis=1)


class Reuse:
    """Reusable bytes of groups (by number) on hosts (by number).

    Args:
      needs: of every position.
      groups: their positions, the same number in each.
      hosts: instances that may serve them.
      holdings: what their devices have.
    """

    def __init__(
        self,
        needs: Mapping[Position, StackedNeeds],
        groups: Sequence[Group],
        hosts: Sequence[Instance],
        holdings: Holdings,
    ) -> None:
        needed, held = Classes(), Classes()
        self._group_class = [
            tuple(needed.number(parameters_needed(needs[position])) for position in group) for group in groups
        ]
        self.device_class = [
            tuple(held.number(parameters_held(holdings.at(device))) for device in host.devices) for host in hosts
        ]
        self._table = _class_table(needed, held, holdings)
        self._kv = _kv_blocks(needs, groups, hosts, holdings)
        self._most: dict[bytes, int] = {}

    def block(self, group: int, host: int) -> Weights:
        """For every position of the group (row) on every device of the host (column)."""
        parameters = self._table[np.ix_(self._group_class[group], self.device_class[host])]
        kv = self._kv.get((group, host))
        return parameters if kv is None else parameters + kv

    def most(self, groups: Sequence[int], host: int) -> int:
        """By the best assignment of all positions of the groups to devices of the host."""
        if not groups:
            return 0
        return self.best(np.concatenate([self.block(group, host) for group in groups]))

    def best(self, block: Weights) -> int:
        """The greatest weight of an assignment."""
        key = block.shape[1].to_bytes(4) + block.tobytes()
        if key not in self._most:
            self._most[key] = int(block[heaviest_pairs(block)].sum())
        return self._most[key]

    def on_places(self, places: Sequence[tuple[int, Sequence[int]]]) -> Weights:
        """The best of every group (row) on every place (column): some devices, at least M, of a host."""
        distinct: dict[tuple[int, ...], int] = {}
        kind = np.array(
            [
                distinct.setdefault(tuple(self.device_class[host][device] for device in devices), len(distinct))
                for host, devices in places
            ]
        )
        groups: dict[tuple[int, ...], int] = {}
        row = np.array([groups.setdefault(classes, len(groups)) for classes in self._group_class])
        small = np.array([[self.best(self._table[np.ix_(g, d)]) for d in distinct] for g in groups], dtype=np.int64)
        table: Weights = small[row[:, None], kind[None, :]]
        of_host: dict[int, list[int]] = defaultdict(list)
        for column, (host, _) in enumerate(places):
            of_host[host].append(column)
        for group, host in self._kv:
            block = self.block(group, host)
            for column in of_host[host]:
                table[group, column] = self.best(block[:, list(places[column][1])])
        return table


def _class_table(needed: Classes, held: Classes, holdings: Holdings) -> Weights:
    """Bytes of the parameters of every needed class (row) that every held class (column) has."""
    table = np.zeros((len(needed.contents), len(held.contents)), dtype=np.int64)
    wanted = [dict(content) for content in needed.contents]
    has = [dict(content) for content in held.contents]
    for stack in {name for content in wanted for name in content}:
        rows = [row for row, content in enumerate(wanted) if stack in content]
        columns = [column for column, content in enumerate(has) if content.get(stack)]
        if columns:
            common = overlaps([wanted[row][stack][0] for row in rows], [has[column][stack] for column in columns])
            table[np.ix_(rows, columns)] += common * holdings.bytes_per_element(stack)
    return table


def _kv_blocks(
    needs: Mapping[Position, StackedNeeds], groups: Sequence[Group], hosts: Sequence[Instance], holdings: Holdings
) -> dict[tuple[int, int], Weights]:
    """Bytes of KV of positions (rows) on devices (columns), for each pair of a group and a host that has any."""
    wanted: dict[str, dict[int, list[tuple[int, Index]]]] = defaultdict(lambda: defaultdict(list))
    for group, positions in enumerate(groups):
        for row, position in enumerate(positions):
            for stack, index in needs[position].kv.items():
                wanted[stack][group].append((row, index))
    held: dict[str, dict[int, list[tuple[int, Boxes]]]] = defaultdict(lambda: defaultdict(list))
    for host, instance in enumerate(hosts):
        for column, device in enumerate(instance.devices):
            for stack, boxes in holdings.at(device).items():
                if stack in wanted and boxes:
                    held[stack][host].append((column, boxes))
    blocks: dict[tuple[int, int], Weights] = {}
    for stack, on_hosts in held.items():
        for (group, rows), (host, columns) in product(wanted[stack].items(), on_hosts.items()):
            common = overlaps([index for _, index in rows], [boxes for _, boxes in columns])
            if common.any():
                shape = len(groups[group]), len(hosts[host].devices)
                block = blocks.setdefault((group, host), np.zeros(shape, dtype=np.int64))
                block[np.ix_([row for row, _ in rows], [column for column, _ in columns])] += (
                    common * holdings.element_bytes
                )
    return blocks
