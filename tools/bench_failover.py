"""How long tokens pause when something happens to a fleet: ``python -m spotjax.tools.bench_failover``.

A controller and worker processes on this machine, one replica of as many stages as there are workers. Under load from
concurrent streams, an instance is killed, falls silent, gives notice or joins; the pause is the largest time between
two tokens of one stream, and is stated over the median time between two tokens just before. What it is made of is
read off the fleet's own events; functions that jax compiled in it are counted in the workers' logs. Losses without
notice are measured with and without KV backup. Every output is compared with the undisturbed one. ``--output FILE``
writes JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from spotjax.fleet.status import FleetStatus
from spotjax.tools.load import Load, answers, longest, median_gap
from spotjax.tools.local_fleet import LocalFleet
from spotjax.tools.request_mix import LINES, SPEAKERS, Output, Request
from spotjax.tools.service import running

NEW_TOKENS = 400
CALM_TOKENS = 40
"""Tokens of every stream before an event, of which the median time between two is taken, and after it."""
WAIT_SECONDS = 120.0
PHASES = ("detected", "planned", "parameters", "switched", "first_token")
console = Console(width=None if sys.stdout.isatty() else 200)


@dataclass(frozen=True)
class Kind:
    """A kind of event.

    Attributes:
      name: for people.
      victims: numbers of the stages that it happens to, counted as in a list, given how many there are.
      announced: nothing is to be recomputed, so that KV backup does not matter.
      allowance: seconds of the goal, besides three median steps.
    """

    name: str
    victims: Callable[[int], Sequence[int]]
    announced: bool = False
    allowance: float = 0.3


def kinds(lease: float) -> list[Kind]:
    """All kinds of events that are measured."""
    return [
        Kind("first stage killed", lambda stages: [0]),
        Kind("middle stage killed", lambda stages: [stages // 2]),
        Kind("last stage killed", lambda stages: [stages - 1]),
        Kind("two killed at once", lambda stages: [1, stages - 1]),
        Kind("silent host", lambda stages: [stages // 2], allowance=lease + 0.3),
        Kind("announced leave", lambda stages: [stages // 2], announced=True, allowance=0.0),
        Kind("join", lambda stages: [stages - 1], announced=True, allowance=0.0),
    ]


@dataclass
class Pause:
    """One event and what came of it; seconds.

    Attributes:
      event: kind of event.
      backup: whether KV was backed up.
      step: median time between two tokens just before.
      gap: largest time between two tokens of one stream across the event.
      phases: from the event to the end of each phase, as far as the fleet said so.
      kept, recomputed: running sequences that kept their KV, or not.
      compiled: functions that jax compiled in workers between the event and the token that ended the gap.
    """

    event: str
    backup: bool
    step: float
    gap: float
    phases: dict[str, float] = field(default_factory=dict)
    kept: int = 0
    recomputed: int = 0
    compiled: int = 0

    @property
    def steps(self) -> float:
        """The gap in median steps."""
        return self.gap / self.step


def stages_of(status: FleetStatus) -> list[str]:
    """Instances of the first replica's stages."""
    placement = status.placement
    return [placement.group(0, p)[0].instance for p in range(placement.shape.stage)] if placement else []


async def healthy(fleet: LocalFleet) -> list[str]:
    """Brings everybody back and waits for the full pipeline; its instances in order."""
    if missing := await fleet.missing():
        await fleet.bring(missing)
    await fleet.until(
        "the full pipeline", lambda s: s.ready and len(stages_of(s)) == len(fleet.names), seconds=WAIT_SECONDS
    )
    return stages_of(await fleet.status())


async def enough_tokens(load: Load, since: int, count: int) -> None:
    """Waits until clients have seen ``count`` tokens beyond ``since``."""
    if not await load.until(lambda: load.tokens >= since + count, WAIT_SECONDS) or load.problems:
        raise SystemExit("\n".join(load.problems or [f"only {load.tokens - since} of {count} tokens came"]))


async def measure(
    fleet: LocalFleet, kind: Kind, backup: bool, requests: Sequence[Request], expected: Mapping[str, Output],
    streams: int,
) -> Pause:  # fmt: skip
    """Lets one event happen under load."""
    pipeline = await healthy(fleet)
    victims = [pipeline[number] for number in kind.victims(len(pipeline))]
    if kind.name == "join":
        await fleet.leave(victims[0])
        await fleet.until_gone(victims)
    load = Load(fleet.client, requests, expected, streams, seed=len(fleet.history))
    try:
        await enough_tokens(load, 0, CALM_TOKENS * streams)  # prompts are done
        calm = time.monotonic()
        await enough_tokens(load, load.tokens, CALM_TOKENS * streams)
        since, moment = len(fleet.events), time.monotonic()
        step = median_gap(load.streams, calm, moment)
        if kind.name == "join":
            await fleet.bring(victims)
            await fleet.until(
                "a newcomer at work", lambda s: s.ready and victims[0] in stages_of(s), seconds=WAIT_SECONDS
            )
            joined = next(event.time for event in fleet.events[since:] if event.kind == "joined")
            moment = joined - time.time() + time.monotonic()
        else:
            await act(fleet, kind.name, victims)
        seen = load.tokens
        await enough_tokens(load, seen, CALM_TOKENS * streams)
        pause = Pause(kind.name, backup, step, 0.0)
        describe(pause, fleet, load, since, moment)
        if kind.name == "silent host":
            fleet.workers[victims[0]].signal(signal.SIGCONT)
    finally:
        await load.stop(WAIT_SECONDS)
    if load.problems:
        raise SystemExit("\n".join([*load.problems, fleet.story()]))
    return pause


