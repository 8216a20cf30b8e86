"""A fleet of four worker processes to which everything happens, at random moments, while requests of all kinds run."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from live_cases import CONTROLLER, NAMES, worker_flags

from spotjax.tools.chaos_run import run
from spotjax.tools.local_fleet import LocalFleet
from spotjax.tools.namespaces import Network, NetworkUnavailable
from spotjax.tools.service import running

EVENTS = 16
SEED = 1


@pytest.mark.timeout(600)
async def test_sixteen_events_lose_no_token_and_leave_nothing(programs: Path, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        network = None
        with contextlib.suppress(NetworkUnavailable):  # then connections are not cut
            network = stack.enter_context(Network())
        fleet = LocalFleet(tmp_path, NAMES, CONTROLLER, worker_flags(programs), network)
        async with running(fleet):
            report = await run(fleet, SEED, EVENTS)
    assert not report.problems, report
    assert len(report.outcomes) == EVENTS
