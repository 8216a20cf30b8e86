"""Stages of several workers give what one process gives; frames of other epochs are dropped; failures are told once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import jax
import msgspec
import numpy as np
import pytest
from serving_cases import BUCKETS, POSITIONS, build_pipelines, build_stage, generate, greedy, shared_heads
from step_cases import frame, prefill, whole
from steps_guide import RisingGuide, rising

from spotjax.engine.request import FinishReason
from spotjax.engine.structure import Masks
from spotjax.fleet.remote_pipeline import RemotePipeline
from spotjax.meshes.shape import MeshShape
from spotjax.protocol.steps import MaskHeader, ResultHeader, StepHeader, mask_payload, read_result
from spotjax.runtime.stage import Stage
from spotjax.runtime.step import unpack_result
from spotjax.worker.executor import CONTROLLER, Role, StageExecutor
from spotjax.worker.watchdog import LOOK_SECONDS, STEP_SECONDS, Watchdog

STAGES = 3
PROMPTS = [[1, 5, 9, 2], list(range(20)), [7]]
SECONDS = 60.0


@dataclass
class Net:
    """Workers by name, and what their stages send to the controller."""

    executors: dict[str, StageExecutor] = field(default_factory=dict)
    results: list[tuple[ResultHeader, memoryview]] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)
    crossings: list[tuple[str, str]] = field(default_factory=list)
    arrived: threading.Condition = field(default_factory=threading.Condition)
    deliver: Callable[[ResultHeader, memoryview], None] | None = None

    def worker(self, name: str) -> StageExecutor:
        model, _ = shared_heads()

        def send(target: str, header: msgspec.Struct, payload: tuple[memoryview, ...]) -> None:
            self.crossings.append((name, target))
            if isinstance(header, StepHeader):
                self.executors[target].receive(header, whole(payload))
                return
            assert target == CONTROLLER and isinstance(header, ResultHeader)
            with self.arrived:
                self.results.append((header, whole(payload)))
                self.arrived.notify_all()
            if self.deliver is not None:
                self.deliver(header, whole(payload))

        def failed(problem: str) -> None:
            with self.arrived:
                self.failures.append((name, problem))
                self.arrived.notify_all()

        executor = StageExecutor(name, model, POSITIONS, send, failed, Watchdog(end=lambda code: None))
        self.executors[name] = executor
        return executor

    def until(self, condition: Callable[[], bool]) -> None:
        with self.arrived:
            assert self.arrived.wait_for(condition, SECONDS)

    def close(self) -> None:
        for executor in self.executors.values():
            executor.close()


@pytest.fixture
def net() -> object:
    net = Net()
    yield net
    net.close()


def new_stages(stages: int = STAGES) -> list[Stage]:
    model, weights = shared_heads()
    return [build_stage(model, weights, [jax.devices()[n]], stages, n) for n in range(stages)]


def roles(pipeline: str, stages: Sequence[Stage], homes: Sequence[str]) -> dict[str, dict[tuple[str, int], Role]]:
    """The role of every stage, by worker."""
    found: dict[str, dict[tuple[str, int], Role]] = {home: {} for home in homes}
    for number, (stage, home) in enumerate(zip(stages, homes, strict=True)):
        last = number == len(stages) - 1
        onward = CONTROLLER if last else homes[number + 1]
        found[home][pipeline, number] = Role(stage, number, last, onward)
    return found


def install(net: Net, pipeline: str, homes: Sequence[str]) -> None:
    for name, theirs in roles(pipeline, new_stages(len(homes)), homes).items():
        (net.executors.get(name) or net.worker(name)).install(theirs)


class Pipeline(RemotePipeline):
    """A pipeline over workers in this process."""

    def close(self) -> None:
        """Nothing is open."""


@pytest.mark.parametrize("homes", [("a", "b", "a"), ("a", "a", "b"), ("a",)])
def test_stages_of_two_workers_give_what_one_process_gives(net: Net, homes: tuple[str, ...]) -> None:
    model, weights = shared_heads()
    states = [greedy(prompt, 6) for prompt in PROMPTS]
    expected = generate(build_pipelines(model, weights, MeshShape(1, 1, 1)), states)
    install(net, "1.0", homes)
    followed: list[bool] = []

    def send(_: str, header: StepHeader, payload: Sequence[memoryview]) -> None:
        followed.append(header.follows is not None)
        loop = asyncio.get_running_loop()
        net.deliver = lambda header, payload: loop.call_soon_threadsafe(pipeline.receive, header, payload) and None
        net.executors[homes[0]].receive(header, whole(payload))

    pipeline = Pipeline("1.0", homes, BUCKETS, send, fuse=False)
    assert generate([pipeline], states) == expected
    assert set(net.crossings) == {(a, b) for a, b in zip(homes, (*homes[1:], CONTROLLER), strict=True) if a != b}
    assert any(followed) is (len(homes) == 1), "what is drawn stays on its worker"
    assert not net.failures


@pytest.mark.parametrize("homes", [("a", "b", "a"), ("a",)])
def test_structures_are_kept_to_across_workers_as_in_one_process(net: Net, homes: tuple[str, ...]) -> None:
    model, weights = shared_heads()
    free = [greedy(prompt, 8) for prompt in PROMPTS]
    bound = [replace(state, sampling=replace(state.sampling, structure=rising(3, 6))) for state in free]
    shown = [replace(state, sampling=replace(state.sampling, logprobs=2)) for state in bound]
    states = [*bound, free[1], *shown]
    expected = generate(build_pipelines(model, weights, MeshShape(1, 1, 1)), states, RisingGuide(97))
    for state in [*expected[:3], *expected[4:]]:
        assert all((after - before) % 97 in (1, 2, 3) for before, after in pairwise(state.tokens))
        assert (len(state.tokens), state.finish) == (6, FinishReason.STOP)
    assert [state.tokens for state in expected[4:]] == [state.tokens for state in expected[:3]]
    (undisturbed,) = generate(build_pipelines(model, weights, MeshShape(1, 1, 1)), [free[1]])
    assert expected[3].tokens == undisturbed.tokens, "others do not notice"
    install(net, "1.0", homes)

    def send(target: str, header: StepHeader | MaskHeader, payload: Sequence[memoryview]) -> None:
        loop = asyncio.get_running_loop()
        net.deliver = lambda header, payload: loop.call_soon_threadsafe(pipeline.receive, header, payload) and None
        if isinstance(header, MaskHeader):
            assert target == homes[-1]
            net.executors[target].receive_masks(header, whole(payload))
        else:
            net.executors[homes[0]].receive(header, whole(payload))

    pipeline = Pipeline("1.0", homes, BUCKETS, send, fuse=False)
    found = generate([pipeline], states, RisingGuide(97))
    assert [state.tokens for state in found] == [state.tokens for state in expected]
    assert not net.failures


@pytest.mark.parametrize("end", ["close", "release", "install"])
def test_a_step_whose_masks_never_come_stands_in_nobodys_way(net: Net, end: str) -> None:
    install(net, "1.0", ("a",))
    executor = net.executors["a"]
    header, payload = frame("1.0", prefill(1))
    executor.receive(msgspec.structs.replace(header, masked=True), payload)
    executor.receive(*frame("1.0", prefill(2)))
    thread = executor._posts["1.0", 0].thread
    assert not net.results
    {"close": executor.close, "release": executor.release, "install": lambda: executor.install({})}[end]()
    thread.shutdown(wait=True)
    assert not net.failures
    if end == "release":
        net.until(lambda: len(net.results) == 2)


def test_waiting_for_masks_is_not_hanging(net: Net) -> None:
    install(net, "1.0", ("a",))
    executor, now = net.executors["a"], [0.0]
    ends: list[int] = []
    executor._watchdog = Watchdog(lambda: now[0], ends.append)
    header, payload = frame("1.0", prefill(1))
    waiting = threading.Event()
    take = executor._masks.take

    def tell(pipeline: str, step: int) -> Masks | None:
        waiting.set()
        return take(pipeline, step)

    executor._masks.take = tell  # type: ignore[method-assign]
    executor.receive(msgspec.structs.replace(header, masked=True), payload)
    assert waiting.wait(SECONDS)
    for _ in range(3 * int(STEP_SECONDS / LOOK_SECONDS)):
        now[0] += LOOK_SECONDS
        executor._watchdog.look()
    words = np.zeros((1, 4), np.int32)
    words[0, 2] = 1 << 7
    executor.receive_masks(MaskHeader("1.0", 1, (0,)), whole(mask_payload(words)))
    net.until(lambda: bool(net.results))
    header_, result = net.results[0]
    assert read_result(header_, result)[0, 0] == 71 and not ends


def test_a_frame_of_an_unknown_pipeline_or_stage_is_dropped(net: Net) -> None:
    install(net, "2.0", ("a",))
    net.executors["a"].receive(*frame("1.0", prefill(1)))
    net.executors["a"].receive(*frame("3.0", prefill(2)))
    net.executors["a"].receive(*frame("2.0", prefill(3)))
    net.until(lambda: bool(net.results))
    assert [header.step for header, _ in net.results] == [3]
    assert not net.failures
    net.executors["a"].close()
    net.executors["a"].receive(*frame("2.0", prefill(4)))
    assert len(net.results) == 1


def test_a_payload_that_is_too_short_is_an_error_of_the_sender(net: Net) -> None:
    install(net, "1.0", ("a",))
    header, payload = frame("1.0", prefill(1))
    with pytest.raises(ValueError, match="payload"):
        net.executors["a"].receive(header, payload[:-64])
    assert not net.failures


class Broken(Stage):
    """A stage whose device is out of order."""

    def __init__(self) -> None:
        pass

    def run(self, *arguments: object) -> jax.Array:
        raise RuntimeError("out of order")


def test_a_step_that_raises_is_told_once_and_the_next_one_runs(net: Net, caplog: pytest.LogCaptureFixture) -> None:
    install(net, "1.0", ("a",))
    executor = net.executors["a"]
    executor.install({**{k: p.role for k, p in executor._posts.items()}, ("1.1", 0): Role(Broken(), 0, True, "")})
    executor.receive(*frame("1.1", prefill(1)))
    net.until(lambda: bool(net.failures))
    executor.receive(*frame("1.0", prefill(2)))
    net.until(lambda: bool(net.results))
    assert net.failures == [("a", "a step failed: out of order")]
    assert "step 1 of pipeline 1.1 failed" in caplog.text


def test_a_failure_of_a_pipeline_that_was_given_up_is_nobodys_business(net: Net) -> None:
    entered, leave = threading.Event(), threading.Event()

    class Slow(Broken):
        def run(self, *arguments: object) -> jax.Array:
            entered.set()
            assert leave.wait(SECONDS)
            raise RuntimeError("its buffers are gone")

    executor = net.worker("a")
    executor.install({("1.0", 0): Role(Slow(), 0, True, "")})
    executor.receive(*frame("1.0", prefill(1)))
    assert entered.wait(SECONDS)
    thread = next(iter(executor._posts.values())).thread
    executor.install({})
    leave.set()
    thread.shutdown(wait=True)
    assert not net.failures


def test_pipelines_that_stay_go_on_undisturbed_with_what_is_new_of_their_role(net: Net) -> None:
    install(net, "1.0", ("a",))
    executor = net.executors["a"]
    before = executor._posts["1.0", 0]
    (other,) = roles("2.1", new_stages(1), ("a",)).values()
    again = Role(before.role.stage, 0, True, CONTROLLER)
    executor.receive(*frame("1.0", prefill(1)))
    executor.install({("1.0", 0): again, **other})
    after = executor._posts["1.0", 0]
    assert after.thread is before.thread and after.role is again
    executor.receive(*frame("1.0", prefill(2)))
    executor.receive(*frame("2.1", prefill(3)))
    net.until(lambda: len(net.results) == 3)
    drawn = {}
    for header, payload in net.results:
        batch = prefill(header.step)
        drawn[header.step] = unpack_result(batch, read_result(header, payload)).sampled[3].token
    assert len(set(drawn.values())) == 1 and drawn.keys() == {1, 2, 3}
    executor.install(other)
    executor.receive(*frame("1.0", prefill(4)))
    executor.receive(*frame("2.1", prefill(5)))
    net.until(lambda: len(net.results) == 4)
    assert net.results[-1][0].step == 5


def test_every_stage_must_have_the_wanted_shape(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    install(net, "1.0", ("a", "b"))
    has = {0: True, 1: False}
    monkeypatch.setattr(Stage, "has_block", lambda stage, shape: has[0 if stage.layers[0] == 0 else 1])
    for step, ready in ((1, False), (2, True)):
        has[1] = ready
        header, payload = frame("1.0", prefill(step))
        want = msgspec.structs.replace(header, want=header.shape, ready=True)
        net.executors["a"].receive(want, payload)
        net.until(lambda step=step: len(net.results) == step)
        assert net.results[-1][0].ready is ready


def test_a_step_that_hangs_ends_the_process(caplog: pytest.LogCaptureFixture) -> None:
    now, ends = [0.0], []
    watchdog = Watchdog(lambda: now[0], ends.append)
    with watchdog.over("step 7 of pipeline 1.0"):
        for _ in range(int(STEP_SECONDS / LOOK_SECONDS)):
            now[0] += LOOK_SECONDS
            watchdog.look()
        assert ends == []
        now[0] += LOOK_SECONDS
        watchdog.look()
    assert ends == [1]
    assert "step 7 of pipeline 1.0 has run for 61 s" in caplog.text


def test_steps_that_end_and_a_process_that_was_stopped_are_no_reason_to_end() -> None:
    now, ends = [0.0], []
    watchdog = Watchdog(lambda: now[0], ends.append)
    for _ in range(3):
        with watchdog.over("a step"):
            now[0] += 0.9 * STEP_SECONDS
            watchdog.look()
        watchdog.look()
    with watchdog.over("a step under way while the process is stopped"):
        now[0] += 1000 * STEP_SECONDS
        watchdog.look()
    assert ends == []


def test_the_watchdog_looks_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spotjax.worker.watchdog.LOOK_SECONDS", 0.005)
    monkeypatch.setattr("spotjax.worker.watchdog.STEP_SECONDS", 0.02)
    ended = threading.Event()
    watchdog = Watchdog(end=lambda code: ended.set())
    watchdog.start()
    with watchdog.over("a step"):
        assert ended.wait(SECONDS)
    watchdog.close()


def test_the_executor_has_its_steps_watched(net: Net) -> None:
    seen: list[str] = []

    class Seen(Broken):
        def run(self, *arguments: object) -> jax.Array:
            seen.extend(step.name for step in executor._watchdog._steps)
            raise RuntimeError

    executor = net.worker("a")
    executor.install({("1.0", 0): Role(Seen(), 0, True, "")})
    executor.receive(*frame("1.0", prefill(8)))
    net.until(lambda: bool(net.failures))
    assert seen == ["step 8 of pipeline 1.0"]
    assert not executor._watchdog._steps
