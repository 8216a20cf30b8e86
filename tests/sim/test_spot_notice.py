"""An instance goes with the notice that its event says, or else with that of the simulation."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from spotjax_cases import scenario

from spotjax.sim.workload import SpotEvent
from spotjax.sim.world import World


class Listener:
    """A system that writes down what it is told."""

    name = "listener"

    def begin(self, world: World) -> None:
        self.world, self.told = world, list[tuple[str, float]]()

    def arrived(self, request: int) -> None:
        pass

    def coming(self, names: Sequence[str], ready_at: float) -> None:
        pass

    def ready(self, names: Sequence[str]) -> None:
        pass

    def noticed(self, names: Sequence[str], deadline: float) -> None:
        self.told.append(("noticed", self.world.now))

    def lost(self, names: Sequence[str]) -> None:
        self.told.append(("lost", self.world.now))

    def ended(self) -> None:
        pass


@pytest.mark.parametrize(("notice", "told"), [(None, 70.0), (10.0, 90.0), (0.0, None)])
def test_an_event_can_have_a_notice_of_its_own(notice: float | None, told: float | None) -> None:
    events = [SpotEvent(0.0, ("i-0", "i-1")), SpotEvent(100.0, removed=("i-0",), notice=notice)]
    listener = Listener()
    World(scenario(events, [1.0], 200.0)).run(listener)
    assert listener.told == ([("noticed", told)] if told is not None else []) + [("lost", 100.0)]
