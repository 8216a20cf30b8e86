"""A run with preemptions on the real engine: the metrics are what clients, events and reports say."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import pytest
from embedded_cases import KINDS, PROMPTS, Output, Run, start_server
from scraped import Scraped

from spotjax.embedded import EmbeddedServer
from spotjax.fleet.observer import Migration
from spotjax.fleet.status import Reconfiguration
from spotjax.telemetry import metrics
from spotjax.telemetry.recorder import Recorder


class Keeping(Recorder):
    """Keeps what it is told of migrations."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[Migration] = []

    def migrated(self, migration: Migration) -> None:
        self.told.append(migration)
        super().migrated(migration)


def one_of_the_mesh(server: EmbeddedServer) -> str:
    placement = server.service.status().placement
    assert placement is not None
    return max(device.instance for device in placement.devices.values())


async def lived_through(
    server: EmbeddedServer,
) -> tuple[dict[str, Output], Reconfiguration, Reconfiguration, Reconfiguration]:
    """All requests; meanwhile an instance leaves with notice, one is gone at once, and one joins."""
    run = Run(server, "run")
    run.start()
    await run.reached(20)
    left = await server.service.preempt(one_of_the_mesh(server), 20.0)
    await run.reached(40)
    killed = await server.service.preempt(one_of_the_mesh(server), 0.0)
    await run.reached(80)
    joined = await server.service.add(1)
    return await run.outputs(), left, killed, joined


def test_the_metrics_of_a_run_with_preemptions_are_what_clients_events_and_reports_say(programs: Path) -> None:
    asyncio.run(_compare(programs))


async def _compare(programs: Path) -> None:
    recorder = Keeping()
    server = await start_server(programs, recorder, mesh="1x2x2", prefix_cache=False)
    outputs, left, killed, joined = await lived_through(server)
    status, events = server.service.status(), server.service.recent()
    await server.close()
    scraped = Scraped(recorder, lambda: status)
    reports = [left, killed, joined]
    _compare_clients(scraped, outputs)
    changes = [report for report in reports if report.after is not None and report.after != report.before]
    switched = [event for event in events if event.kind == "switch"]
    precopied = [event for event in events if event.kind == "precopy"]
    assert len(changes) == len({report.epoch for report in changes}) == len(switched) - 1, "all but the first mesh"
    assert scraped(metrics.EPOCH) == switched[-1].epoch == len(switched)
    assert scraped(metrics.MIGRATION_TIME, "_count") == scraped(metrics.MIGRATION_PAUSE, "_count") == len(switched)
    assert scraped(metrics.MIGRATIONS, path="first", outcome="switched") == 1
    assert scraped(metrics.MIGRATIONS, path="loss", outcome="switched") == 1
    pauses = sum(float(event.fields["pause_seconds"]) for event in switched)
    assert scraped(metrics.MIGRATION_PAUSE, "_sum") == pytest.approx(pauses)
    for content, kind, fields in (
        ("parameters", precopied, ("bytes_moved",)), ("kv", switched, ("kv_bytes_moved", "kv_bytes_precopied"))
    ):  # fmt: skip
        told = sum(int(event.fields[field]) for event in kind for field in fields)
        assert scraped(metrics.MIGRATION_BYTES, source="instance", content=content) == told
    loaded = sum(int(event.fields["bytes_loaded"]) for event in precopied)
    assert scraped(metrics.MIGRATION_BYTES, source="checkpoint", content="parameters") == loaded > 0
    assert scraped(metrics.RESUMED) == sum(report.requests_kept + report.requests_recomputed for report in changes) > 0
    lost = sum(one.computed - one.kept for migration in recorder.told for one in migration.paused)
    assert scraped(metrics.RECOMPUTED) == lost > 0, "the pages of the stage that was killed are computed again"
    assert scraped(metrics.NOTICES, source="operator") == 1
    states = Counter(instance.state for instance in status.instances)
    assert {s: scraped(metrics.INSTANCES, state=s, price_class="spot") for s in ("ready", "gone")} == {
        "ready": states["ready"], "gone": states["gone"]
    }  # fmt: skip


def _compare_clients(scraped: Scraped, outputs: dict[str, Output]) -> None:
    """What clients saw, counted anew."""
    sequences = [tokens for output in outputs.values() for tokens in output.tokens]
    assert scraped(metrics.GENERATION_TOKENS) == sum(map(len, sequences))
    assert scraped(metrics.PROMPT_TOKENS) == sum(len(PROMPTS[kind]) * len(outputs[kind].tokens) for kind in KINDS)
    assert scraped(metrics.TTFT, "_count") == scraped(metrics.QUEUE_TIME, "_count") == len(sequences)
    assert scraped(metrics.INTER_TOKEN, "_count") == sum(len(tokens) - 1 for tokens in sequences)
    ends = Counter(finish for output in outputs.values() for finish in output.finish)
    for finish in ("stop", "length", "cancelled"):
        assert scraped(metrics.SUCCESS, finish=finish) == ends.get(finish, 0)  # type: ignore[call-overload]
    assert scraped(metrics.E2E, "_count") == len(sequences)
    assert scraped(metrics.RUNNING) == scraped(metrics.WAITING) == 0
    steps = scraped(metrics.STEP_TIME, "_count", kind="decode") + scraped(metrics.STEP_TIME, "_count", kind="prefill")
    assert 0 < scraped(metrics.COMMIT_TIME, "_count") <= steps
