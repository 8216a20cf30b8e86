"""Which instances there are and what state each is in. Plain bookkeeping; reacts to nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from spotjax.errors import NoSpareDevices, UnknownInstance
from spotjax.meshes.instance import Instance, InstanceState

ALIVE = (InstanceState.JOINING, InstanceState.READY, InstanceState.NOTICED, InstanceState.DRAINING)


class Membership:
    """The instances of one fleet, gone ones included.

    Args:
      instances: those that may ever exist; ``gone`` ones can join (again).
    """

    def __init__(self, instances: Iterable[Instance]) -> None:
        self._instances = {instance.name: instance for instance in instances}

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

    def require_alive(self, name: str) -> Instance:
        """An instance that is not gone.

        Raises:
          UnknownInstance: there is none of that name.
        """
        instance = self._instances.get(name)
        if instance is None or instance.state not in ALIVE:
            known = ", ".join(instance.name for instance in self.alive()) or "none"
            raise UnknownInstance(f"instance {name!r} is not part of the fleet; alive are: {known}")
        return instance

    def register(self, instance: Instance) -> None:
        """Takes an instance up, or one of that name that was there before anew."""
        self._instances[instance.name] = instance

    def set_state(self, name: str, state: InstanceState) -> None:
        """Moves an instance to another state."""
        self._instances[name] = replace(self._instances[name], state=state)

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
