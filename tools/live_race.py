"""One service with one recovery policy, real processes, through a workload and whatever happens to its instances.

What is measured is what clients see. What the answers should be comes from a service to which nothing happens.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from spotjax.engine.generation import Delta
from spotjax.errors import SpotjaxError
from spotjax.fleet.change import Recovery
from spotjax.fleet.status import FleetEvent
from spotjax.planner.profile import MeasuredProfile
from spotjax.tools.cpu_limits import CpuLimits
from spotjax.tools.live_trace import Happening, Question, Workload, ends, first
from spotjax.tools.local_fleet import LocalFleet
from spotjax.tools.processes import Process
from spotjax.tools.service import running

PROFILE_SECONDS = 300.0
SETTLED_SECONDS = 1.5
"""Without an event of the service: whoever was to join has, and the mesh is that of all."""


@dataclass(frozen=True)
class Setup:
    """What all services of a race have in common.

    Attributes:
      directory: for logs.
      model: path of the model.
      programs: directory of compiled programs, which all use.
      memory: bytes of each instance's device.
      stages: instances that a replica needs at least, which is what rerouting makes its replicas of.
      max_batch, max_positions, prefill_tokens: settings of the server.
      grace: seconds of notice.
      limits: of the instances' processors, None for none.
      read_bandwidth: bytes per second at which an instance reads parameters at most; 0 for no limit.
    """

    directory: Path
    model: Path
    programs: Path
    memory: int
    stages: int
    max_batch: int
    max_positions: int
    prefill_tokens: int
    grace: float
    limits: CpuLimits | None
    read_bandwidth: int = 0


@dataclass
class Answer:
    """What a client saw of one request.

    Attributes:
      question: its name.
      arrival: seconds from the start at which it was due.
      tokens: that came, in order.
      times: seconds from the start at which each came.
      repeated: tokens that came again.
      done: seconds from the start at which it ended; None if it did not.
      problem: an error that ended it, for people.
    """

    question: str
    arrival: float
    tokens: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    repeated: int = 0
    done: float | None = None
    problem: str = ""

    def take(self, delta: Delta, seconds: float) -> None:
        """A piece of output."""
        again = min(max(0, len(self.tokens) - delta.offset), len(delta.tokens))
        self.repeated += again
        if delta.offset > len(self.tokens):
            self.problem = f"token {delta.offset} came after {len(self.tokens)}"
        self.tokens += delta.tokens[again:]
        self.times += [seconds] * (len(delta.tokens) - again)
        if delta.finish is not None:
            self.done = seconds


@dataclass
class Run:
    """What came of one service.

    Attributes:
      recovery: its policy.
      arrivals: its workload.
      answers: one for each request.
      seconds: from the start until the last request had ended, or was given up.
      events: what the service said, with seconds from the start.
      starts: by instance, seconds from the start of its process until it joined.
      load: of the machine at the end, averaged over a minute: runs are comparable where it is about the same.
    """

    recovery: Recovery
    arrivals: str
    answers: list[Answer] = field(default_factory=list)
    seconds: float = 0.0
    events: list[FleetEvent] = field(default_factory=list)
    starts: dict[str, float] = field(default_factory=dict)
    load: float = 0.0


class LimitedFleet(LocalFleet):
    """Workers that have only so much of a processor each, once they are ready to run."""

    def __init__(self, setup: Setup, recovery: Recovery, names: Sequence[str], label: str) -> None:
        flags = ["--model", str(setup.model), "--recovery", recovery, "--max-batch", str(setup.max_batch)]
        flags += ["--max-model-len", str(setup.max_positions), "--prefill-tokens", str(setup.prefill_tokens)]
        flags += ["--dtype", "float32", "--no-fuse"]  # compiling beside serving would be paid by whoever runs first
        flags += ["--no-prefix-cache"]  # prompts are repeated
        if recovery == "rerouting":
            flags += ["--mesh", f"{len(names) // setup.stages}x{setup.stages}x1"]
        worker = ["--devices-per-instance", "1", "--instance-memory-bytes", str(setup.memory)]
        worker += ["--read-bandwidth", str(setup.read_bandwidth)]
        worker += ["--compilation-cache", str(setup.programs), "--grace-seconds", f"{setup.grace:g}"]
        super().__init__(setup.directory / label, names, flags, worker)
        self.limits: CpuLimits | None = None
        self._label = label

    def limit(self, limits: CpuLimits | None) -> None:
        """Limits all workers from now on, also those to come."""
        self.limits = limits
        for name, worker in self.workers.items():
            self._admit(name, worker)

    def spawn(self, name: str, *arguments: str) -> Process:
        """The same, limited from the first moment if others are."""
        worker = super().spawn(name, *arguments)
        self._admit(name, worker)
        return worker

    def _admit(self, name: str, worker: Process) -> None:
        if self.limits is not None:
            for process in worker.tree():
                self.limits.admit(f"{self._label}-{name}", process.pid)


async def race(
    setup: Setup, recovery: Recovery, trace: Sequence[Happening], workload: Workload, patience: float
) -> Run:
    """One service through it all.

    Args:
      setup: what all have in common.
      recovery: the policy.
      trace: what happens to its instances.
      workload: what is asked of it.
      patience: seconds after the last arrival at which requests that have not ended are given up.

    Raises:
      NotInTime: it does not start.
    """
    run, names = Run(recovery, workload.arrivals), first(trace)
    fleet = LimitedFleet(setup, recovery, names, f"{workload.arrivals}-{recovery}")
    async with running(fleet):
        await _settled(fleet)
        fleet.limit(setup.limits)
        started, wall = time.monotonic(), time.time()
        market = asyncio.create_task(_happen(fleet, trace, setup.grace, started, run))
        run.answers = [Answer(q.name, seconds) for q, seconds in zip(workload.asked, workload.times, strict=True)]
        asking = [
            asyncio.create_task(_ask(fleet, question, answer, started))
            for question, answer in zip(workload.asked, run.answers, strict=True)
        ]
        last = max(workload.times, default=0.0)
        _, late = await asyncio.wait([*asking, market], timeout=last + patience)
        run.seconds, run.load = time.monotonic() - started, os.getloadavg()[0]
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        if not market.cancelled():
            market.result()
        run.events = [
            FleetEvent(event.time - wall, event.kind, event.epoch, event.message, event.fields)
            for event in fleet.events
        ]
        for event in run.events:
            if event.kind == "joined" and (name := str(event.fields.get("instance"))) in run.starts:
                run.starts[name] = event.time - run.starts[name]
        run.starts = {name: seconds for name, seconds in run.starts.items() if name in _joined(run.events)}
    return run


async def reference(
    setup: Setup, names: Sequence[str], questions: Sequence[Question], batches: Sequence[int]
) -> tuple[dict[str, tuple[int, ...]], list[dict[str, float]], str]:
    """What an undisturbed service answers, and how long it takes.

    Returns: the right tokens by question; by batch, seconds to the first token of prompts of ``prompt`` tokens that
    come at once, and between two tokens; the shape of the mesh.
    """
    fleet = LimitedFleet(setup, "spotjax", names, "reference")
    async with running(fleet):
        await _settled(fleet)
        start = time.monotonic()
        answers = [Answer(question.name, 0.0) for question in questions]
        await asyncio.gather(*(_ask(fleet, q, a, start) for q, a in zip(questions, answers, strict=True)))
        if broken := [answer.problem for answer in answers if answer.problem]:
            raise SpotjaxError(f"the undisturbed service fails: {broken[0]}")
        fleet.limit(setup.limits)
        longest = max(questions, key=lambda question: len(question.prompt))
        measured = [await _measured(fleet, longest, batch) for batch in batches]
        placement = (await fleet.status()).placement
    return {answer.question: tuple(answer.tokens) for answer in answers}, measured, str(placement and placement.shape)


async def profile(setup: Setup) -> MeasuredProfile:
    """Latencies of the model's stages on one whole core: what a simulator is fed with.

    Not on an instance's part of a core: short calls would be over before the limit is felt.

    Raises:
      SpotjaxError: it cannot be measured.
    """
    path = setup.directory / "profile.json"
    command = (sys.executable, "-m", "spotjax", "profile", "--model", str(setup.model), "--out", str(path))
    measuring = Process("profile", (*command, "--repeats", "3"), setup.directory)
    os.sched_setaffinity(measuring.pid, {min(os.sched_getaffinity(0))})
    if await asyncio.to_thread(measuring.wait, PROFILE_SECONDS):
        raise SpotjaxError(f"measuring a profile failed:\n{measuring.tail()}")
    return MeasuredProfile.from_json(path.read_text())


async def _settled(fleet: LimitedFleet) -> None:
    """Waits until all instances are there and the mesh has not changed for a while."""
    await fleet.until_ready()
    seen = 0
    while seen < len(fleet.events):
        seen = len(fleet.events)
        await asyncio.sleep(SETTLED_SECONDS)


async def _happen(fleet: LimitedFleet, trace: Sequence[Happening], grace: float, started: float, run: Run) -> None:
    """Does to the instances what the trace says; those that had notice are taken when it is over."""
    taken = ends(trace, grace)
    steps = [(one.seconds, one.what, one.name) for one in trace if one.seconds > 0]
    steps += [(taken[one.name], "kill", one.name) for one in trace if one.what == "leave"]
    for seconds, what, name in sorted(steps):
        await asyncio.sleep(started + seconds - time.monotonic())
        fleet.note(f"{what} {name}")
        if what == "join":
            run.starts[name] = time.monotonic() - started
            fleet.spawn(name)
        elif what == "leave":
            fleet.workers[name].signal(signal.SIGTERM, whole=False)
        else:
            await fleet.kill([name])


async def _ask(fleet: LimitedFleet, question: Question, answer: Answer, started: float) -> None:
    """One client; it comes when it is due, whatever became of the others."""
    await asyncio.sleep(started + answer.arrival - time.monotonic())
    try:
        deltas = fleet.client.generate(question.prompt, max_tokens=question.output, temperature=0.0, ignore_eos=True)
        async with contextlib.aclosing(deltas):
            async for delta in deltas:
                answer.take(delta, time.monotonic() - started)
    except SpotjaxError as error:
        answer.problem = f"{type(error).__name__}: {error}"


async def _measured(fleet: LimitedFleet, question: Question, batch: int) -> dict[str, float]:
    """So many equal requests at once."""
    started = time.monotonic()
    answers = [Answer(question.name, 0.0) for _ in range(batch)]
    await asyncio.gather(*(_ask(fleet, question, answer, started) for answer in answers))
    every = [answer.times for answer in answers]
    return {
        "batch": batch,
        "prompt": len(question.prompt),
        "prefill_seconds": statistics.mean(times[0] for times in every),
        "step_seconds": statistics.mean((times[-1] - times[0]) / (len(times) - 1) for times in every),
    }


def _joined(events: Sequence[FleetEvent]) -> set[str]:
    return {str(event.fields.get("instance")) for event in events if event.kind == "joined"}


def wrong_tokens(answers: Sequence[Answer], expected: Mapping[str, Sequence[int]]) -> tuple[int, int, int]:
    """Tokens that should have come to clients whose request ended and did not; came twice; are others."""
    lost = repeated = other = 0
    for answer in answers:
        right = expected[answer.question]
        repeated += answer.repeated + max(0, len(answer.tokens) - len(right))
        if answer.done is not None or answer.problem:
            lost += max(0, len(right) - len(answer.tokens))
        other += sum(token != wanted for token, wanted in zip(answer.tokens, right, strict=False))
    return lost, repeated, other
