"""The order of steps and commands on one host of a TPU slice, with stages that only note what is asked of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from spotjax.protocol.steps import StepHeader, step_payload
from spotjax.runtime.buckets import StepShape
from spotjax.runtime.controls import Variant, pack_controls
from spotjax.runtime.step import PackedStep
from spotjax.worker.executor import Role
from spotjax.worker.slice_executor import SliceExecutor
from spotjax.worker.watchdog import Watchdog

SECONDS = 10.0
SHAPE = StepShape(1, 1, 1)


class NotedStage:
    """A stage that another host hands on for: this one only starts its computations."""

    devices, own = ("theirs", "ours"), ("ours",)

    def __init__(self) -> None:
        self.ran: list[int] = []
        self.failing = False

    def run(self, shape: StepShape, rows: np.ndarray, pages: np.ndarray, hidden: object) -> None:
        if self.failing:
            raise RuntimeError("out of memory")
        self.ran.append(int(rows[0, 2]))


@pytest.fixture
def stage() -> NotedStage:
    return NotedStage()


@pytest.fixture
def failures() -> list[str]:
    return []


@pytest.fixture
def executor(stage: NotedStage, failures: list[str]) -> SliceExecutor:
    model = SimpleNamespace(spec=SimpleNamespace(config=SimpleNamespace(width=8)), dtype=np.dtype(np.float32))
    nobody = cast(Any, None)
    made = SliceExecutor("slice", cast(Any, model), 16, nobody, failures.append, Watchdog(), nobody)
    made.install({("1.0", 0): Role(cast(Any, stage), 0, False, "")})
    return made


def send(executor: SliceExecutor, number: int, pipeline: str = "1.0") -> None:
    """A step whose only token is ``number``."""
    rows, pages = np.array([[0, 1, number]], np.int32), np.ones((1, 1), np.int32)
    packed = PackedStep(SHAPE, Variant.GREEDY, rows, pages, pack_controls([None], Variant.GREEDY, 16))
    header = StepHeader(pipeline, number, 0, SHAPE, Variant.GREEDY, (1,), None, ready=False)
    executor.receive(header, memoryview(b"".join(step_payload(packed, None))))


def test_steps_run_in_the_order_in_which_they_came(executor: SliceExecutor, stage: NotedStage) -> None:
    for number in range(100):
        send(executor, number)
    executor.settle()
    assert stage.ran == list(range(100))


def test_no_step_passes_a_gate_before_it_is_open(executor: SliceExecutor, stage: NotedStage) -> None:
    send(executor, 1)
    gate = executor.gate()
    send(executor, 2)
    gate.wait()
    assert stage.ran == [1]
    gate.open()
    executor.settle()
    assert stage.ran == [1, 2]


def test_whether_a_step_is_dropped_is_decided_at_its_place_in_the_order(
    executor: SliceExecutor, stage: NotedStage
) -> None:
    send(executor, 1)
    gate = executor.gate()
    send(executor, 2)  # came before the pipeline was given up, has its turn after it
    gate.wait()
    executor.install({})
    gate.open()
    executor.settle()
    assert stage.ran == [1]


def test_a_gate_that_was_opened_early_stops_nobody(executor: SliceExecutor, stage: NotedStage) -> None:
    gate = executor.gate()
    gate.open()
    send(executor, 1)
    executor.settle()
    assert stage.ran == [1]


def test_a_step_that_fails_ends_the_slice(executor: SliceExecutor, stage: NotedStage, failures: list[str]) -> None:
    stage.failing = True
    send(executor, 1)
    executor.settle()
    assert failures == ["a step failed: out of memory"]


def test_a_closed_executor_ends_its_thread(executor: SliceExecutor) -> None:
    executor.end()
    executor.thread.join(SECONDS)
    assert not executor.thread.is_alive()
