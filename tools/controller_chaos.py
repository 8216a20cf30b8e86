"""Harm done to the controller: killed at awkward moments, frozen, sent to other times, left without room on its disk.

Workers are processes of their own and stay, unless they are killed with it. It is always started again, by us.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import random
import signal
import subprocess
import time

from spotjax.api.errors import Unavailable
from spotjax.errors import SpotjaxError
from spotjax.tools.chaos_schedule import KINDS, Event
from spotjax.tools.load import Load
from spotjax.tools.local_fleet import LATE_SECONDS, LocalFleet
from spotjax.tools.service import CHANGE_SECONDS, CHANGED, GRACE_SECONDS, POLL_SECONDS, NotInTime, ready
from spotjax.tools.small_disk import SmallDisk

BURST = 24
"""Requests that come in at once."""
FORWARD_SECONDS = 1e6
"""A jump of the monotonic clock that is longer than anything that is waited for."""


@functools.cache
def clocks() -> bool:
    """Whether a process can be given another monotonic time here: takes root, Linux and ``unshare``."""
    try:
        return subprocess.run((*another_time(FORWARD_SECONDS), "true"), capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def another_time(seconds: float) -> tuple[str, ...]:
    """What runs a command with monotonic clocks that are that much ahead."""
    offset = f"{round(seconds)}"
    return ("unshare", "--time", "--monotonic", offset, "--boottime", offset, "--fork", "--kill-child")


async def strike(fleet: LocalFleet, load: Load, event: Event, draw: random.Random) -> None:
    """Makes an event happen that strikes the controller; returns when it was started again or goes on.

    Raises:
      NotInTime: what was to happen before or after did not.
    """
    match event.kind:
        case "controller":
            await _restart(fleet, event.seconds)
        case "controller twice":
            await _restart(fleet)
            await asyncio.sleep(event.seconds)
            await _restart(fleet)
        case "controller at admission":
            load.burst(BURST)
            await asyncio.sleep(event.seconds)
            await _restart(fleet)
        case "controller in a change":
            await _die_in_a_change(fleet, event, draw.choice(("notice", "plan", "precopy", "switch")))
        case "controller in a join":
            since = len(fleet.events)
            await fleet.kill(event.targets)
            await fleet.bring(event.targets)
            joined = await fleet.until_said(("joined",), since, instance=event.targets[0])
            await fleet.until_said((draw.choice(("plan", "precopy")), *CHANGED), joined, GRACE_SECONDS)
            await asyncio.sleep(event.seconds)
            await _restart(fleet)
        case "controller in a drain":
            await _die_in_a_drain(fleet, event)
        case "controller and one":
            await fleet.kill_server()
            await fleet.kill(event.targets)
            await asyncio.sleep(event.seconds)
            fleet.start_server()
        case "controller and all":
            await fleet.kill_server()
            living = [name for name, worker in fleet.workers.items() if worker.exit_code is None]
            await fleet.kill(living)
            await fleet.bring(living)
            await asyncio.sleep(event.seconds)
            fleet.start_server()
        case "controller frozen":
            fleet.server.signal(signal.SIGSTOP)
            await asyncio.sleep(event.seconds)
            fleet.server.signal(signal.SIGCONT)
        case "controller elsewhen":
            jump = draw.choice((FORWARD_SECONDS, -0.9 * time.monotonic()))
            await _restart(fleet, 0.0, *another_time(jump))
            with contextlib.suppress(Unavailable):  # nobody is left
                await fleet.until("a mesh, or nobody", lambda status: status.ready or not ready(status))
            await asyncio.sleep(event.seconds)
            await _restart(fleet)
        case kind if KINDS[kind].needs == "disk" and fleet.disk is not None:
            await _fill_disk(fleet, event, fleet.disk)
        case _:
            raise ValueError(f"no such event: {event}")


async def _restart(fleet: LocalFleet, after: float = 0.0, *prefix: str) -> None:
    await fleet.kill_server()
    await asyncio.sleep(after)
    fleet.start_server(*prefix)


async def _fill_disk(fleet: LocalFleet, event: Event, disk: SmallDisk) -> None:
    disk.fill()
    match event.kind:
        case "loss with a full disk":
            await fleet.kill(event.targets)
        case "controller to a full disk":
            await _restart(fleet)
    await asyncio.sleep(event.seconds)
    if event.kind == "controller with a full disk":
        await fleet.kill_server()
    disk.free()
    if fleet.server.exit_code is not None:  # also if it would not start without room
        fleet.start_server()


async def _die_in_a_change(fleet: LocalFleet, event: Event, step: str) -> None:
    """One worker gets notice; the controller dies soon after a step of the change for it. Then the worker just goes."""
    (name,) = event.targets
    since = len(fleet.events)
    leaving = asyncio.create_task(fleet.leave(name))
    try:
        await fleet.until_said((step, *CHANGED), since, GRACE_SECONDS)
        await asyncio.sleep(event.seconds)
    finally:
        await _restart(fleet)
        await leaving


async def _die_in_a_drain(fleet: LocalFleet, event: Event) -> None:
    """The controller dies while an instance is drained. The next one knows nothing of that, and is asked again."""
    (name,) = event.targets
    draining = asyncio.create_task(fleet.client.drain(name))
    await asyncio.sleep(event.seconds)
    await _restart(fleet)
    await asyncio.gather(draining, return_exceptions=True)
    worker, deadline = fleet.workers[name], time.monotonic() + CHANGE_SECONDS
    with contextlib.suppress(Unavailable):  # it left, and was the last one
        while worker.exit_code is None and name not in ready(await fleet.status()):
            if time.monotonic() > deadline:
                raise NotInTime(f"{name} neither left nor came back when the controller died while it was drained")
            await asyncio.sleep(POLL_SECONDS)
    with contextlib.suppress(SpotjaxError):  # no mesh without it: it stays, and is killed
        await fleet.client.drain(name)
        await asyncio.to_thread(worker.wait, GRACE_SECONDS + LATE_SECONDS)
    await fleet.kill([name])
