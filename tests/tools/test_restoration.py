"""What a cold restart says of requests, KV and mesh, and how it says that they go on."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from restart_cases import MODEL, Left, damage, leave_log

from spotjax.checkpoint.saves import Save
from spotjax.config import ServeConfig
from spotjax.engine.generation import GenerationRequest
from spotjax.engine.log_inspection import LogSummary, RequestSummary, inspect_log
from spotjax.engine.request import SamplingParams
from spotjax.errors import ConfigError, NoFeasibleShape, UnknownRequest
from spotjax.fleet.status import FleetEvent
from spotjax.models.catalog import open_model
from spotjax.testing.scripted_generation import ScriptedRequest, scripted_tokens
from spotjax.testing.scripted_service import ScriptedService
from spotjax.tools.cold_restart import follow, plan_mesh, restoration, salvage

TINY = open_model("tiny").checkpoint.spec


def summary(*requests: RequestSummary) -> LogSummary:
    return LogSummary("service", MODEL, 3, requests, ())


def saved(**sequences: int) -> Save:
    return Save("/saves/1", "service", 3, 1, {int(key[1:]): positions for key, positions in sequences.items()})


def test_every_unfinished_sequence_has_its_kv_from_the_save_or_computes_it_again() -> None:
    found = restoration(
        summary(
            RequestSummary("saved", 0, 10, (5,), (False,), True),
            RequestSummary("two choices", 1, 4, (3, 9), (False, True), True),
            RequestSummary("begun since", 3, 7, (0,), (False,), True),
            RequestSummary("over", 4, 2, (6,), (True,), True),
            RequestSummary("client is gone", 5, 2, (6,), (False,), False),
        ),
        "tiny", "", saved(k0=12, k1=100, k2=12, k4=7, k5=7), None,
    )  # fmt: skip
    shown = {r.request_id: (r.kv_positions, r.recomputed_positions, r.resumable) for r in found.unfinished}
    assert shown == {
        "saved": (12, 2, True),  # of 14: that of the last token is computed in any case
        "two choices": (0, 6, True),  # of more tokens than the log has: it lost its end, there may be others now
        "begun since": (0, 6, True),
        "client is gone": (0, 0, False),
    }
    assert (found.going_on, found.with_kv, found.finished) == (3, 1, 1)
    assert (found.kv_positions, found.recomputed_positions) == (12, 14)
    assert found.save == "/saves/1"


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 40), st.booleans(), st.booleans()), max_size=6),
    st.dictionaries(st.integers(0, 5), st.integers(0, 100)),
)
def test_kept_and_computed_positions_are_all_that_is_needed(
    requests: list[tuple[int, int, bool, bool]], kept: dict[int, int]
) -> None:
    log = summary(
        *(
            RequestSummary(str(key), key, prompt, (tokens,), (ended,), resumable)
            for key, (prompt, tokens, ended, resumable) in enumerate(requests)
        )
    )
    with_save = restoration(log, "", "", Save("x", "service", 1, 1, kept), None)
    without = restoration(log, "", "", None, None)
    needed = sum(prompt + tokens - 1 for prompt, tokens, ended, resumable in requests if resumable and not ended)
    assert with_save.kv_positions + with_save.recomputed_positions == without.recomputed_positions == needed
    assert without.kv_positions == 0 and without.save == ""
    assert with_save.going_on == sum(resumable and not ended for _, _, ended, resumable in requests)


def test_the_mesh_is_the_one_that_the_server_forms() -> None:
    mesh = plan_mesh(ServeConfig(instances=4), TINY, "", epoch=7)
    assert mesh is not None and str(mesh.placement.shape) == "2x2x2" and mesh.placement.epoch == 7
    assert list(mesh.loaded) == [f"instance-{n}" for n in range(4)] and mesh.idle == ()
    assert sum(mesh.loaded.values()) >= 2 * TINY.parameter_bytes and set(mesh.received.values()) == {0}
    fleet = plan_mesh(ServeConfig(workers=3, mesh="1x2x2"), TINY, "", epoch=1)
    assert fleet is not None and str(fleet.placement.shape) == "1x2x2" and len(fleet.idle) == 1


def test_instances_that_are_still_to_come_can_be_assumed() -> None:
    waiting = ServeConfig(listen="127.0.0.1:0")
    assert plan_mesh(waiting, TINY, "", epoch=1) is None
    mesh = plan_mesh(waiting, TINY, "2xg5.12xlarge", epoch=1)
    assert mesh is not None and set(mesh.loaded) | set(mesh.idle) == {"i-0", "i-1"}
    with pytest.raises(ConfigError, match="COUNTxTYPE"):
        plan_mesh(waiting, TINY, "some", epoch=1)
    with pytest.raises(NoFeasibleShape):
        plan_mesh(ServeConfig(instances=1, instance_memory_bytes=1000), TINY, "", epoch=1)


def test_a_salvaged_log_has_what_is_intact(tmp_path: Path) -> None:
    leave_log(tmp_path, [Left("a"), Left("b", key=1)])
    damage(tmp_path, "a")
    assert inspect_log(tmp_path).damage
    assert any("'a'" in line for line in salvage(tmp_path, MODEL))
    after = inspect_log(tmp_path)
    assert [request.request_id for request in after.requests] == ["b"] and not after.damage


# -- following a server


def scripted(name: str, tokens: int, at: int) -> ScriptedRequest:
    request = GenerationRequest(name, (1, 2), SamplingParams(max_tokens=tokens), resumable=True)
    return ScriptedRequest(request, [scripted_tokens(request, 0)], committed=at, recorded=True)


def left(name: str, at: int) -> RequestSummary:
    return RequestSummary(name, 0, 2, (at,), (False,), True)


class Switched(ScriptedService):
    """A service whose first mesh took over three sequences with their KV."""

    def recent(self) -> tuple[FleetEvent, ...]:
        fields = ({"kept": 0}, {"kept": 3, "recomputed": 9}, {"kept": 7, "recomputed": 0})
        kinds = ("plan", "switch", "switch")
        return tuple(FleetEvent(0.0, kind, 1, "", told) for kind, told in zip(kinds, fields, strict=True))


async def test_it_says_when_all_requests_have_another_token() -> None:
    steps, said = asyncio.Semaphore(0), list[str]()
    service = Switched(steps.acquire, log=[scripted("a", 9, 4), scripted("b", 9, 2)])
    following = asyncio.create_task(follow(service, [left("a", 4), left("b", 2)], time.monotonic(), said.append))
    await asyncio.sleep(0)
    assert not following.done() and said == []
    steps.release()
    steps.release()
    await following
    assert len(said) == 1
    assert said[0].startswith("restored: 2 of 2 requests go on, 3 sequences with KV, first token after ")
    await service.stop()


async def test_it_says_how_many_go_on_while_others_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spotjax.tools.cold_restart.SAY_SECONDS", 0.01)
    said, told = list[str](), asyncio.Event()

    def say(line: str) -> None:
        said.append(line)
        if "1 of 2" in line:
            told.set()

    service = ScriptedService(asyncio.Event().wait, log=[scripted("waits", 9, 4)])
    more = ScriptedService(log=[scripted("goes on", 9, 2)])
    service.requests |= more.requests
    following = asyncio.create_task(follow(service, [left("waits", 4), left("goes on", 2)], 0.0, say))
    await told.wait()
    assert not following.done()
    assert said.count("restored: 1 of 2 requests go on") == 1
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    await more.stop()
    await service.stop()


async def test_a_request_that_ends_without_another_token_is_no_loss() -> None:
    said = list[str]()
    ended = replace(scripted("a", 4, 4), recorded=True)
    service = ScriptedService(log=[ended])
    await follow(service, [left("a", 4)], 0.0, said.append)
    assert said == ["restored: 0 of 1 requests go on, 1 ended, 0 sequences with KV"]
    await service.stop()


async def test_nothing_to_restore_is_said() -> None:
    said = list[str]()
    service = ScriptedService()
    await follow(service, [], 0.0, said.append)
    assert said == ["restored: nothing was unfinished"]
    await service.stop()


async def test_a_request_that_the_server_does_not_know_is_an_error() -> None:
    service = ScriptedService()
    with pytest.raises(UnknownRequest):
        await follow(service, [left("lost", 1)], 0.0, print)
    await service.stop()
