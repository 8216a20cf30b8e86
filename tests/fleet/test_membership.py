"""Instances go through their states; those that are gone can join again."""

from __future__ import annotations

from math import inf

import pytest
from fleet_cases import instances

from spotjax.errors import NoSpareDevices, UnknownInstance
from spotjax.fleet.membership import Membership
from spotjax.meshes.instance import InstanceState


def members() -> Membership:
    """i0 ready, i1 noticed, i2 joining, i3 and i4 gone."""
    membership = Membership(instances(5))
    states = (InstanceState.READY, InstanceState.NOTICED, InstanceState.JOINING, InstanceState.GONE, InstanceState.GONE)
    for instance, state in zip(membership.all(), states, strict=True):
        membership.set_state(instance.name, state)
    return membership


def test_all_but_the_gone_are_alive() -> None:
    assert [instance.name for instance in members().alive()] == ["i0", "i1", "i2"]
    assert [instance.name for instance in members().all()] == ["i0", "i1", "i2", "i3", "i4"]


def test_nothing_is_on_the_devices_of_those_that_are_still_joining() -> None:
    assert [instance.name for instance in members().joined()] == ["i0", "i1", "i3", "i4"]


def test_instances_are_found_by_state() -> None:
    assert members().having(InstanceState.GONE) == ("i3", "i4")
    assert members().having(InstanceState.DRAINING) == ()


def test_spare_instances_are_taken_once() -> None:
    membership = members()
    assert membership.take_spare(1) == ("i3",)
    assert membership.take_spare(1) == ("i4",)
    assert membership.having(InstanceState.JOINING) == ("i2", "i3", "i4")
    with pytest.raises(NoSpareDevices, match="1 instances were asked for, devices are left for 0"):
        membership.take_spare(1)


def test_more_than_are_spare_are_refused_and_none_is_taken() -> None:
    membership = members()
    with pytest.raises(NoSpareDevices):
        membership.take_spare(3)
    assert membership.having(InstanceState.GONE) == ("i3", "i4")


@pytest.mark.parametrize("name", ["i3", "nobody"])
def test_who_is_gone_or_unknown_is_not_alive(name: str) -> None:
    with pytest.raises(UnknownInstance, match=f"'{name}' is not part of the fleet; alive are: i0, i1, i2"):
        members().require_alive(name)


def test_who_is_alive_is_found() -> None:
    assert members().require_alive("i1").state is InstanceState.NOTICED


def test_a_deadline_ends_with_the_notice() -> None:
    membership = members()
    assert membership.deadline("i0") == inf and membership.deadline("i2") == membership.deadline("i3") == -inf
    membership.notice("i0", 20.0)
    assert membership.deadline("i0") == 20.0 and membership.is_leaving("i0")
    assert [membership.seconds_left("i0", now) for now in (5.0, 20.0, 21.0)] == [15.0, 0.0, 0.0]
    membership.set_state("i0", InstanceState.GONE)
    assert membership.seconds_left("i0", 5.0) is None
    assert membership.deadline("i0") == -inf and membership.losses("i0") == 1 and not membership.is_leaving("i0")
    membership.set_state("i0", InstanceState.READY)
    assert membership.deadline("i0") == inf


def test_who_should_be_replaced_is_known_until_it_is_gone_or_somebody_else() -> None:
    membership = members()
    membership.advise("i0", True)
    membership.advise("i1", True)
    membership.notice("i0", 20.0)
    assert membership.advised == {"i0", "i1"}
    membership.set_state("i0", InstanceState.GONE)
    membership.advise("i1", False)
    assert membership.advised == frozenset()
    membership.advise("i1", True)
    membership.register(membership.require_alive("i1"))
    assert membership.advised == frozenset()
