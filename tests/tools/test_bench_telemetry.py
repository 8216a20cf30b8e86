"""What the cost of telemetry is measured with tells observers of whole requests."""

import pytest

from spotjax.telemetry.recorder import Recorder
from spotjax.tools import bench_telemetry


@pytest.mark.parametrize("kind", bench_telemetry.KINDS)
def test_the_calls_of_a_step_are_those_of_requests_from_begin_to_end(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def made_observer(kind: str) -> object:
        made.append(observer := observers(kind))
        return observer

    observers = bench_telemetry.observer_of
    monkeypatch.setattr(bench_telemetry, "observer_of", made_observer)
    assert bench_telemetry.calls(kind, batch=3, steps=4) > 0
    for observer in made:
        if isinstance(observer, Recorder):
            assert (observer.generation_tokens, observer.first_token.count, observer.whole.count) == (12, 3, 3)
            assert not observer._followed
