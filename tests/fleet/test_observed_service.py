"""What is counted is what the log and the events say: a service without devices, in virtual time, whatever happens."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from random import Random

import pytest
import virtual_time
from fleet_cases import Service, instances, make_service, read
from hypothesis import given, settings
from hypothesis import strategies as st
from scraped import Scraped

from spotjax.engine.request import FinishReason
from spotjax.errors import NoFeasibleShape, NoSpareDevices, UnknownInstance
from spotjax.telemetry import metrics
from spotjax.telemetry.recorder import Recorder

EVENTS = st.lists(
    st.tuples(st.sampled_from(("preempt", "notice", "add", "cancel")), st.integers(0, 3), st.integers(0, 25)),
    max_size=5,
)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), EVENTS)
def test_whatever_happens_the_metrics_are_what_events_and_requests_say(
    seed: int, events: Sequence[tuple[str, int, int]]
) -> None:
    virtual_time.run(_live(Random(seed), events))


async def _live(random: Random, events: Sequence[tuple[str, int, int]]) -> None:
    recorder = Recorder()
    service = make_service(random, instances(4), observer=recorder)
    await service.controller.start()
    prompts = [tuple(random.randrange(200) for _ in range(random.randint(1, 12))) for _ in range(6)]
    names = [
        service.submit(f"r{number}", prompt, n=1 + number % 2, max_tokens=random.randint(1, 12), temperature=0)
        for number, prompt in enumerate(prompts)
    ]
    changes = [asyncio.create_task(_happen(service, random, *event)) for event in events]
    following = [asyncio.create_task(read(service.controller, name)) for name in names]
    await asyncio.gather(*changes)
    while not all(reading.done() for reading in following):
        if service.controller.status().placement is None:
            await _happen(service, random, "add", 1, 0)
        await asyncio.sleep(1)
    _compare(Scraped(recorder, service.controller.status), service, names)
    await service.controller.close()


async def _happen(service: Service, random: Random, kind: str, which: int, moment: int) -> None:
    for _ in range(moment):
        await asyncio.sleep(0)
    try:
        if kind == "add":
            await service.controller.add(1)
        elif kind == "cancel":
            service.controller.cancel(f"r{which}")
        else:
            await service.controller.preempt(f"i{which}", 30.0 if kind == "notice" else 0.0)
    except (UnknownInstance, NoSpareDevices, NoFeasibleShape):
        pass  # it is gone already, or there is none


def _compare(scraped: Scraped, service: Service, names: Sequence[str]) -> None:
    """Counts again, from the log and the events."""
    states = [state for name in names for state in service.log.states(name)]
    assert scraped(metrics.GENERATION_TOKENS) == sum(len(state.tokens) for state in states)
    for reason in FinishReason:
        assert scraped(metrics.SUCCESS, finish=reason) == sum(state.finish == reason for state in states)
    complete = sum(state.finish in (FinishReason.STOP, FinishReason.LENGTH) for state in states)
    assert scraped(metrics.E2E, "_count") == complete
    begun = [state for state in states if state.tokens]
    assert scraped(metrics.TTFT, "_count") == len(begun)
    assert scraped(metrics.INTER_TOKEN, "_count") == sum(len(state.tokens) - 1 for state in begun)
    assert scraped(metrics.PROMPT_TOKENS) >= sum(len(state.prompt) for state in begun)
    assert scraped(metrics.RUNNING) == scraped(metrics.WAITING) == 0
    kinds = Counter(event.kind for event in service.controller.recent())
    switched = [event.fields for event in service.controller.recent() if event.kind == "switch"]
    assert kinds["switch"] == scraped(metrics.MIGRATION_TIME, "_count") == scraped(metrics.EPOCH)
    assert scraped(metrics.MIGRATION_PAUSE, "_sum") == pytest.approx(sum(float(s["pause_seconds"]) for s in switched))
    moved = sum(int(s["kv_bytes_moved"]) + int(s["kv_bytes_precopied"]) for s in switched)
    assert scraped(metrics.MIGRATION_BYTES, source="instance", content="kv") >= moved
    drills = [e for e in service.controller.recent() if e.kind == "notice" and e.fields.get("source") == "operator"]
    if drills:
        assert scraped(metrics.NOTICES, source="operator") == len(drills)
    status = service.controller.status()
    for one in status.instances:
        assert scraped(metrics.INSTANCES, state=one.state, price_class=one.price_class) > 0
