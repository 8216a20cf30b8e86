"""Runs steps on this worker's stages: each stage in a thread of its own, results handed on as soon as they are there.

A stage's next step is dispatched while the one before runs; another thread waits for results. A step may even follow
one whose tokens nobody has read yet, where the first stage is on the worker of the last.

Frames come in from the data plane and go out to the next stage, or to the controller from the last. A frame of a
pipeline that is not installed belongs to another epoch and is dropped.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import jax
import msgspec
import numpy as np

from spotjax.engine.structure import Masks
from spotjax.protocol.control import StageWork
from spotjax.protocol.steps import (
    MaskHeader,
    ResultHeader,
    StepHeader,
    read_masks,
    read_step,
    result_payload,
    step_payload,
)
from spotjax.runtime.buckets import StepShape
from spotjax.runtime.compiled import CompiledModel
from spotjax.runtime.controls import spread_masks
from spotjax.runtime.drawing import draw
from spotjax.runtime.drawn import Drawn
from spotjax.runtime.stage import Stage
from spotjax.runtime.step import PackedStep
from spotjax.worker.ledger import StageLedger
from spotjax.worker.masks import StepMasks
from spotjax.worker.stage_times import StageTimes
from spotjax.worker.watchdog import Watchdog

T = TypeVar("T")
log = logging.getLogger(__name__)

STEPS_AHEAD = 2
"""Steps in flight of a pipeline whose steps may follow each other on a worker: it has one stage."""
CONTROLLER = ""
"""As the target of a frame."""

Send = Callable[[str, msgspec.Struct, tuple[memoryview, ...]], None]
"""Sends a frame to an instance, or to the controller. Called from any thread."""
Failed = Callable[[str], None]
"""Told why a step could not be run. Called from any thread."""


@dataclass(frozen=True)
class Role:
    """What one stage is to one pipeline.

    Attributes:
      stage: on local devices.
      number: its place in the pipeline.
      last: there is none after it.
      next: the instance of the next stage; this one's own name if that is here; the controller after the last.
      ledger: is told what steps write; None where that is not kept.
      replica: the pipeline's place in the mesh.
    """

    stage: Stage
    number: int
    last: bool
    next: str
    ledger: StageLedger | None = None
    replica: int = 0


@dataclass(frozen=True)
class _Post:
    """A role, the thread that fills it, the one that waits for what comes of it, and how long that takes."""

    role: Role
    times: StageTimes = field(default_factory=StageTimes)
    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="stage"))
    reader: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="result"))


class StageExecutor:
    """All stages of one worker.

    Args:
      name: of the instance.
      model: compiled functions.
      max_positions: longest sequence.
      send, failed: where results and failures go.
      watchdog: watches steps.
    """

    def __init__(
        self, name: str, model: CompiledModel, max_positions: int, send: Send, failed: Failed, watchdog: Watchdog
    ) -> None:
        self._name, self._model, self._max_positions = name, model, max_positions
        self._send, self._failed, self._watchdog = send, failed, watchdog
        self._posts: Mapping[tuple[str, int], _Post] = {}
        self._drawn: dict[str, Drawn] = {}
        self._masks = StepMasks()

    def install(self, roles: Mapping[tuple[str, int], Role]) -> None:
        """Makes these the roles, by pipeline and stage number. Pipelines that were there before go on undisturbed."""
        before = self._posts
        self._posts = {
            key: replace(before[key], role=role) if key in before else _Post(role) for key, role in roles.items()
        }
        self._drawn = {pipeline: self._drawn.get(pipeline) or Drawn(self._model, STEPS_AHEAD) for pipeline, _ in roles}
        self._masks.open(self._drawn)
        for key, post in before.items():
            if key not in self._posts:
                post.thread.shutdown(wait=False, cancel_futures=True)
                post.reader.shutdown(wait=False, cancel_futures=True)

    def work(self) -> Iterator[StageWork]:
        """What the stages have done whose results this process waits for."""
        for (_, stage), post in self._posts.items():
            if post.times.steps:
                yield StageWork(post.role.replica, stage, post.times.steps, post.times.seconds)

    def close(self) -> None:
        """Gives up all roles; waits for steps under way."""
        before, self._posts = self._posts, {}
        self.release()
        for post in before.values():
            post.thread.shutdown(wait=True, cancel_futures=True)
            post.reader.shutdown(wait=True, cancel_futures=True)

    def release(self) -> None:
        """No step waits for masks any more: the controller that was to send them is gone, and with it who waits."""
        self._masks.open(())

    def receive_masks(self, header: MaskHeader, payload: memoryview) -> None:
        """Takes what rows of a step may draw; returns at once."""
        self._masks.put(header.pipeline, header.step, read_masks(header, payload, self._model.spec.config.vocab))

    def receive(self, header: StepHeader, payload: memoryview) -> None:
        """Takes a frame from the data plane; returns at once."""
        width, dtype = self._model.spec.config.width, self._model.dtype
        packed, hidden = read_step(header, payload, width, self._max_positions, dtype)
        self._submit(header, packed, hidden)

    def _submit(self, header: StepHeader, packed: PackedStep, hidden: np.ndarray | jax.Array | None) -> None:
        post = self._posts.get((header.pipeline, header.stage))
        if post is None:
            log.debug("dropped step %d of pipeline %s: not of this epoch", header.step, header.pipeline)
            return
        try:
            post.thread.submit(self._run, post, header, packed, hidden)
        except RuntimeError:  # the thread was shut down: the pipeline is of the past
            log.debug("dropped step %d of pipeline %s", header.step, header.pipeline)

    def _run(self, post: _Post, header: StepHeader, packed: PackedStep, hidden: np.ndarray | jax.Array | None) -> None:
        """One step on one stage. How long masks are on their way says nothing of this machine, so nobody watches."""
        begun = time.monotonic()
        out = self._watched("step", header, partial(self._dispatch, post, header, packed, hidden))
        if out is not None:
            wanted = post.role.last and header.masked
            masks = self._masks.take(header.pipeline, header.step) if wanted else None
            self._watched("step", header, partial(self._finish, post, header, packed, out, masks, begun))

    def _watched(self, what: str, header: StepHeader, work: Callable[[], T]) -> T | None:
        """Whatever goes wrong is this instance's failure, not the end of the thread; then there is no result."""
        try:
            with self._watchdog.over(f"{what} {header.step} of pipeline {header.pipeline}"):
                return work()
        except Exception as problem:
            if (header.pipeline, header.stage) in self._posts:
                log.exception("%s %d of pipeline %s failed", what, header.step, header.pipeline)
                self._failed(f"a step failed: {problem}")
            return None

    def _dispatch(
        self, post: _Post, header: StepHeader, packed: PackedStep, hidden: np.ndarray | jax.Array | None
    ) -> jax.Array:
        """Starts it."""
        role, stage = post.role, post.role.stage
        rows: np.ndarray | jax.Array = packed.rows
        if header.follows is not None:
            rows = self._drawn[header.pipeline].fill_in(packed.rows, header.follows, stage.own[0])
        if role.ledger is not None:
            role.ledger.begin(header.sequences, packed.rows, packed.pages)
        out = stage.run(packed.shape, rows, packed.pages, hidden)
        if role.ledger is not None:
            role.ledger.written(header.sequences, packed.rows)
        return out

    def _finish(
        self, post: _Post, header: StepHeader, packed: PackedStep, out: jax.Array, masks: Masks | None, begun: float
    ) -> None:
        """Draws where this is the last stage; what it comes to is waited for in another thread."""
        role, stage = post.role, post.role.stage
        ready = header.ready and self._has(stage, header.want)
        if role.last:
            out = self._draw(stage, header, packed, out, masks)
        if self._hands_on(stage):
            hand_on = partial(self._hand_on, post, header, packed, out, ready, begun)
            post.reader.submit(self._watched, "the result of step", header, hand_on)

    def _draw(
        self, stage: Stage, header: StepHeader, packed: PackedStep, logits: jax.Array, masks: Masks | None
    ) -> jax.Array:
        """Starts to draw tokens, and keeps them for a step that follows."""
        words = spread_masks(masks, packed.shape.rows) if masks is not None else None
        own = logits.addressable_shards[0].data  # every shard holds all logits
        result, tokens = draw(self._model, stage.own[0], packed, own, words)
        self._drawn[header.pipeline].keep(header.step, tokens)
        return result

    def _hand_on(
        self, post: _Post, header: StepHeader, packed: PackedStep, out: jax.Array, ready: bool, begun: float
    ) -> None:
        """What becomes of a step's output on one stage; waits for it."""
        role = post.role
        if role.last:
            result = np.asarray(out)
            post.times.add(begun, time.monotonic())
            rows, columns = result.shape
            answer = ResultHeader(header.pipeline, header.step, rows, columns, ready)
            self._send(CONTROLLER, answer, result_payload(result))
            return
        onward = msgspec.structs.replace(header, stage=header.stage + 1, ready=ready)
        if role.next == self._name:
            self._submit(onward, packed, out)
        else:
            hidden = np.asarray(out.addressable_shards[0].data)
            post.times.add(begun, time.monotonic())
            self._send(role.next, onward, step_payload(packed, hidden))

    def _hands_on(self, stage: Stage) -> bool:
        """Whether it is this process that hands on what the stage computes."""
        return True

    def _has(self, stage: Stage, want: StepShape | None) -> bool:
        return want is not None and stage.has_block(want)
