"""What is drawn to happen to a fleet: possible, varied, and the same for the same seed."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from spotjax.tools.chaos_schedule import FOLLOWS, JOIN, KINDS, MOST_TOKENS, NEWCOMER, Event, schedule

NAMES = ("instance-0", "instance-1", "instance-2", "instance-3")
seeds = st.integers(0, 2**32)


def lost_by(event: Event) -> set[str]:
    return set(event.targets[: KINDS[event.kind].loses]) if event.kind != JOIN else set()


@given(seed=seeds, count=st.integers(0, 80))
def test_targets_exist_and_joins_bring_back_those_that_are_gone(seed: int, count: int) -> None:
    events = schedule(seed, count, NAMES, KINDS)
    gone: set[str] = set()
    assert len(events) == count
    for event in events:
        targets = set(event.targets)
        assert len(targets) == len(event.targets) and targets <= set(NAMES)
        if event.kind in (JOIN, NEWCOMER):
            assert targets and targets <= gone
        else:
            assert not targets & gone and len(targets) == KINDS[event.kind].takes
        gone = gone - targets if event.kind == JOIN else gone | lost_by(event)


@given(seed=seeds)
def test_the_same_seed_draws_the_same_events(seed: int) -> None:
    assert schedule(seed, 30, NAMES, KINDS) == schedule(seed, 30, NAMES, list(KINDS))


@given(seed=seeds)
def test_thirty_events_are_of_every_kind_that_a_fleet_takes_while_its_controller_lives(seed: int) -> None:
    kinds = [name for name, kind in KINDS.items() if kind.needs in ("embedded", "processes", "network")]
    assert {event.kind for event in schedule(seed, 30, NAMES, kinds)} == {JOIN, *kinds}


@given(seed=seeds)
def test_sixty_events_are_of_every_kind(seed: int) -> None:
    assert {event.kind for event in schedule(seed, 60, NAMES, KINDS)} == {JOIN, *KINDS}


@given(seed=seeds)
def test_what_is_away_for_a_while_is_not_done_harm_to_meanwhile(seed: int) -> None:
    events = schedule(seed, 60, NAMES, KINDS)
    for event, following in itertools.pairwise(events):
        if event.kind != JOIN and KINDS[event.kind].away and following.tokens == FOLLOWS:
            assert not set(event.targets) & set(following.targets)


@given(seed=seeds)
def test_events_last_as_long_as_their_kind_says(seed: int) -> None:
    for event in schedule(seed, 40, NAMES, KINDS):
        assert FOLLOWS <= event.tokens <= MOST_TOKENS
        if event.kind != JOIN:
            assert KINDS[event.kind].shortest <= event.seconds <= KINDS[event.kind].longest


def test_too_few_instances_are_left_now_and_then_but_not_mostly() -> None:
    few = many = 0
    for seed in range(50):
        there = set(NAMES)
        for event in schedule(seed, 40, NAMES, KINDS):
            there = there | set(event.targets) if event.kind == JOIN else there - lost_by(event)
            few, many = few + (len(there) < 2), many + (len(there) >= 2)
    assert 0 < few < 0.2 * many
