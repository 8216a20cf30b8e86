from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from spotjax.planner.deadline import (
    Arrival,
    Departure,
    Pace,
    RunningSequence,
    Saved,
    arrange,
    saving_order,
    steps_before,
    steps_until,
)

PACE = Pace(step_seconds=0.1, bandwidth=1e9, fixed_seconds=0.5, bytes_per_step=10**6)
NOW = 1000.0

sequences = st.lists(st.tuples(st.integers(0, 5 * 10**9), st.integers(0, 400), st.floats(0.01, 5)), max_size=6).map(
    lambda entries: [RunningSequence(f"r{n}", *entry) for n, entry in enumerate(entries)]
)
paces = st.builds(
    Pace,
    step_seconds=st.floats(0.01, 1),
    in_flight_seconds=st.floats(0, 1),
    bandwidth=st.floats(1e8, 1e10),
    fixed_seconds=st.floats(0, 1),
    bytes_per_step=st.integers(0, 10**6),
)


def bytes_at(running, steps: int, growth: int) -> float:
    return sum(r.bytes + steps * growth for r in running if r.remaining > steps)


@given(sequences, paces, st.floats(0.001, 60), st.floats(0, 20), st.data())
def test_no_arrangement_passes_the_deadline_whatever_the_noise_within_the_margin(
    running, pace, left, busy, data: st.DataObject
) -> None:
    plan = arrange(NOW, [Departure("i0", NOW + left)], [], running, pace, busy_until=NOW + busy)
    assert plan is not None
    noise = st.floats(1 - pace.margin, 1 + pace.margin)
    stop = pace.in_flight_seconds * data.draw(noise) + sum(
        pace.step_seconds * data.draw(noise) for _ in range(min(plan.steps, 3))
    )
    stop += max(0, plan.steps - 3) * pace.step_seconds * (1 + pace.margin)
    size = sum(r.bytes + plan.steps * pace.bytes_per_step for r in running if r.key in plan.moving)
    if plan.saved is Saved.TOKENS:
        assert plan.moving == () and (plan.steps == 0 or stop < left)
    else:
        move = (pace.fixed_seconds + size / pace.bandwidth) * data.draw(noise)
        assert max(stop, busy) + move < left + 1e-6


@given(sequences, paces, st.floats(0, 30), st.floats(0, 5))
def test_the_number_of_steps_is_the_argmax(running, pace, left: float, not_before: float) -> None:
    def fits(steps: int) -> bool:
        stop = (pace.in_flight_seconds + steps * pace.step_seconds) * (1 + pace.margin)
        move = pace.fixed_seconds + bytes_at(running, steps, pace.bytes_per_step) / pace.bandwidth
        return max(stop, not_before) + move * (1 + pace.margin) < left

    expected = [steps for steps in range(int(left / pace.step_seconds) + 2) if fits(steps)]
    assert steps_before(left, running, pace, not_before) == (expected[-1] if expected else None)


@given(paces, st.floats(0, 100))
def test_an_acquisition_runs_the_fewest_steps_that_last_until_the_newcomer_is_ready(pace, wait: float) -> None:
    steps = steps_until(wait, pace)
    fast = 1 - pace.margin
    assert (pace.in_flight_seconds + steps * pace.step_seconds) * fast >= wait - 1e-6
    assert steps == 0 or (pace.in_flight_seconds + (steps - 1) * pace.step_seconds) * fast < wait


def one(size: int = 10**9, remaining: int = 10**6, recompute: float = 1.0, key: str = "a") -> RunningSequence:
    return RunningSequence(key, size, remaining, recompute)


def test_more_time_means_more_steps_and_a_larger_migration_means_fewer() -> None:
    def steps(left: float, size: int) -> int:
        plan = arrange(NOW, [Departure("i0", NOW + left)], [], [one(size)], PACE)
        assert plan is not None and plan.saved is Saved.KV and plan.moving == ("a",)
        return plan.steps

    assert steps(30, 10**9) > steps(20, 10**9) > steps(20, 10**10) > 0


def test_sequences_that_finish_before_the_stop_do_not_move() -> None:
    plan = arrange(NOW, [Departure("i0", NOW + 30)], [], [one(remaining=5), one(remaining=10**6, key="b")], PACE)
    assert plan is not None and plan.moving == ("b",) and plan.recomputed == ()


def test_nobody_waits_for_a_stop_after_the_last_sequence_has_finished() -> None:
    plan = arrange(NOW, [Departure("i0", NOW + 300)], [], [one(remaining=7)], PACE)
    assert plan is not None and plan.steps == 7 and plan.moving == ()


def test_an_overlapping_notice_with_an_earlier_deadline_brings_the_stop_forward() -> None:
    first = [Departure("i0", NOW + 30)]
    alone = arrange(NOW, first, [], [one()], PACE)
    both = arrange(NOW, [*first, Departure("i1", NOW + 10)], [], [one()], PACE)
    assert alone is not None and both is not None
    assert both.steps < alone.steps and both.departing == ("i0", "i1")


