"""A fleet of four worker processes to which everything happens, at random moments, while requests of all kinds run."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from live_cases import CONTROLLER, NAMES, SlowFleet, worker_flags

from spotjax.tools.chaos_run import run
from spotjax.tools.namespaces import Network, NetworkUnavailable
from spotjax.tools.service import running

SEED = 4
"""Its first eight events are of eight kinds."""


@pytest.mark.timeout(600)
@pytest.mark.parametrize("events", [8, pytest.param(16, marks=pytest.mark.slow)])
async def test_whatever_happens_loses_no_token_and_leaves_nothing(events: int, programs: Path, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        network = None
        with contextlib.suppress(NetworkUnavailable):  # then connections are not cut
            network = stack.enter_context(Network())
        fleet = SlowFleet(tmp_path, NAMES, CONTROLLER, worker_flags(programs), network)
        async with running(fleet):
            report = await run(fleet, SEED, events, clients=4, requests=8)
    assert not report.problems, report
    assert len(report.outcomes) == events
