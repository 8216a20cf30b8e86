"""One whole run of chaos: undisturbed outputs, load, events, and all promises checked at the end.

``spotjax.tools.soak`` and ``tests/live`` run it.
"""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from spotjax.errors import SpotjaxError
from spotjax.tools.chaos import Chaos, Outcome, possible
from spotjax.tools.chaos_schedule import Event, schedule
from spotjax.tools.load import Load, answers, median_gap
from spotjax.tools.processes import Usage
from spotjax.tools.request_mix import Output, Request, mix
from spotjax.tools.restarts import Restart, disagreements, restarts
from spotjax.tools.service import NotInTime, Service

COMPLETE_SECONDS = 90.0
"""How long the last requests may take when everybody is back."""
SLACK = Usage(processes=0, files=8, sockets=12, threads=12, memory=160 * 2**20)
"""By how much what a process holds may grow between the begin and the end of a run: pools fill, caches fill."""
CALM_TOKENS = 400
"""Tokens before the first event, of which the median time between two is taken."""

Progress = Callable[[Load, Chaos, Event], bool]


@dataclass
class Report:
    """What came of a run.

    Attributes:
      seed: of everything.
      problems: broken promises, for people; empty if all were kept.
      outcomes: events and their pauses.
      step: median seconds between two tokens of a stream, undisturbed.
      asked, requests, tokens: how many there were of requests; how many came to their end, as expected.
      restarts: of the server, as far as tokens came after them.
      seconds: from the first request to the last.
      usage: what each process held before and after.
      story: what happened, filled in if there are problems.
    """

    seed: int
    problems: list[str] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    step: float = 0.0
    asked: int = 0
    requests: int = 0
    tokens: int = 0
    restarts: list[Restart] = field(default_factory=list)
    seconds: float = 0.0
    usage: dict[str, tuple[Usage, Usage]] = field(default_factory=dict)
    story: str = ""

    def __str__(self) -> str:
        worst = max((outcome.gap for outcome in self.outcomes), default=0.0)
        summary = (
            f"seed {self.seed}: {len(self.outcomes)} events, {self.requests} of {self.asked} requests and "
            f"{self.tokens} tokens in {self.seconds:.1f} s, median step {1e3 * self.step:.1f} ms, longest pause "
            f"{worst:.2f} s"
        )
        return "\n".join([summary, *self.problems, self.story])


async def run(
    service: Service,
    seed: int,
    events: int | Sequence[Event],
    clients: int = 8,
    requests: int = 24,
    expected: Mapping[str, Output] | None = None,
    progress: Progress = lambda load, chaos, event: True,
) -> Report:
    """Runs ``events`` (drawn by seed if a number) on a service that serves, stops it, and checks everything.

    Args:
      service: just started.
      seed: of requests, their order and events.
      events: how many, or which.
      clients: requests at once.
      requests: different requests.
      expected: their undisturbed outputs, by default what the service says before the first event.
      progress: called before each event; False ends the run early.
    """
    report, wanted = Report(seed), mix(seed, requests)
    chosen = schedule(seed, events, service.names, possible(service)) if isinstance(events, int) else events
    try:
        expected = expected or await answers(service.client, wanted)
        load = await _disturbed(service, report, wanted, expected, chosen, clients, progress)
        report.problems += [*await restless(service), *grown(report.usage)]
        if (code := await service.stop()) != 0:
            report.problems.append(f"the server ended with code {code}")
        report.problems += [*service.left(), *disagreements(service, load)]
    except (NotInTime, SpotjaxError, subprocess.TimeoutExpired) as problem:
        report.problems.append(f"{type(problem).__name__}: {problem}")
    if report.problems:
        report.story = service.story()
    return report


async def _disturbed(
    service: Service,
    report: Report,
    wanted: Sequence[Request],
    expected: Mapping[str, Output],
    events: Sequence[Event],
    clients: int,
    progress: Progress,
) -> Load:
    """Load and events, until the last request has ended; fills the report in."""
    begin = time.monotonic()
    load = Load(service.client, wanted, expected, clients, report.seed)
    chaos = Chaos(service, load, report.seed)
    try:
        await load.until(lambda: load.tokens >= CALM_TOKENS, COMPLETE_SECONDS)
        report.step = median_gap(load.streams, begin, time.monotonic())
        before = service.usage()
        for event in events:
            if load.problems or not progress(load, chaos, event):
                break
            await chaos.happen(event)
        await chaos.heal()
        await load.until(lambda: False, 1.0)  # everybody takes part again
    except statistics.StatisticsError:
        load.problems.append(f"{load.tokens} tokens before the first event, too few to begin")
    finally:
        report.outcomes = chaos.outcomes()
        for begin_of, end_of in sorted({outcome.pause for outcome in report.outcomes}):
            service.note(f"    tokens of a stream paused for {end_of - begin_of:.3f} s", at=end_of)
        await load.stop(COMPLETE_SECONDS)
        report.problems += load.problems
        report.asked, report.requests, report.tokens = load.asked, load.finished, load.tokens
        report.seconds = time.monotonic() - begin
        report.restarts = restarts(service.lives, load.streams)
        await chaos.close()
    after = service.usage()
    report.usage = {name: (before[name], after[name]) for name in before if name in after}
    return load


async def restless(service: Service) -> list[str]:
    """What a service without requests still holds of them."""
    status = await service.status()
    held = [
        f"replica {replica.data} holds {replica.pages_used} KV pages"
        for replica in status.replicas
        if replica.pages_used
    ]
    if status.requests_running or status.queued:
        held.append(f"{status.requests_running} requests run and {status.queued} wait, though all have ended")
    return held


def grown(usage: Mapping[str, tuple[Usage, Usage]]) -> list[str]:
    """What has grown by more than ``SLACK`` in processes."""
    return [
        f"{name} has {what} {getattr(after, what)}, it had {getattr(before, what)}"
        for name, (before, after) in usage.items()
        for what in ("processes", "files", "sockets", "threads", "memory")
        if getattr(after, what) - getattr(before, what) > getattr(SLACK, what)
    ]