def test_a_notice_during_a_migration_waits_for_it_and_still_keeps_the_deadline() -> None:
    notice = [Departure("i1", NOW + 20)]
    free = arrange(NOW, notice, [], [one(10 * 10**9)], PACE)
    busy = arrange(NOW, notice, [], [one(10 * 10**9)], PACE, busy_until=NOW + 4)
    late = arrange(NOW, notice, [], [one(10 * 10**9)], PACE, busy_until=NOW + 15)
    assert free is not None and busy is not None and late is not None
    assert free.saved is Saved.KV and busy.saved is Saved.KV and late.saved is Saved.TOKENS


def test_a_withdrawn_notice_leaves_nothing_to_arrange() -> None:
    assert arrange(NOW, [], [], [one()], PACE) is None


def test_a_late_notice_saves_the_kv_that_is_dearest_to_compute_again() -> None:
    running = [one(3 * 10**9, recompute=3.0, key="cheap"), one(3 * 10**9, recompute=30.0, key="dear"), one(8 * 10**9)]
    plan = arrange(NOW, [Departure("i0", NOW + 5)], [], running, PACE)
    assert plan is not None and plan.saved is Saved.SOME_KV and plan.steps == 0
    assert plan.moving == ("dear",) and plan.recomputed == ("cheap", "a")
    assert saving_order(running) == ("dear", "cheap", "a")


def test_without_time_for_any_kv_decoding_goes_on_and_only_tokens_are_kept() -> None:
    plan = arrange(NOW, [Departure("i0", NOW + 2)], [], [one(50 * 10**9)], PACE)
    assert plan is not None and plan.saved is Saved.TOKENS and plan.recomputed == ("a",)
    assert 0 < plan.steps * PACE.step_seconds * (1 + PACE.margin) < 2


def test_an_instance_that_died_before_its_deadline_stops_all_at_once_and_only_its_own_kv_is_lost() -> None:
    running = [
        replace(one(key="lost"), held_by=frozenset({"i0", "i1"})),
        replace(one(key="kept"), held_by=frozenset({"i2"})),
    ]
    died = Departure("i0", NOW - 1)
    plan = arrange(NOW, [died], [], running, PACE)
    assert plan is not None and plan.steps == 0
    assert (plan.moving, plan.recomputed) == (("kept",), ("lost",))
    hurried = arrange(NOW, [died, Departure("i2", NOW + 1)], [], running, PACE)
    assert hurried is not None and hurried.steps == 0
    assert (hurried.moving, hurried.recomputed) == ((), ("lost", "kept"))


def test_a_newcomer_that_is_ready_in_time_joins_and_a_later_one_waits_for_the_next_change() -> None:
    arrivals = [Arrival("soon", NOW + 5), Arrival("late", NOW + 100)]
    plan = arrange(NOW, [Departure("i0", NOW + 30)], arrivals, [one()], PACE)
    assert plan is not None and plan.joining == ("soon",) and plan.delayed == ("late",)
    without = arrange(NOW, [Departure("i0", NOW + 30)], [], [one()], PACE)
    assert without is not None and without.steps == plan.steps


def test_newcomers_alone_are_waited_for() -> None:
    plan = arrange(NOW, [], [Arrival("i5", NOW + 10), Arrival("i6", NOW + 4)], [one()], PACE)
    assert plan is not None and plan.joining == ("i5", "i6") and plan.steps * PACE.step_seconds * 0.8 >= 10


def test_the_stop_waits_for_the_precopy() -> None:
    notice = [Departure("i1", NOW + 20)]
    plan = arrange(NOW, notice, [], [one(17 * 10**9)], PACE, precopied_at=NOW + 10)
    assert plan is not None and plan.saved is Saved.TOKENS
    plan = arrange(NOW, notice, [], [one(7 * 10**9)], PACE, precopied_at=NOW + 10)
    assert plan is not None and plan.saved is Saved.KV


@given(sequences, st.floats(1, 30))
def test_what_moves_and_what_is_computed_again_is_everything_that_has_not_finished(running, left: float) -> None:
    plan = arrange(NOW, [Departure("i0", NOW + left)], [], running, PACE)
    assert plan is not None
    assert not set(plan.moving) & set(plan.recomputed)
    unfinished = {r.key for r in running if r.remaining > plan.steps}
    assert unfinished <= {*plan.moving, *plan.recomputed}
    assume(plan.saved is Saved.KV)
    assert set(plan.moving) == unfinished


def test_a_pace_without_time_is_refused() -> None:
    with pytest.raises(ValueError, match="must be above 0, got 0 and"):
        replace(PACE, step_seconds=0)
