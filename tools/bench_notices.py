"""How soon a notice is at the controller: ``python -m spotjax.tools.bench_notices``.

A controller and workers on this machine, each worker with a stand-in for Compute Engine's metadata server. The servers
tell of a live migration and take it back, again and again, which changes nothing about the mesh. What is measured is
from the moment that the server's answer was written to the controller's event, by the machine's clock: with an idle
fleet, and with one that decodes as fast as it can. ``--output FILE`` writes JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from spotjax.fleet.status import FleetEvent
from spotjax.tools.load import Load, answers
from spotjax.tools.local_fleet import LocalFleet
from spotjax.tools.metadata import MetadataProcess
from spotjax.tools.request_mix import mix
from spotjax.tools.service import POLL_SECONDS, running

KEY, TOLD, BACK = "instance/maintenance-event", "MIGRATE_ON_HOST_MAINTENANCE", "NONE"
CONTROLLER = ("--max-batch", "8", "--prefill-tokens", "64", "--max-model-len", "512", "--no-fuse")
WAIT_SECONDS = 60.0


async def measure(fleet: LocalFleet, servers: dict[str, MetadataProcess], repeats: int) -> list[float]:
    """Seconds from answer to event, of every notice and withdrawal."""
    seconds = []
    for number in range(repeats):
        name = sorted(servers)[number % len(servers)]
        for value, kind in ((TOLD, "notice"), (BACK, "withdrawn")):
            since, began = len(fleet.events), time.time()
            await servers[name].order("tell", key=KEY, value=value)
            event = await _heard(fleet, name, kind, since)
            answered = await servers[name].answered(value, began)
            assert answered is not None, "the fleet knows it from there"
            seconds.append(event.time - answered)
    return seconds


async def _heard(fleet: LocalFleet, name: str, kind: str, since: int) -> FleetEvent:
    async with asyncio.timeout(WAIT_SECONDS):
        while True:
            for event in fleet.events[since:]:
                if event.kind == kind and event.fields["instance"] == name:
                    return event
            await asyncio.sleep(POLL_SECONDS)


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Median, 90th and 99th percentile and maximum, in milliseconds."""
    ordered = sorted(seconds)
    at = {share: ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.9, 0.99)}
    values = {"median": statistics.median(ordered), "p90": at[0.9], "p99": at[0.99], "max": ordered[-1]}
    return {name: round(1000 * value, 2) for name, value in values.items()}


async def run(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Both measurements, one after the other."""
    names = [f"instance-{number}" for number in range(arguments.workers)]
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        servers = {name: MetadataProcess("metadata_gce", Path(directory) / f"of-{name}") for name in names}
        for server in servers.values():
            stack.callback(server.close)
            await server.start()
        flags = ("--devices-per-instance", "2")
        fleet = LocalFleet(Path(directory) / "fleet", names, CONTROLLER, flags)
        fleet.arguments_of |= {
            name: ("--notices", "gce", "--metadata-url", server.url) for name, server in servers.items()
        }
        async with running(fleet):
            requests = mix(7, 16)
            expected = await answers(fleet.client, requests)
            await measure(fleet, servers, len(servers))  # connections are made, code is warm
            results = {"idle": summary(await measure(fleet, servers, arguments.repeats))}
            load = Load(fleet.client, requests, expected, arguments.clients, seed=0)
            try:
                await load.until(lambda: load.tokens >= 40 * arguments.clients, WAIT_SECONDS)
                results["decoding"] = summary(await measure(fleet, servers, arguments.repeats))
            finally:
                await load.stop(WAIT_SECONDS)
            assert not load.problems, load.problems
            return results


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else None)
    parser.add_argument("--workers", type=int, default=2, help="workers of the fleet")
    parser.add_argument("--clients", type=int, default=8, help="streams at once")
    parser.add_argument("--repeats", type=int, default=50, help="notices of each measurement")
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments = parser.parse_args(argv)
    results = asyncio.run(run(arguments))
    print(f"from the metadata server's answer to the controller's event, in ms, {os.cpu_count()} cores")
    for name, values in results.items():
        print(f"{name:>10}: " + "  ".join(f"{what} {value:g}" for what, value in values.items()))
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
