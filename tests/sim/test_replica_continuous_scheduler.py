"""Fast-forward against the real scheduler, which is driven step by step through simulated stages."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from replica_continuous_cases import Case, StepByStep, roofline, simulated, workload

from spotjax.sim.requests import RequestBook

WORKLOADS = {
    "prompts of one chunk": Case(workload(1, 120, 0.9, (512, 512), (128, 128)), roofline()),
    "mixed lengths": Case(workload(2, 120, 1.4, (1, 900), (1, 200)), roofline()),
    "short prompts that share steps": Case(workload(3, 150, 4.0, (8, 64), (8, 64)), roofline(), max_batch=16),
    "prompts of many chunks": Case(workload(4, 50, 0.3, (512, 3000), (32, 200)), roofline()),
    "bursts": Case(workload(5, 120, 1.2, (256, 512), (64, 192), gap_cv=6.0), roofline(), max_batch=16),
    "pages run out": Case(workload(6, 100, 1.2, (256, 512), (128, 256)), roofline(), pages=170),
}


def seconds(book: RequestBook) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Latency, time to the first token, and largest gap of every request."""
    arrival = np.array(book.arrival)
    return np.array(book.finish) - arrival, np.array(book.first_token) - arrival, np.array(book.largest_gap)


@pytest.mark.parametrize("name", WORKLOADS)
def test_one_stage_is_as_fast_as_the_real_scheduler(name: str) -> None:
    case = WORKLOADS[name]
    reference = StepByStep(case)

    latency, first, gap = seconds(simulated(case))
    real_latency, real_first, real_gap = seconds(reference.run())

    assert (reference.preempted > 0) == (name == "pages run out")
    assert latency.mean() == pytest.approx(real_latency.mean(), rel=0.006)
    assert first.mean() == pytest.approx(real_first.mean(), rel=0.02)
    assert gap.mean() == pytest.approx(real_gap.mean(), rel=0.02)
    assert np.quantile(latency, 0.99) == pytest.approx(np.quantile(real_latency, 0.99), rel=0.01)
    # Who comes into a step a moment sooner than the other waits for one prompt less: a few steps, for a few requests.
    step = case.times.step(case.max_batch, 512)
    assert np.median(np.abs(latency - real_latency)) < step
    assert np.abs(latency - real_latency).max() < 12 * step


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("name", WORKLOADS)
def test_pipelines_are_as_fast_as_the_real_scheduler_within_a_few_percent(name: str, stages: int) -> None:
    case = replace(WORKLOADS[name], stages=stages)

    latency, first, gap = seconds(simulated(case))
    real_latency, real_first, real_gap = seconds(StepByStep(case).run())

    within = 0.06 if name == "pages run out" else 0.03
    assert latency.mean() == pytest.approx(real_latency.mean(), rel=within)
    assert first.mean() == pytest.approx(real_first.mean(), rel=3 * within)
    assert gap.mean() == pytest.approx(real_gap.mean(), rel=0.25)


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_as_much_is_computed_again_for_lack_of_pages_as_in_the_real_scheduler(stages: int) -> None:
    case = replace(WORKLOADS["pages run out"], stages=stages)

    recomputed, real = sum(simulated(case).recomputed), sum(StepByStep(case).run().recomputed)

    assert real > 0
    assert recomputed == pytest.approx(real, rel=0.1 if stages == 1 else 0.25)
