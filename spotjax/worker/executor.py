"""Runs steps on this worker's stages: each stage in a thread of its own, results handed on as soon as they are there.

Frames come in from the data plane and go out to the next stage, or to the controller from the last. A frame of a
pipeline that is not installed belongs to another epoch and is dropped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import jax
import msgspec
import numpy as np

from spotjax.protocol.steps import ResultHeader, StepHeader, read_step, result_payload, step_payload
from spotjax.runtime.buckets import StepShape
from spotjax.runtime.compiled import CompiledModel
from spotjax.runtime.stage import Stage
from spotjax.runtime.step import PackedStep
from spotjax.worker.ledger import StageLedger
from spotjax.worker.watchdog import Watchdog

log = logging.getLogger(__name__)

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
    """

    stage: Stage
    number: int
    last: bool
    next: str
    ledger: StageLedger | None = None


@dataclass(frozen=True)
class _Post:
    """A role and the thread that fills it."""

    role: Role
    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="stage"))


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

    def install(self, roles: Mapping[tuple[str, int], Role]) -> None:
        """Makes these the roles, by pipeline and stage number. Pipelines that were there before go on undisturbed."""
        before = self._posts
        self._posts = {
            key: _Post(role, before[key].thread) if key in before else _Post(role) for key, role in roles.items()
        }
        for key, post in before.items():
            if key not in self._posts:
                post.thread.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """Gives up all roles; waits for steps under way."""
        before, self._posts = self._posts, {}
        for post in before.values():
            post.thread.shutdown(wait=True, cancel_futures=True)

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
            post.thread.submit(self._run, post.role, header, packed, hidden)
        except RuntimeError:  # the thread was shut down: the pipeline is of the past
            log.debug("dropped step %d of pipeline %s", header.step, header.pipeline)

    def _run(self, role: Role, header: StepHeader, packed: PackedStep, hidden: np.ndarray | jax.Array | None) -> None:
        """One step on one stage. Whatever goes wrong is this instance's failure, not the end of the thread."""
        try:
            with self._watchdog.over(f"step {header.step} of pipeline {header.pipeline}"):
                self._step(role, header, packed, hidden)
        except Exception as problem:
            if (header.pipeline, header.stage) in self._posts:
                log.exception("step %d of pipeline %s failed", header.step, header.pipeline)
                self._failed(f"a step failed: {problem}")

    def _step(self, role: Role, header: StepHeader, packed: PackedStep, hidden: np.ndarray | jax.Array | None) -> None:
        ready = header.ready and self._has(role.stage, header.want)
        if role.ledger is not None:
            role.ledger.begin(header.sequences, packed.rows, packed.pages)
        out = role.stage.run(packed.shape, packed.rows, packed.pages, hidden)
        if role.ledger is not None:
            role.ledger.written(header.sequences, packed.rows)
        self._hand_on(role, header, packed, out, ready)

    def _hand_on(self, role: Role, header: StepHeader, packed: PackedStep, out: jax.Array, ready: bool) -> None:
        """What becomes of a step's output on one stage; waits for it."""
        if role.last:
            result = self._draw(role.stage, packed, out)
            rows, columns = result.shape
            answer = ResultHeader(header.pipeline, header.step, rows, columns, ready)
            self._send(CONTROLLER, answer, result_payload(result))
            return
        onward = msgspec.structs.replace(header, stage=header.stage + 1, ready=ready)
        if role.next == self._name:
            self._submit(onward, packed, out)
        else:
            self._send(role.next, onward, step_payload(packed, np.asarray(out.addressable_shards[0].data)))

    def _draw(self, stage: Stage, packed: PackedStep, logits: jax.Array) -> np.ndarray:
        device = stage.devices[0]
        draw = self._model.sample(device, packed.variant, packed.shape.rows)
        # every shard holds all logits
        return np.asarray(draw(logits.addressable_shards[0].data, jax.device_put(packed.controls, device)))

    def _has(self, stage: Stage, want: StepShape | None) -> bool:
        return want is not None and stage.has_block(want)
