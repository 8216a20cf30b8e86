import random

import numpy as np
import pytest

from spotjax.planner.load import Load, LoadEstimator, chance_to_wait, queueing_seconds, waiting_percentile

ONE = np.array(1.0)


def simulated_waits(rate: float, servers: int, service, gaps, requests: int = 60_000) -> list[float]:
    """Waits in a queue with several servers, first come first served."""
    free, now, waits = [0.0] * servers, 0.0, []
    for _ in range(requests):
        now += gaps(rate)
        first = min(range(servers), key=free.__getitem__)
        start = max(now, free[first])
        waits.append(start - now)
        free[first] = start + service()
    return waits


@pytest.mark.parametrize(("servers", "used"), [(1, 0.5), (1, 0.8), (4, 0.8), (8, 0.7)])
def test_waits_are_those_of_a_simulated_queue(servers: int, used: float) -> None:
    chance = random.Random(7)
    rate = used * servers
    waits = simulated_waits(rate, servers, lambda: chance.expovariate(1), chance.expovariate)
    expected = float(queueing_seconds(Load(rate), np.array(servers), ONE))
    assert expected == pytest.approx(float(np.mean(waits)), rel=0.2, abs=0.02)
    tail = float(waiting_percentile(Load(rate), np.array(servers), ONE, 0.95))
    assert tail == pytest.approx(float(np.quantile(waits, 0.95)), rel=0.25, abs=0.1)


def test_a_single_server_with_poisson_arrivals_waits_exactly_as_theory_says() -> None:
    assert float(queueing_seconds(Load(0.8), ONE, ONE)) == pytest.approx(0.8 / 0.2)
    assert float(queueing_seconds(Load(0.8, service_scv=0), ONE, ONE)) == pytest.approx(0.5 * 0.8 / 0.2)
    assert float(chance_to_wait(Load(0.8), ONE, ONE)) == pytest.approx(0.8)


def test_bursts_wait_longer_and_overload_waits_for_ever() -> None:
    calm, bursty = (float(queueing_seconds(Load(0.7, scv), ONE, ONE)) for scv in (0.0, 36.0))
    assert bursty > 10 * calm
    assert float(queueing_seconds(Load(1.0), ONE, ONE)) == float("inf")
    assert float(waiting_percentile(Load(2.0), ONE, ONE, 0.5)) == float("inf")


def test_a_negative_rate_is_refused() -> None:
    with pytest.raises(ValueError, match="rate must not be negative, got -1"):
        Load(-1)


@pytest.mark.parametrize("scv", [1.0, 4.0])
def test_rate_and_variability_are_estimated_from_arrivals(scv: float) -> None:
    chance = random.Random(3)
    rates, scvs = [], []
    for _ in range(30):
        estimator, now = LoadEstimator(), 0.0
        for _ in range(400):
            now += chance.gammavariate(1 / scv, scv / 2.0)
            estimator.arrived(now)
        load = estimator.load(now)
        rates.append(load.rate)
        scvs.append(load.arrival_scv)
    assert np.mean(rates) == pytest.approx(2.0, rel=0.15)
    assert np.mean(scvs) == pytest.approx(scv, rel=0.3)


def test_the_rate_is_right_from_the_start_and_fades_when_nothing_comes() -> None:
    estimator = LoadEstimator()
    for second in range(10):
        estimator.arrived(float(second))
    assert estimator.load(9.0).rate == pytest.approx(1.0, rel=0.1)
    assert estimator.load(9.0).arrival_scv == pytest.approx(0.0)
    assert estimator.load(400.0).rate < 0.01
    assert LoadEstimator().load(5.0).rate == 0.0


def test_service_times_are_estimated_too() -> None:
    estimator = LoadEstimator()
    for seconds in [1.0] * 9:
        estimator.served(seconds)
    estimator.arrived(0.0)
    estimator.arrived(1.0)
    assert estimator.load(1.0).service_scv == pytest.approx(0.0)
