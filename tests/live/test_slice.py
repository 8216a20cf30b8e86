"""An instance of two host processes with two devices each, as a TPU slice is: one member, lost as a whole."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import socket
from collections.abc import AsyncIterator, Mapping
from importlib.resources import files
from pathlib import Path

import pytest
import pytest_asyncio
from live_cases import SlowFleet, heard, load_on, more_tokens, said, stages

from spotjax.fleet.status import FleetStatus
from spotjax.tools.load import answers
from spotjax.tools.local_fleet import EmbeddedService
from spotjax.tools.metadata import MetadataProcess
from spotjax.tools.processes import Process
from spotjax.tools.request_mix import KINDS, Output, difference, mix
from spotjax.tools.service import running

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]
SLICE, SOLO = "slice", "solo"
CONTROLLER = ("--max-batch", "2", "--prefill-tokens", "16", "--max-model-len", "128", "--kv-pages", "48", "--no-fuse")
"""As few shapes as possible: everything is compiled here, once for slices and once for others."""
REQUESTS = mix(11, len(KINDS), longest=48)
END_SECONDS = 40.0
JOIN_SECONDS = 90.0
MESH = "1x2x4"
"""Four shards of each stage: the slice's are on both its hosts."""


class SliceFleet(SlowFleet):
    """A slice and an ordinary worker.

    Attributes:
      hosts: the slice's processes.
      metadata_url: of the metadata server that host 1 asks, as a TPU VM.
    """

    hosts: tuple[Process, ...] = ()
    metadata_url = ""

    def spawn(self, name: str, *arguments: str) -> Process:
        """The same; all hosts of the slice at once."""
        if name != SLICE:
            return super().spawn(name, *arguments)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            coordinator = f"127.0.0.1:{free.getsockname()[1]}"
        together = ("--slice-hosts", "2", "--slice-coordinator", coordinator)
        cloud = ("--notices", "tpu", "--metadata-url", self.metadata_url)
        second = super().spawn(name, *arguments, *together, "--slice-host", "1", *cloud)
        first = super().spawn(name, *arguments, *together, "--slice-host", "0")
        self.hosts = (first, second)
        return first

    def processes(self) -> list[Process]:
        """All hosts' among them."""
        return [*super().processes(), *self.hosts[1:]]


def both_serve(status: FleetStatus) -> bool:
    return status.ready and set(stages(status)) == {SLICE, SOLO}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model, its 6 query heads read as 12 of half the size, which 4 divides. It talks nonsense."""
    directory = tmp_path_factory.mktemp("model") / "nonsense"
    shutil.copytree(str(files("spotjax.models") / "tiny"), directory)
    config = json.loads((directory / "config.json").read_text())
    config |= {"num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 16}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def metadata(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[MetadataProcess]:
    server = MetadataProcess("metadata_gce", tmp_path_factory.mktemp("metadata"))
    try:
        await server.start()
        yield server
    finally:
        server.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(
    model: Path, programs: Path, tmp_path_factory: pytest.TempPathFactory, metadata: MetadataProcess
) -> AsyncIterator[SliceFleet]:
    flags = ("--devices-per-instance", "4", "--compilation-cache", str(programs))
    arguments = (*CONTROLLER, "--model", str(model), "--mesh", MESH)
    fleet = SliceFleet(tmp_path_factory.mktemp("slice"), [SLICE, SOLO], arguments, flags)
    fleet.metadata_url = metadata.url
    async with running(fleet):
        await fleet.until("both serve", both_serve, JOIN_SECONDS)
        yield fleet
        assert await fleet.stop() == 0
        assert fleet.left() == []


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def expected(shared: SliceFleet) -> Mapping[str, Output]:
    return await answers(shared.client, REQUESTS)


@pytest_asyncio.fixture(loop_scope="module")
async def fleet(shared: SliceFleet, expected: Mapping[str, Output]) -> SliceFleet:
    """With the slice in it."""
    if any(host.exit_code is not None for host in shared.hosts):
        await shared.bring([SLICE])
    await shared.until("both serve", both_serve, JOIN_SECONDS)
    shared.note("--- next test")
    return shared


async def ended(fleet: SliceFleet) -> list[int]:
    """Waits until all processes of the slice have."""
    return [await asyncio.to_thread(host.wait, END_SECONDS) for host in fleet.hosts]


async def test_a_slice_says_what_one_process_says(
    expected: Mapping[str, Output], model: Path, programs: Path, tmp_path: Path
) -> None:
    flags = ("--model", str(model), "--instances", "1", "--devices-per-instance", "4", "--mesh", "1x1x4")
    cache = ("--compilation-cache", str(programs))
    async with running(EmbeddedService(tmp_path, (*CONTROLLER, *flags, *cache), ["instance-0"])) as embedded:
        alone = await answers(embedded.client, REQUESTS)
    assert [difference(expected[name], alone[name]) for name in expected] == [None] * len(expected)


@pytest.mark.parametrize("host", [pytest.param(0, marks=pytest.mark.slow), 1])
async def test_a_slice_is_lost_as_a_whole_and_comes_back(
    fleet: SliceFleet, expected: Mapping[str, Output], host: int
) -> None:
    async with load_on(fleet, expected, requests=REQUESTS) as load:
        since = len(fleet.events)
        fleet.hosts[host].signal(signal.SIGKILL)
        codes = await ended(fleet)
        assert codes[host] == -signal.SIGKILL and codes[1 - host] != 0
        await fleet.until_gone([SLICE])
        await more_tokens(load, 20)
        assert [event.fields["instance"] for event in said(fleet, "lost", since)] == [SLICE]
        await fleet.bring([SLICE])
        await fleet.until("the slice serves again", both_serve, JOIN_SECONDS)
        await more_tokens(load, 20)


async def test_notice_at_any_host_is_the_notice_of_the_slice(
    fleet: SliceFleet, expected: Mapping[str, Output], metadata: MetadataProcess
) -> None:
    key = "instance/maintenance-event"
    async with load_on(fleet, expected, requests=REQUESTS) as load:
        since = len(fleet.events)
        await metadata.order("tell", key=key, value="MIGRATE_ON_HOST_MAINTENANCE")
        advice = await heard(fleet, "notice", since)
        await metadata.order("tell", key=key, value="NONE")
        await heard(fleet, "withdrawn", since)
        since = len(fleet.events)
        fleet.hosts[1].signal(signal.SIGTERM, whole=False)
        assert await ended(fleet) == [0, 0]
        await more_tokens(load, 20)
        switch = await heard(fleet, "switch", since)
        assert switch.fields["recomputed"] == 0 and int(switch.fields["kept"]) > 0
    (notice,) = said(fleet, "notice", since)
    told = [(event.fields["instance"], event.fields["source"], event.fields["kind"]) for event in (advice, notice)]
    assert told == [(SLICE, "tpu-maintenance@host-1", "rebalance"), (SLICE, "signal@host-1", "preempt")]
