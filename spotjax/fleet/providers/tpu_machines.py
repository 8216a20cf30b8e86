"""Which queued resources and nodes are a fleet's, and which machines they come to. Pure.

The id of both is ``FLEET--NAME--ATTEMPT``. A preempted request never comes back and an id is taken until its deletion
has ended, so every life of a machine has a number. Queued resources have no labels: the id is how they are known.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import cast

from google.cloud.tpu_v2 import Node, QueuedResource, QueuedResourceState

from spotjax.errors import ProviderRefused
from spotjax.fleet.providers.provider import Machine, MachineState, Offer
from spotjax.fleet.providers.tpu_states import failure_of, machine_state

NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
"""Names that a machine can have; without ``--``, so that no fleet's ids are another one's."""
MOST_ID = 63
"""Characters of an id, at most."""
FLEET_LABEL, NAME_LABEL = "spotjax-fleet", "spotjax-name"
PRICE = "spotjax-price"
"""Metadata: USD per hour when it was asked for, for offers that are no longer in the configuration."""

LIKELY = (MachineState.RUNNING, MachineState.STARTING, MachineState.WAITING, MachineState.STOPPING)
"""Of several lives of one machine, the first of these is it."""


@dataclass(frozen=True, slots=True)
class Life:
    """A machine's request and its node, one of which may be missing.

    Attributes:
      name: of the machine.
      attempt: counts the lives of that name.
      zone: where.
      id: of both, in that zone.
      queued: the request.
      node: the TPU slice.
    """

    name: str
    attempt: int
    zone: str
    id: str
    queued: QueuedResource | None
    node: Node | None

    @property
    def is_ending(self) -> bool:
        """It is being deleted: its name is free, its id is not."""
        if self.queued is not None:
            return bool(self.queued.state.state == QueuedResourceState.State.DELETING)
        return self.node is not None and bool(self.node.state == Node.State.DELETING)

    @property
    def state(self) -> MachineState:
        """Of the machine that it comes to."""
        return machine_state(self.queued, self.node)[0]

    @property
    def created(self) -> float:
        """When it was asked for, in Unix seconds; 0 if that is not said."""
        made: QueuedResource | Node | None = self.queued or self.node
        if made is None or "create_time" not in made:
            return 0.0
        return cast(datetime, made.create_time).timestamp()  # what the library makes of a Timestamp


def id_of(fleet: str, name: str, attempt: int) -> str:
    """What queued resource and node are called."""
    return f"{fleet}--{name}--{attempt}"


def require_name(fleet: str, name: str) -> None:
    """Raises ProviderRefused for a name that no machine of that fleet can have."""
    if not NAME.fullmatch(name):
        raise ProviderRefused(f"a TPU slice cannot be called {name!r}: use a-z and 0-9, with single hyphens in between")
    if len(id_of(fleet, name, 9999)) > MOST_ID:
        raise ProviderRefused(
            f"{name!r} is too long: the names of fleet and machine have at most {MOST_ID - 8} letters"
        )


def lives(fleet: str, zone: str, requests: Iterable[QueuedResource], nodes: Iterable[Node]) -> tuple[Life, ...]:
    """Those of this fleet in one zone, whatever else is there."""
    queued = {_last(request.name): request for request in requests}
    made = {_last(node.name): node for node in nodes}
    pattern = re.compile(rf"{re.escape(fleet)}--({NAME.pattern})--([1-9][0-9]*)")
    found = []
    for key in queued | made:
        if parts := pattern.fullmatch(key):
            found.append(Life(parts[1], int(parts[3]), zone, key, queued.get(key), made.get(key)))
    return tuple(found)


def machines(found: Sequence[Life], offers: Sequence[Offer]) -> tuple[Machine, ...]:
    """One machine for every name. Of a second life that is no end, the id: it must be released, and serves nothing.

    A second one comes of a controller that asked for a machine, died, and whose request arrived after its successor
    had asked in another zone.
    """
    by_name: dict[str, list[Life]] = defaultdict(list)
    for life in found:
        by_name[life.name].append(life)
    listed = []
    for name, same in by_name.items():
        first, *others = sorted(same, key=_rank)
        listed.append(_machine(first, name, offers))
        for life in others:
            if not life.is_ending:
                listed.append(_surplus(life, first, offers))
    return tuple(listed)


def of_name(found: Iterable[Life], name: str) -> tuple[Life, ...]:
    """The lives that go by a listed machine's name: all of a real one, or the very one of a second one."""
    return tuple(life for life in found if name in (life.name, key_of(life)))


def key_of(life: Life) -> str:
    """The name of a second life; a slash is in no machine's name."""
    return f"{life.zone}/{life.id}"


def _rank(life: Life) -> tuple[bool, int, float, int, str]:
    likely = LIKELY.index(life.state) if life.state in LIKELY else len(LIKELY)
    return life.is_ending, likely, life.created, life.attempt, life.zone


def _machine(life: Life, name: str, offers: Sequence[Offer]) -> Machine:
    state, detail = machine_state(life.queued, life.node)
    return Machine(name, _offer(life, offers), state, detail, life.created, failure_of(life.queued))


def _surplus(life: Life, first: Life, offers: Sequence[Offer]) -> Machine:
    detail = f"a second {life.name}; the first is {key_of(first)}. {machine_state(life.queued, life.node)[1]}"
    return Machine(key_of(life), _offer(life, offers), MachineState.FAILED, detail, life.created)


def _offer(life: Life, offers: Sequence[Offer]) -> Offer:
    """What it was rented as: from the configuration, else as itself says."""
    specs = life.queued.tpu.node_spec if life.queued is not None else ()
    node = specs[0].node if specs else life.node or Node()
    labels: Mapping[str, str] = node.labels
    spot = "spot" in life.queued if life.queued is not None else bool(node.scheduling_config.spot)
    kind = labels.get("spotjax-type") or node.accelerator_type
    for offer in offers:
        if (offer.type, offer.zone, offer.price_class) == (kind, life.zone, "spot" if spot else "on_demand"):
            return offer
    return Offer(kind, life.zone, "spot" if spot else "on_demand", _price(node.metadata.get(PRICE, "")))


def _price(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0


def _last(path: str) -> str:
    return path.rpartition("/")[2]
