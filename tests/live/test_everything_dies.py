"""All instances go at once, with notice or without, the controller too: every stream goes on as if nothing had been."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
from live_cases import CONTROLLER, DONE_SECONDS, NAMES, REQUESTS, SlowFleet, heard, load_on, more_tokens, worker_flags

from spotjax.checkpoint.contents import contents_of
from spotjax.engine.log_inspection import inspect_log
from spotjax.models.catalog import open_model
from spotjax.models.fingerprint import fingerprint
from spotjax.models.orbax_checkpoint import OrbaxCheckpoint
from spotjax.tools.load import answers
from spotjax.tools.request_mix import Output
from spotjax.tools.service import running

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]
GRACE = ("--grace-seconds", "4")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(programs: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[SlowFleet]:
    """Two workers, and a controller that saves KV when they are to be taken."""
    directory = tmp_path_factory.mktemp("everything")
    flags = (*CONTROLLER, "--checkpoint", str(directory / "checkpoint"))
    fleet = SlowFleet(directory, NAMES[:2], flags, (*worker_flags(programs), *GRACE), patience=DONE_SECONDS)
    async with running(fleet):
        yield fleet


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def expected(fleet: SlowFleet) -> Mapping[str, Output]:
    """What the fleet says undisturbed."""
    return await answers(fleet.client, REQUESTS)


def sequences_begun(fleet: SlowFleet) -> int:
    """How many have tokens and have not ended; others may have been accepted when there was no mesh any more."""
    return sum(
        count > 0 and not ended
        for request in inspect_log(fleet.commit_log).requests
        for count, ended in zip(request.tokens, request.ended, strict=True)
    )


async def test_on_request_everything_is_saved_while_requests_run(
    fleet: SlowFleet, expected: Mapping[str, Output]
) -> None:
    place = fleet.directory / "asked for"
    async with load_on(fleet, expected) as load:
        saved = await fleet.client.save(str(place), state=True)
        await more_tokens(load, 20)
    assert saved.parameter_bytes and saved.sequences and saved.kv_bytes and not saved.left_out, saved
    float32 = np.dtype(np.float32)
    assert fingerprint(OrbaxCheckpoint(place), float32) == fingerprint(open_model("tiny").checkpoint, float32)
    (save,) = contents_of(str(place)).saves
    assert (save.kv, save.sequences, save.generation) == ("complete", saved.sequences, True)


async def test_with_notice_kv_is_saved_and_new_instances_go_on_with_all_of_it(
    fleet: SlowFleet, expected: Mapping[str, Output]
) -> None:
    async with load_on(fleet, expected) as load:
        since = len(fleet.events)
        await asyncio.gather(*map(fleet.leave, fleet.names))
        saved = await heard(fleet, "saved", since)
        assert saved.fields["sequences"] and saved.fields["bytes"] and not saved.fields["left_out"], saved
        await fleet.bring(fleet.names)
        await more_tokens(load, 40)
        switch = await heard(fleet, "switch", since)
        assert switch.fields["kept"] and not switch.fields["recomputed"], fleet.story()


async def test_with_notice_to_all_and_a_controller_that_dies_a_new_service_goes_on_with_the_saved_kv(
    fleet: SlowFleet, expected: Mapping[str, Output]
) -> None:
    async with load_on(fleet, expected) as load:
        since = len(fleet.events)
        await asyncio.gather(*map(fleet.leave, fleet.names))
        saved = await heard(fleet, "saved", since)
        assert saved.fields.get("sequences"), fleet.story()
        await fleet.kill_server()
        since, begun = len(fleet.events), sequences_begun(fleet)
        fleet.start_server()
        await fleet.bring(fleet.names)
        await more_tokens(load, 40)
        switch = await heard(fleet, "switch", since)
        assert switch.fields["kept"] == begun, fleet.story()
    saves = contents_of(str(fleet.directory / "checkpoint")).saves
    assert [(save.number, save.kv) for save in saves] == [(1, "complete"), (2, "complete")], fleet.story()


async def test_without_notice_the_commit_log_alone_is_enough(fleet: SlowFleet, expected: Mapping[str, Output]) -> None:
    async with load_on(fleet, expected) as load:
        since = len(fleet.events)
        await asyncio.gather(fleet.kill(fleet.names), fleet.kill_server())
        fleet.start_server()
        await fleet.bring(fleet.names)
        await more_tokens(load, 40)
        recovered = await heard(fleet, "recovered", since)
        assert recovered.fields["sequences"]
