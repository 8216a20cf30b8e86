"""Which instances there are and what state each is in. Plain bookkeeping; reacts to nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from math import inf

from spotjax.errors import NoSpareDevices, UnknownInstance
from spotjax.meshes.instance import Instance, InstanceState

LEAVING = (InstanceState.NOTICED, InstanceState.DRAINING)
ALIVE = (InstanceState.JOINING, InstanceState.READY, *LEAVING)


class Membership:
    """The instances of one fleet, gone ones included.

    Args:
      instances: those that may ever exist; ``gone`` ones can join (again).
    """

    def __init__(self, instances: Iterable[Instance]) -> None:
        self._instances = {instance.name: instance for instance in instances}
        self._deadlines: dict[str, float] = {}
        self._losses: Counter[str] = Counter()
        self._advised: set[str] = set()

    def all(self) -> tuple[Instance, ...]:
        """Every instance, in order of name registration."""
        return tuple(self._instances.values())

    def alive(self) -> tuple[Instance, ...]:
        """Those that are not gone."""
        return tuple(instance for instance in self._instances.values() if instance.state in ALIVE)

    def joined(self) -> tuple[Instance, ...]:
        """All but those that are still joining, which have nothing on their devices."""
        return tuple(i for i in self._instances.values() if i.state is not InstanceState.JOINING)

    def having(self, state: InstanceState) -> tuple[str, ...]:
        """Names of those in one state."""
        return tuple(instance.name for instance in self._instances.values() if instance.state is state)

    def is_alive(self, name: str) -> bool:
        """Whether there is an instance of that name that is not gone."""
        return name in self._instances and self._instances[name].state in ALIVE

    def require_alive(self, name: str) -> Instance:
        """An instance that is not gone.

        Raises:
          UnknownInstance: there is none of that name.
        """
        if not self.is_alive(name):
            known = ", ".join(instance.name for instance in self.alive()) or "none"
            raise UnknownInstance(f"instance {name!r} is not part of the fleet; alive are: {known}")
        return self._instances[name]

    def register(self, instance: Instance) -> None:
        """Takes an instance up, or one of that name that was there before anew."""
        self._instances[instance.name] = instance
        self._deadlines.pop(instance.name, None)
        self._advised.discard(instance.name)

    def set_state(self, name: str, state: InstanceState) -> None:
        """Moves an instance to another state."""
        self._instances[name] = replace(self._instances[name], state=state)
        if state is InstanceState.GONE:
            self._losses[name] += 1
            self._advised.discard(name)
        if state is not InstanceState.NOTICED:
            self._deadlines.pop(name, None)

    def notice(self, name: str, deadline: float) -> None:
        """An instance will be gone at a deadline, in monotonic seconds."""
        self.set_state(name, InstanceState.NOTICED)
        self._deadlines[name] = deadline

    def advise(self, name: str, advised: bool) -> None:
        """Notes whether an instance should be replaced, which may still be of use for a long time."""
        (self._advised.add if advised else self._advised.discard)(name)

    @property
    def advised(self) -> frozenset[str]:
        """Instances of which any source says that they may or will be taken, those that have notice included."""
        return frozenset(self._advised)

    def deadline(self, name: str) -> float:
        """Until when an instance that has joined is there: for ever without a notice, minus infinity if it is gone."""
        if self._instances[name].state in (InstanceState.GONE, InstanceState.JOINING):
            return -inf  # one that joins again is not what it was
        return self._deadlines.get(name, inf)

    def seconds_left(self, name: str, now: float) -> float | None:
        """Until the deadline of an instance that has notice; None for others."""
        return max(0.0, self._deadlines[name] - now) if name in self._deadlines else None

    def losses(self, name: str) -> int:
        """How often an instance of that name was lost: by this, one that is back is told from its old self."""
        return self._losses[name]

    def is_leaving(self, name: str) -> bool:
        """Whether an instance is there, but not for long."""
        return name in self._instances and self._instances[name].state in LEAVING

    def take_spare(self, count: int) -> tuple[str, ...]:
        """Lets ``count`` instances that are gone begin to join, and names them.

        Raises:
          NoSpareDevices: there are fewer.
        """
        spare = self.having(InstanceState.GONE)
        if count > len(spare):
            raise NoSpareDevices(f"{count} instances were asked for, devices are left for {len(spare)}")
        for name in spare[:count]:
            self.set_state(name, InstanceState.JOINING)
        return spare[:count]
