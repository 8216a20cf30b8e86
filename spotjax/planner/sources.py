"""Chooses who sends each missing part, so that no link is busy much longer than it must be.

Greedy list scheduling (Graham 1969): each part in turn from the holder with which it is done first. Lasting holders
come before dying ones, which may not live to send, and a checkpoint serves the parameters that nobody has.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence, Set

import numpy as np
from numpy.typing import NDArray

from spotjax.meshes.instance import DeviceRef
from spotjax.planner.holdings import Holdings
from spotjax.planner.links import Direction, Link, Links
from spotjax.planner.missing import Holders, Part
from spotjax.planner.plan import Phase, Transfer

TIE = 1 + 1e-9
"""Times closer than this are equal."""


class Nodes:
    """The instances that take part, by number, with their bandwidths in bytes per second."""

    def __init__(self, parts: Sequence[Part], holders: Sequence[Holders], links: Links) -> None:
        used = {part.holders for part in parts}
        names = {device.instance for number in used for device in holders[number]}
        self.names = sorted(names | {part.target.instance for part in parts})
        self.number = {name: number for number, name in enumerate(self.names)}
        self.checkpoint = links.checkpoint_bandwidth
        self.network = np.array([links.bandwidth(Link(name, Direction.OUT)) for name in self.names])
        self.inside = np.array([links.bandwidth(Link(name, Direction.INSIDE)) for name in self.names])


class Schedule:
    """How long every link of every node is busy in one phase, while sources are being chosen."""

    def __init__(self, nodes: Nodes) -> None:
        self._nodes = nodes
        self.busy = {direction: np.zeros(len(nodes.names)) for direction in Direction}

    def choose(self, holders: NDArray[np.intp], target: int, size: int, sent: NDArray[np.int64]) -> int:
        """Which of the holders, given by their nodes, is done first; then by its own link, then by what it has sent."""
        own = np.where(
            holders == target,
            self.busy[Direction.INSIDE][target] + size / self._nodes.inside[target],
            self.busy[Direction.OUT][holders] + size / self._nodes.network[holders],
        )
        receiving = self.busy[Direction.IN][target] + size / self._nodes.network[target]
        done = np.where(holders == target, own, np.maximum(own, receiving))
        first = np.flatnonzero(done <= done.min() * TIE)
        first = first[own[first] <= own[first].min() * TIE]
        return int(first[np.argmin(sent[first])])

    def add(self, source: int | None, target: int, size: int) -> None:
        """A transfer goes over its links."""
        if source is None:
            self.busy[Direction.CHECKPOINT][target] += size / self._nodes.checkpoint
        elif source == target:
            self.busy[Direction.INSIDE][target] += size / self._nodes.inside[target]
        else:
            self.busy[Direction.OUT][source] += size / self._nodes.network[source]
            self.busy[Direction.IN][target] += size / self._nodes.network[target]

    def seconds(self) -> dict[Link, float]:
        """Of every link that is used."""
        return {
            Link(self._nodes.names[node], direction): float(busy[node])
            for direction, busy in self.busy.items()
            for node in np.flatnonzero(busy)
        }


def choose_sources(
    parts: Sequence[Part], holders: Sequence[Holders], holdings: Holdings, links: Links
) -> tuple[list[Transfer], dict[Phase, dict[Link, float]]]:
    """A transfer for every part, in the order given, and how long links are busy in each phase.

    Raises:
      PlanError: the type of an instance is not given.
    """
    nodes = Nodes(parts, holders, links)
    schedules = {phase: Schedule(nodes) for phase in Phase}
    devices = {device: number for number, device in enumerate(sorted({d for number in holders for d in number}))}
    sent = np.zeros(len(devices), dtype=np.int64)
    candidates: dict[int, tuple[Holders, NDArray[np.intp], NDArray[np.intp]]] = {}
    for number in {part.holders for part in parts}:
        lasting = tuple(device for device in holders[number] if device.instance not in holdings.dying)
        able = lasting or holders[number]
        candidates[number] = (
            able,
            np.array([nodes.number[device.instance] for device in able], dtype=np.intp),
            np.array([devices[device] for device in able], dtype=np.intp),
        )
    transfers: list[Transfer] = []
    for part in parts:
        able, where, which = candidates[part.holders]
        target, schedule = nodes.number[part.target.instance], schedules[part.phase]
        source: DeviceRef | None = None
        if able:
            chosen = schedule.choose(where, target, part.bytes, sent[which]) if len(able) > 1 else 0
            source = able[chosen]
            sent[which[chosen]] += part.bytes
        schedule.add(None if source is None else nodes.number[source.instance], target, part.bytes)
        transfers.append(Transfer(part.pieces, source, part.target, part.bytes, part.phase))
    return transfers, {phase: schedule.seconds() for phase, schedule in schedules.items()}


def lower_bound(parts: Sequence[Part], holders: Sequence[Holders], links: Links) -> float:
    """Seconds that no choice of sources can beat: the longest of three.

    The busiest link if every part came over the links that no choice of its source avoids; what an instance misses over
    all the links that lead to its devices; what the same holders must send over all the links that lead away from them.
    """
    wanted: dict[tuple[int, str], int] = defaultdict(int)
    for part in parts:
        wanted[part.holders, part.target.instance] += part.bytes
    instances = {n: {device.instance for device in holders[n]} for n in {number for number, _ in wanted}}
    outgoing = {
        number: sum(links.bandwidth(Link(name, Direction.OUT)) for name in names) for number, names in instances.items()
    }
    least: dict[Link, float] = defaultdict(float)
    into: dict[str, int] = defaultdict(int)
    within: set[str] = set()
    away: dict[int, tuple[int, set[str]]] = {}
    for (number, target), size in wanted.items():
        having = instances[number]
        for link in _unavoidable(having, target):
            least[link] += links.seconds(link, size)
        if having:
            into[target] += size
            sent, at_home = away.setdefault(number, (0, set()))
            if target in having:
                at_home.add(target)
                within.add(target)
            away[number] = sent + size, at_home

    def inside(names: Iterable[str]) -> float:
        return sum(links.bandwidth(Link(name, Direction.INSIDE)) for name in names)

    received = [
        size / (links.bandwidth(Link(name, Direction.IN)) + inside({name} & within)) for name, size in into.items()
    ]
    shared = [size / (outgoing[number] + inside(at_home)) for number, (size, at_home) in away.items()]
    return max([*least.values(), *received, *shared], default=0.0)


def _unavoidable(having: Set[str], target: str) -> list[Link]:
    """Links that bytes to a target go over, whichever of the instances sends them."""
    if not having:
        return [Link(target, Direction.CHECKPOINT)]
    if target in having:
        return [Link(target, Direction.INSIDE)] if len(having) == 1 else []
    coming = [Link(target, Direction.IN)]
    return [*coming, Link(next(iter(having)), Direction.OUT)] if len(having) == 1 else coming
