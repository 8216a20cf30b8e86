"""Fleets of worker processes small enough for tests, and load on them."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path

from spotjax.fleet.status import FleetEvent, FleetStatus
from spotjax.tools.load import Load
from spotjax.tools.local_fleet import LocalFleet
from spotjax.tools.request_mix import KINDS, Output, Request, mix
from spotjax.tools.service import POLL_SECONDS, Service

NAMES = [f"instance-{number}" for number in range(4)]
SHAPES = {"max_batch": 4, "prefill_tokens": 32, "max_model_len": 256, "kv_pages": 128}
"""The same few shapes and as many pages wherever the shipped model is served, so that little is compiled, and once."""
SHAPE_FLAGS = ("--max-batch", "4", "--prefill-tokens", "32", "--max-model-len", "256", "--kv-pages", "128")
CONTROLLER = (*SHAPE_FLAGS, "--no-fuse")
REQUESTS = mix(7, len(KINDS), longest=48)
"""One of each kind."""
DONE_SECONDS = 120.0


def worker_flags(programs: Path) -> tuple[str, ...]:
    """Flags of every worker."""
    return ("--devices-per-instance", "2", "--compilation-cache", str(programs))


class SlowFleet(LocalFleet):
    """A fleet whose devices take some milliseconds over a step, and leave the processors to others meanwhile."""

    WORKER = (sys.executable, str(Path(__file__).with_name("slow_devices.py")), "--log-format", "json")


@contextlib.asynccontextmanager
async def load_on(
    fleet: Service, expected: Mapping[str, Output], clients: int = 4, requests: Sequence[Request] = REQUESTS
) -> AsyncIterator[Load]:
    """Requests run when the body begins; after it they are let end, all as expected."""
    load = Load(fleet.client, requests, expected, clients, seed=len(fleet.history))
    try:
        assert await load.until(lambda: load.tokens >= 10 * clients, DONE_SECONDS), fleet.story()
        yield load
    finally:
        await load.stop(DONE_SECONDS)
    assert not load.problems, "\n".join([*load.problems, fleet.story()])


async def more_tokens(load: Load, count: int) -> None:
    """Waits until clients have seen so many tokens more."""
    wanted = load.tokens + count
    assert await load.until(lambda: load.tokens >= wanted, DONE_SECONDS), f"{load.tokens} of {wanted} tokens came"


async def eventually(what: str, condition: Callable[[], bool]) -> None:
    """Waits until something holds that nobody tells us of."""
    deadline = time.monotonic() + DONE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"not within {DONE_SECONDS:g} s: {what}"
        await asyncio.sleep(POLL_SECONDS)


def stages(status: FleetStatus) -> list[str]:
    """Instances of the first replica's stages, in order; none while there is no mesh."""
    placement = status.placement
    if placement is None:
        return []
    return [placement.group(0, stage)[0].instance for stage in range(placement.shape.stage)]


def said(fleet: LocalFleet, kind: str, since: int) -> list[FleetEvent]:
    """Events of one kind among those after the first ``since``."""
    return [event for event in fleet.events[since:] if event.kind == kind]


async def heard(fleet: LocalFleet, kind: str, since: int) -> FleetEvent:
    """The only event of a kind after the first ``since``; waits for it: events come on a connection of their own."""
    await fleet.until_said({kind}, since, DONE_SECONDS)
    (event,) = said(fleet, kind, since)
    return event
