"""Workers that fail must stay out, longer every time, until they have served well for a while."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from spotjax.fleet.probation import FIRST_SECONDS, GOOD_SERVICE_SECONDS, LONGEST_SECONDS, Probation


def test_the_time_out_doubles_up_to_a_minute() -> None:
    probation, now, out = Probation(), 0.0, []
    for _ in range(9):
        out.append(probation.failed("worker", "a", now))
        now += out[-1]
        assert probation.remaining("worker", "a", now) == 0
        probation.serves("worker", "a", now)
    assert out == [1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_a_minute_of_good_service_forgives() -> None:
    probation = Probation()
    assert [probation.failed("worker", "a", 0.0) for _ in range(3)] == [1, 2, 4]
    probation.serves("worker", "a", 10.0)
    assert probation.failed("worker", "a", 10.0 + GOOD_SERVICE_SECONDS - 1) == 8
    probation.serves("worker", "a", 100.0)
    assert probation.failed("worker", "a", 100.0 + GOOD_SERVICE_SECONDS) == FIRST_SECONDS


def test_waiting_outside_is_no_service() -> None:
    probation = Probation()
    assert probation.failed("worker", "a", 0.0) == 1
    assert probation.failed("worker", "a", 1000.0) == 2


def test_a_new_process_of_that_name_begins_with_a_clean_record() -> None:
    probation = Probation()
    probation.failed("worker", "a", 0.0)
    assert probation.remaining("worker", "b", 0.0) == 0
    assert probation.remaining("other", "a", 0.0) == 0
    probation.serves("worker", "b", 0.0)
    assert probation.failed("worker", "b", 0.0) == FIRST_SECONDS


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 200)), max_size=30))
def test_nobody_stays_out_for_longer_than_the_longest_time(history: list[tuple[bool, float]]) -> None:
    probation, now = Probation(), 0.0
    for failed, seconds in history:
        if failed:
            assert FIRST_SECONDS <= probation.failed("worker", "a", now) <= LONGEST_SECONDS
        elif probation.remaining("worker", "a", now) == 0:
            probation.serves("worker", "a", now)
        now += seconds
        assert (
            0 <= probation.remaining("worker", "a", now) <= LONGEST_SECONDS + 1e-6
        )  # differences of large clock readings
    assert probation.remaining("worker", "a", now + LONGEST_SECONDS) == 0
