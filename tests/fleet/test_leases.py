"""Leases: who counts as alive, and until when."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spotjax.fleet.leases import Leases

SECONDS = 2.0
NAMES = st.sampled_from(["one", "two", "three"])
INCARNATIONS = st.sampled_from(["a", "b"])
TICKS = st.integers(0, 64).map(lambda ticks: ticks / 16)
"""Spans of time that add up exactly in floating point."""
HISTORY = st.lists(st.tuples(st.sampled_from(["grant", "beat", "revoke"]), NAMES, INCARNATIONS, TICKS), max_size=30)
History = list[tuple[str, str, str, float]]


def live_through(leases: Leases, history: History, now: float) -> float:
    """Does what ``history`` says, each after the span that it names; returns the time then."""
    for what, name, incarnation, span in history:
        now += span
        if what == "revoke":
            leases.revoke(name)
        elif what == "grant":
            leases.grant(name, incarnation, now)
        else:
            leases.beat(name, incarnation, now)
    return now


def view(leases: Leases, now: float) -> tuple[tuple[str, ...], float | None, dict[str, float]]:
    """All that leases tell at ``now``, with times relative to it."""
    remaining: dict[str, float] = {}
    for name in ("one", "two", "three"):
        try:
            remaining[name] = leases.remaining(name, now)
        except KeyError:
            continue
    expiry = leases.next_expiry()
    return leases.expired(now), None if expiry is None else expiry - now, remaining


def test_a_lease_lasts_its_seconds_and_no_longer() -> None:
    leases = Leases(SECONDS)
    leases.grant("one", "a", 10.0)
    assert leases.next_expiry() == 12.0
    assert leases.expired(11.999) == ()
    assert leases.expired(12.0) == ("one",)
    assert leases.remaining("one", 11.5) == 0.5
    assert leases.remaining("one", 13.0) == 0.0


def test_a_beat_prolongs_a_lease_from_when_it_was_heard() -> None:
    leases = Leases(SECONDS)
    leases.grant("one", "a", 10.0)
    assert leases.beat("one", "a", 11.5)
    assert leases.next_expiry() == 13.5


def test_who_is_expected_has_its_own_time_until_the_first_beat_and_an_ordinary_lease_then() -> None:
    leases = Leases(SECONDS)
    leases.expect("one", "a", 10.0, 30.0)
    assert not leases.beat("one", "b", 11.0)
    leases.stalled(1.0, 12.0)
    assert leases.next_expiry() == 40.0
    assert leases.beat("one", "a", 13.0)
    assert leases.next_expiry() == 15.0


def test_beats_of_strangers_and_of_earlier_incarnations_prolong_nothing() -> None:
    leases = Leases(SECONDS)
    leases.grant("one", "a", 10.0)
    leases.grant("one", "b", 11.0)
    assert not leases.beat("one", "a", 12.0)
    assert not leases.beat("two", "b", 12.0)
    assert leases.expired(13.0) == ("one",)


def test_a_revoked_lease_is_gone_until_granted_anew() -> None:
    leases = Leases(SECONDS)
    leases.grant("one", "a", 10.0)
    assert leases.revoke("one")
    assert not leases.revoke("one")
    assert not leases.beat("one", "a", 10.5)
    assert (leases.expired(99.0), leases.next_expiry()) == ((), None)
    with pytest.raises(KeyError):
        leases.remaining("one", 10.5)


def test_the_longest_silent_instance_is_named_first() -> None:
    leases = Leases(SECONDS)
    for now, name in enumerate(("zeta", "beta", "alpha")):
        leases.grant(name, "a", float(now))
    assert leases.expired(3.5) == ("zeta", "beta")


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_a_lease_without_length_is_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        Leases(seconds)


@pytest.mark.parametrize("seconds", [-0.1, float("nan")])
def test_a_negative_stall_is_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match="negative"):
        Leases(SECONDS).stalled(seconds, 0.0)


@given(before=HISTORY, after=HISTORY, stall=TICKS)
def test_a_stall_of_the_controller_changes_nothing_but_the_time(before: History, after: History, stall: float) -> None:
    """Two controllers live through the same, one with a stall in between: they see the same, ``stall`` apart."""
    steady, stopped = Leases(SECONDS), Leases(SECONDS)
    now = live_through(steady, before, 0.0)
    live_through(stopped, before, 0.0)
    stopped.stalled(stall, now + stall)
    assert view(stopped, now + stall) == view(steady, now)
    end = live_through(steady, after, now)
    assert live_through(stopped, after, now + stall) == end + stall
    assert view(stopped, end + stall) == view(steady, end)


@given(before=HISTORY, meanwhile=HISTORY, stall=TICKS)
def test_a_stall_never_makes_a_lease_shorter_or_longer_than_a_full_one(
    before: History, meanwhile: History, stall: float
) -> None:
    leases = Leases(SECONDS)
    now = live_through(leases, meanwhile, live_through(leases, before, 0.0))
    _, _, earlier = view(leases, now)
    leases.stalled(stall, now)
    _, _, later = view(leases, now)
    assert earlier.keys() == later.keys()
    assert all(earlier[name] <= later[name] <= SECONDS for name in earlier)


@given(history=HISTORY, wait=TICKS)
def test_exactly_those_without_time_left_are_expired(history: History, wait: float) -> None:
    leases = Leases(SECONDS)
    now = live_through(leases, history, 0.0) + wait
    expired, first, remaining = view(leases, now)
    assert set(expired) == {name for name, left in remaining.items() if left == 0}
    assert (first is None) == (not remaining)
    if first is not None:
        assert max(0.0, first) == min(remaining.values())


@given(history=HISTORY, silence=TICKS)
def test_whoever_was_heard_within_a_lease_is_alive(history: History, silence: float) -> None:
    """Against a model that only remembers when each living incarnation was last heard or granted."""
    leases = Leases(SECONDS)
    now = live_through(leases, history, 0.0) + silence
    heard: dict[str, tuple[str, float]] = {}
    time = 0.0
    for what, name, incarnation, span in history:
        time += span
        if what == "revoke":
            heard.pop(name, None)
        elif what == "grant" or (name in heard and heard[name][0] == incarnation):
            heard[name] = (incarnation, time)
    assert set(leases.expired(now)) == {name for name, (_, last) in heard.items() if now - last >= SECONDS}
