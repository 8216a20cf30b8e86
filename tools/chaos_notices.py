"""Faults between platforms and those who listen to them: ``python -m spotjax.tools.chaos_notices --faults 1000``.

Machines on stand-ins of all platforms listen over real HTTP while answers fail in every way. Prints a table of what was
announced, heard, false, missed, and how late; ends with 1 if anything was false, missed or too late.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import random
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from spotjax.fleet.notices.patience import metadata_client
from spotjax.testing.metadata_server import MetadataServer
from spotjax.tools.notice_chaos import BOOT_SECONDS, QUIET_SECONDS, Play, Verdict, draw_spells, judge, play
from spotjax.tools.notice_sites import SITES, Site

FAULTS_PER_PLAY = 25
SKEWS = (0.0, 0.0, 300.0, -300.0)


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--faults", type=int, default=1000, help="in all; each lasts 0.2 to 8 s and meets every answer meanwhile")
    add("--platforms", nargs="+", choices=SITES, default=list(SITES), help="default: all")
    add("--seconds", type=float, default=120.0, help="in which a machine's faults begin")
    add("--seed", type=int, default=0, help="of what is announced and what goes wrong")
    add("--json", type=Path, metavar="FILE", help="write the figures there, too")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.ERROR)
    begun = time.monotonic()
    plays = -(-given.faults // FAULTS_PER_PLAY)
    print(f"{plays} machines, about {BOOT_SECONDS + given.seconds + QUIET_SECONDS:.0f} s", file=sys.stderr)
    verdicts = asyncio.run(_all(given.platforms, given.faults, given.seconds, given.seed))
    print(table(verdicts))
    problems = [problem for verdict in verdicts.values() for problem in verdict.problems]
    print(*problems, sep="\n", file=sys.stderr)
    if given.json is not None:
        figures = {
            "faults": given.faults, "seconds": given.seconds, "seed": given.seed, "load": os.getloadavg(),
            "took": time.monotonic() - begun,
            "platforms": {name: asdict(verdict) for name, verdict in verdicts.items()},
        }  # fmt: skip
        given.json.write_text(json.dumps(figures, indent=1))
    return 1 if problems else 0


async def _all(platforms: list[str], faults: int, seconds: float, seed: int) -> dict[str, Verdict]:
    """All plays side by side, platforms in turn."""
    counts = [min(FAULTS_PER_PLAY, faults - first) for first in range(0, faults, FAULTS_PER_PLAY)]
    names = [platforms[number % len(platforms)] for number in range(len(counts))]
    plays = (
        one(SITES[name], random.Random(f"{seed} {number}"), count, seconds)
        for number, (name, count) in enumerate(zip(names, counts, strict=True))
    )
    verdicts = {name: Verdict() for name in platforms}
    for name, verdict in zip(names, await asyncio.gather(*plays), strict=True):
        verdicts[name].add(verdict)
    return verdicts


async def one(kind: type[Site], draw: random.Random, count: int, seconds: float) -> Verdict:
    """One machine, over HTTP, in real time."""
    begun = time.monotonic()
    site = kind(time.time, draw.choice(SKEWS), time.time())
    acted = Play(site, draw_spells(draw, count, seconds, site.paths))
    server = MetadataServer(site.metadata, lambda request: acted.fault(time.monotonic() - begun, request))
    async with server.serving() as url, metadata_client() as client:
        source = site.source(client, time.monotonic, url)
        await play(acted, source, time.monotonic, begun, site.draw_moves(draw, seconds), seconds)
    return judge(acted)


def table(verdicts: Mapping[str, Verdict]) -> str:
    """Figures of each platform, and of all."""
    everything = Verdict()
    for verdict in verdicts.values():
        everything.add(verdict)
    rows = [
        "| platform | machines | faults | answers spoilt | announced | overtaken | false or missed "
        "| heard after, median | longest | after a fault's end, longest | deadline early | late |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, verdict in {**verdicts, "all": everything}.items():
        median = statistics.median(verdict.calm) if verdict.calm else 0.0
        rows.append(
            f"| {name} | {verdict.plays} | {verdict.faults} | {verdict.spoilt} | {verdict.told} | {verdict.overtaken} "
            f"| {len(verdict.problems)} | {median:.2f} s | {max(verdict.calm, default=0.0):.2f} s "
            f"| {max(verdict.after, default=0.0):.2f} s | {verdict.early:.1f} s | {verdict.late:.1f} s |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
