"""What is kept of a machine in a Ray cluster's own store, and what state it is in by that. Pure; imports no ray."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from spotjax.errors import OutOfCapacity
from spotjax.fleet.providers.provider import Machine, MachineState, Offer
from spotjax.local_workers import shown_end
from spotjax.meshes.instance import PriceClass

STORE = b"spotjax"
"""Namespace of the cluster's key-value store (``internal_kv``)."""


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """One machine that was asked for. Written once, before its actor is made.

    Attributes:
      name: of the machine.
      life: another one at each request; with the name, the name of its actor, which is never used again.
      created: in Unix seconds.
      resources: that it takes, by Ray's names, ``CPU`` and ``GPU`` among them.
      labels: that its node has.
    """

    name: str
    life: str
    type: str
    zone: str
    price_class: PriceClass
    price: float
    created: float
    resources: Mapping[str, float]
    labels: Mapping[str, str]

    @property
    def offer(self) -> Offer:
        """What it was rented as."""
        return Offer(self.type, self.zone, self.price_class, self.price)

    @property
    def actor(self) -> str:
        """The name of its actor."""
        return f"{self.name}--{self.life}"


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """What the cluster says about a machine.

    Attributes:
      wish: as it was asked for.
      actor: state of its actor as Ray calls it; empty if none was made.
      died: why its actor is dead, as Ray calls it, such as ``NODE_DIED``; empty if it says nothing.
      reason: the same in Ray's words.
      released: it was given back.
      ended: exit code of its worker (negative: the signal), when that has ended.
      drained: Unix seconds at which its node goes, 0 if it does not say when; None if the node is not drained.
      fits: some node of the cluster is such that it could be there.
    """

    wish: Wish
    actor: str
    died: str = ""
    reason: str = ""
    released: bool = False
    ended: int | None = None
    drained: float | None = None
    fits: bool = True


def key_of(fleet: str, name: str) -> str:
    """Where the wish for a machine is."""
    return f"{fleet}/{name}"


def fact_key(fleet: str, name: str, life: str, fact: str) -> str:
    """Where what becomes of it is: ``actor``, ``released`` or ``ended``."""
    return f"{fleet}/{name}/{life}/{fact}"


def is_over(found: Found) -> bool:
    """Whether nothing of it runs or will."""
    return found.actor in ("", "DEAD")


def machine_of(found: Found) -> Machine:
    """The machine as the fleet sees it."""
    wish = found.wish

    def machine(state: MachineState, detail: str) -> Machine:
        return Machine(wish.name, wish.offer, state, detail, wish.created)

    if found.released:
        return machine(MachineState.STOPPING, "given back")
    if found.actor == "":
        return machine(MachineState.FAILED, "its actor was never made, or Ray has forgotten it")
    if found.actor == "DEAD":
        return dead(found)
    if found.drained is not None:
        return machine(MachineState.STOPPING, "its node is drained")
    if found.actor == "ALIVE":
        return machine(MachineState.RUNNING, "")
    waits = (
        "its actor waits for a node" if found.fits else "no node of the cluster has what it needs; one must be added"
    )
    return machine(MachineState.WAITING, f"{waits} ({found.actor})")


def dead(found: Found) -> Machine:
    """One whose actor has ended: taken, unless its worker failed or its actor never could be."""
    wish = found.wish
    if found.ended is not None:
        state = MachineState.PREEMPTED if found.ended <= 0 else MachineState.FAILED
        return Machine(wish.name, wish.offer, state, f"worker ended: {shown_end(found.ended)}", wish.created)
    failed = {"UNSCHEDULABLE": OutOfCapacity, "FAILED": None}
    detail = f"{found.died}: {found.reason}" if found.died else "its actor is dead"
    if found.died in failed:
        return Machine(wish.name, wish.offer, MachineState.FAILED, detail, wish.created, failed[found.died])
    return Machine(wish.name, wish.offer, MachineState.PREEMPTED, detail, wish.created)


def fits(wish: Wish, resources: Mapping[str, float], labels: Mapping[str, str]) -> bool:
    """Whether a node that has this could hold the machine, were it empty."""
    enough = all(resources.get(name, 0.0) >= amount for name, amount in wish.resources.items())
    return enough and all(labels.get(name) == value for name, value in wish.labels.items())
