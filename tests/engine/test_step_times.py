"""Step times follow the present, and remember a long step for a while."""

from __future__ import annotations

import pytest

from spotjax.engine.step_times import StepTimes


def test_the_first_step_is_typical() -> None:
    times = StepTimes()
    assert (times.typical, times.longest) == (0, 0)
    times.add(0.2, 0.2)
    assert (times.typical, times.longest) == (0.2, 0.2)


def test_a_long_step_counts_in_full_and_fades() -> None:
    times = StepTimes()
    for _ in range(50):
        times.add(0.1, 0.1)
    times.add(1.0, 1.0)
    assert times.longest == 1.0 and 0.1 < times.typical < 0.2
    for _ in range(10):
        times.add(0.1, 0.1)
    assert 0.3 < times.longest < 0.5
    for _ in range(100):
        times.add(0.1, 0.1)
    assert times.longest == pytest.approx(0.1, rel=0.01) and times.typical == pytest.approx(0.1, rel=0.01)


def test_until_nothing_is_in_flight_it_takes_as_long_as_steps_waited_for_each_other() -> None:
    times = StepTimes()
    for _ in range(50):
        times.add(0.1, 0.2)
    assert times.typical == pytest.approx(0.1) and times.longest == pytest.approx(0.2)