async def act(fleet: LocalFleet, name: str, victims: Sequence[str]) -> None:
    """Makes an event happen; returns when the fleet has done something about it."""
    since = len(fleet.events)
    if name == "silent host":
        fleet.workers[victims[0]].signal(signal.SIGSTOP)
    elif name == "announced leave":
        await fleet.leave(victims[0])
    else:
        await fleet.kill(victims)
    deadline = time.monotonic() + WAIT_SECONDS
    while not any(event.kind == "switch" for event in fleet.events[since:]) and time.monotonic() < deadline:
        await asyncio.sleep(0.01)


def describe(pause: Pause, fleet: LocalFleet, load: Load, since: int, moment: float) -> None:
    """Fills in what tokens, events and logs say about the time from ``moment`` on."""
    wall = time.time() - time.monotonic()
    begin, end = longest(load.streams, moment, time.monotonic())
    pause.gap = end - begin
    events = fleet.events[since:]
    for phase, said in zip(PHASES, (("lost", "notice", "joined"), ("plan",), ("precopy",), ("switch",)), strict=False):
        times = [event.time - wall - moment for event in events if event.kind in said]
        if times:
            pause.phases[phase] = times[0]
    pause.phases["first_token"] = end - moment
    for event in events:
        if event.kind == "switch":
            pause.kept += int(event.fields.get("kept", 0))
            pause.recomputed += int(event.fields.get("recomputed", 0))
    pause.compiled = sum(
        moment <= float(record["time"]) - wall <= end
        for worker in fleet.workers.values()
        for record in worker.records()
        if "time" in record and str(record["message"]).startswith("Finished XLA compilation")
    )


async def bench(arguments: argparse.Namespace) -> list[Pause]:
    """All events, without and with KV backup."""
    names = [f"instance-{number}" for number in range(arguments.instances)]
    mesh = f"1x{arguments.instances}x{arguments.devices_per_instance}"
    requests = [
        Request(
            f"stream-{number}",
            f"{speaker}.\n{LINES[number % len(LINES)]}\n",
            {"temperature": 0.8, "seed": arguments.seed + number, "max_tokens": NEW_TOKENS, "ignore_eos": True},
        )
        for number, speaker in enumerate(SPEAKERS)
    ]
    pauses: list[Pause] = []
    for backup in (True, False):
        with contextlib.ExitStack() as stack:
            directory = arguments.logs or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="failover-")))
            flags = ("--model", arguments.model, "--mesh", mesh, "--kv-backup" if backup else "--no-kv-backup")
            devices = ("--devices-per-instance", str(arguments.devices_per_instance))
            log = {"JAX_LOG_COMPILES": "1"}
            fleet = LocalFleet(directory / f"backup-{backup}", names, flags, devices, environment=log)
            async with running(fleet):
                expected = await answers(fleet.client, requests)
                for kind in kinds(arguments.lease):
                    if kind.announced and not backup:
                        continue
                    for _ in range(arguments.repeats):
                        with console.status(f"{kind.name}, KV backup {'on' if backup else 'off'}"):
                            pause = await measure(fleet, kind, backup, requests, expected, arguments.streams)
                        pauses.append(pause)
    return pauses


def table(pauses: Sequence[Pause], lease: float) -> Table:
    """Medians over the repeats, one line for each kind of event."""
    shown = Table(title="pause of running streams, ms (medians; detected ... first token: since the event)")
    headings = (
        "event",
        "KV backup",
        "step",
        "pause",
        "worst",
        "steps",
        "goal",
        *PHASES,
        "kept",
        "recomputed",
        "compiled",
    )
    for heading in headings:
        shown.add_column(heading.replace("_", " "), justify="left" if heading == "event" else "right")
    for kind in kinds(lease):
        for backup in (True, False):
            of = [pause for pause in pauses if pause.event == kind.name and pause.backup == backup]
            if not of:
                continue
            step, gap = (statistics.median(getattr(pause, name) for pause in of) for name in ("step", "gap"))
            goal = kind.allowance + 3 * step
            met = "" if not backup else " [green]met[/green]" if gap <= goal else " [red]missed[/red]"
            phases = (_milliseconds([pause.phases[phase] for pause in of if phase in pause.phases]) for phase in PHASES)
            shown.add_row(
                kind.name, "on" if backup else "off", f"{1e3 * step:.1f}", f"{1e3 * gap:.0f}{met}",
                f"{1e3 * max(pause.gap for pause in of):.0f}", f"{gap / step:.1f}", f"{1e3 * goal:.0f}", *phases,
                *(str(sum(getattr(pause, name) for pause in of)) for name in ("kept", "recomputed", "compiled")),
            )  # fmt: skip
    return shown


def _milliseconds(values: Sequence[float]) -> str:
    return f"{1e3 * statistics.median(values):.0f}" if values else ""


def machine(seed: int) -> dict[str, Any]:
    """What the figures were taken on."""
    return {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "jax": version("jax"),
        "spotjax": version("spotjax"),
        "seed": seed,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--instances", type=int, default=4, help="workers, each a stage")
    parser.add_argument("--devices-per-instance", type=int, default=2)
    parser.add_argument("--streams", type=int, default=4, help="concurrent streams")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--lease", type=float, default=2.0, help="seconds, as the controller has it by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--logs", type=Path, help="directory to keep all logs in")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    pauses = asyncio.run(bench(arguments))
    console.print(table(pauses, arguments.lease))
    console.print(machine(arguments.seed))
    if arguments.output:
        rows = [asdict(pause) | {"steps": pause.steps} for pause in pauses]
        arguments.output.write_text(json.dumps({"machine": machine(arguments.seed), "pauses": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
