"""The simulated dispatcher follows the real one's rule."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotjax.sim.dispatch import least_loaded
from spotjax.sim.replica import Progress


@dataclass(eq=False)
class Loaded:
    """A replica of which only the load matters."""

    load: int

    def add(self, request: int, computed: int = 0) -> None:
        self.load += 1

    def stop(self) -> list[Progress]:
        raise NotImplementedError


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40))
def test_the_replica_with_the_least_load_is_taken_and_the_first_of_equals_as_in_the_server(loads: list[int]) -> None:
    replicas = [Loaded(load) for load in loads]

    chosen = least_loaded(replicas)

    assert chosen is min(replicas, key=lambda candidate: candidate.load)  # fleet.dispatch.Dispatcher.add


def test_requests_spread_evenly_over_replicas_that_come_and_go() -> None:
    replicas = [Loaded(0) for _ in range(4)]
    for request in range(10):
        least_loaded(replicas).add(request)
    assert [replica.load for replica in replicas] == [3, 3, 2, 2]

    replicas[1:2] = [Loaded(0)]
    for request in range(2):
        least_loaded(replicas).add(request)
    assert [replica.load for replica in replicas] == [3, 2, 2, 2]


def test_without_replicas_there_is_nobody_to_take() -> None:
    with pytest.raises(ValueError):
        least_loaded([])
