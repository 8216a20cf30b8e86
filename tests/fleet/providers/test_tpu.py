"""TPU slices by queued resources, against a service that speaks the real protocol."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import msgspec
import pytest
from google.cloud.tpu_v2 import CreateNodeRequest, Node
from google.rpc.status_pb2 import Status
from provider_contract import FLEET, Act, Case, ProviderContract
from tpu_cases import ELSEWHERE, HERE, ON_DEMAND, SPOT, THERE, Account, account, config_for, plain

from spotjax.config import ServeConfig
from spotjax.errors import ConfigError, OutOfCapacity, ProviderRefused, ProviderUnavailable, QuotaExceeded
from spotjax.fleet.providers.provider import FleetIdentity, Machine, MachineState, Provider
from spotjax.fleet.providers.registry import open_provider, provider_config
from spotjax.fleet.providers.tpu import TpuProvider, open_client
from spotjax.testing.tpu_service import Fault


@pytest.fixture
async def there() -> AsyncIterator[Account]:
    async with account() as it:
        yield it


async def test_a_slice_is_asked_for_waits_runs_is_preempted_deleted_and_asked_for_anew(there: Account) -> None:
    async with there.provider() as provider:
        states: list[MachineState] = []
        asked = await provider.request("worker-1", SPOT.offer)
        assert (asked.state, asked.offer) == (MachineState.WAITING, SPOT.offer)
        while not states or states[-1] is not MachineState.RUNNING:
            there.cloud.advance()
            (machine,) = await provider.list()
            states.append(machine.state)
        assert list(dict.fromkeys(states)) == [MachineState.WAITING, MachineState.STARTING, MachineState.RUNNING]
        assert machine.offer == SPOT.offer and machine.created > 0 and machine.detail == "node READY"

        there.cloud.preempt(f"{there.parent()}/nodes/fleet--worker-1--1")
        gone = await there.until(provider, lambda it: it["worker-1"].detail.startswith("queued resource SUSPENDED"))
        assert gone["worker-1"].state is MachineState.PREEMPTED
        assert gone["worker-1"].detail == "queued resource SUSPENDED by SERVICE"
        assert (await provider.request("worker-1", SPOT.offer)).state is MachineState.PREEMPTED
        assert there.states() == {"fleet--worker-1--1": "SUSPENDED"}, "nothing was asked for beside what is left"

        await provider.release("worker-1")
        assert (await provider.request("worker-1", SPOT.offer)).state is MachineState.WAITING
        await there.until(provider, lambda it: it["worker-1"].state is MachineState.RUNNING)
        await provider.release("worker-1")
        await there.until(provider, lambda it: not it)
        assert not there.cloud.requests and not there.cloud.nodes


async def test_an_id_is_not_used_again_while_its_deletion_goes_on(there: Account) -> None:
    async with there.provider() as provider:
        await provider.request("a", SPOT.offer)
        await settled(there, "fleet--a--1")
        await provider.release("a")
        (machine,) = await provider.list()
        assert machine.state is MachineState.STOPPING
        await provider.request("a", SPOT.offer)
        assert there.states() == {"fleet--a--1": "DELETING", "fleet--a--2": "CREATING"}
        (machine,) = await provider.list()
        assert machine.state is MachineState.WAITING


async def test_what_is_asked_for_is_what_was_configured(there: Account) -> None:
    settings = {
        "network": "net", "subnetwork": "sub", "tags": ("workers",), "labels": {"team": "a"}, "metadata": {"x": "y"},
        "service_account": "sa@project-1.iam.gserviceaccount.com", "wait_seconds": 600.0,
    }  # fmt: skip
    offers = (msgspec.structs.replace(SPOT, topology="2x4"), ON_DEMAND)
    async with there.provider(**settings, offers=offers) as provider:
        await provider.request("a", SPOT.offer)
        await provider.request("b", ON_DEMAND.offer)
    a, b = (there.cloud.requests[f"{there.parent()}/queuedResources/fleet--{n}--1"] for n in "ab")
    assert "spot" in a and "guaranteed" not in a
    assert "guaranteed" in b and "spot" not in b
    assert a.queueing_policy.valid_until_duration.total_seconds() == 600  # type: ignore[attr-defined]
    node = a.tpu.node_spec[0].node
    assert a.tpu.node_spec[0].parent == there.parent()
    assert (node.accelerator_config.type_.name, node.accelerator_config.topology) == ("V5LITE_POD", "2x4")
    assert b.tpu.node_spec[0].node.accelerator_type == "v5litepod-8"
    assert (node.network_config.network, node.network_config.subnetwork) == ("net", "sub")
    assert not node.network_config.enable_external_ips
    assert node.runtime_version == "v2-alpha-tpuv5-lite"
    assert list(node.tags) == ["workers"] and node.service_account.email == settings["service_account"]
    assert node.labels == {"team": "a", "spotjax-fleet": "fleet", "spotjax-name": "a", "spotjax-type": "v5litepod-8"}
    assert node.metadata == {
        "x": "y", "startup-script": "#!/bin/sh\n", "spotjax-fleet": "fleet", "spotjax-name": "a",
        "spotjax-join": "10.0.0.1:8470", "spotjax-price": "4.5",
    }  # fmt: skip


async def test_all_pages_and_all_zones_are_read() -> None:
    async with account(slices=9, page=2) as there, there.provider() as provider:
        for number in range(7):
            await provider.request(f"a{number}", (SPOT, ELSEWHERE)[number % 2].offer)
        everything = await there.until(
            provider, lambda it: len(it) == 7 and {m.state for m in it.values()} == {MachineState.RUNNING}
        )
        assert {name: machine.offer.zone for name, machine in everything.items()} == {
            f"a{number}": (HERE, THERE)[number % 2] for number in range(7)
        }


async def test_another_fleets_machines_are_neither_listed_nor_released(there: Account) -> None:
    async with there.provider("fleet") as ours, there.provider("fleet--a") as others, there.provider("fle") as third:
        await others.request("b", SPOT.offer)
        await third.request("c", SPOT.offer)
        there.cloud.create_node(CreateNodeRequest(parent=there.parent(), node_id="fleet-by-hand", node=plain_node()))
        assert not await ours.list()
        await ours.release("b")
        await ours.release("a--b")
        await ours.request("b", SPOT.offer)
        assert set(there.states()) == {"fleet--a--b--1", "fle--c--1", "fleet--b--1"}
        assert "DELETING" not in there.states().values()


async def test_a_node_without_request_is_found_and_deleted(there: Account) -> None:
    parent = there.parent()
    there.cloud.create_node(CreateNodeRequest(parent=parent, node_id="fleet--lost--3", node=plain_node()))
    async with there.provider() as provider:
        found = await there.until(provider, lambda it: it["lost"].state is MachineState.RUNNING)
        assert found["lost"].detail.endswith("it has no queued resource")
        assert (await provider.request("lost", SPOT.offer)).state is MachineState.RUNNING
        await provider.release("lost")
        await there.until(provider, lambda it: not it)


async def test_a_request_whose_node_somebody_deleted_is_no_machine(there: Account) -> None:
    async with there.provider() as provider:
        await there.running(provider, "a")
        there.cloud.delete_node(f"{there.parent()}/nodes/fleet--a--1")
        ended = await there.until(provider, lambda it: it["a"].state is MachineState.PREEMPTED)
        assert ended["a"].detail == "queued resource SUSPENDED by USER"


async def test_of_two_with_one_name_the_further_one_counts_and_the_other_one_can_be_released(there: Account) -> None:
    async with there.provider() as provider, there.provider(offers=(ELSEWHERE,)) as elsewhere:
        await there.running(provider, "a")
        await elsewhere.request("a", ELSEWHERE.offer)  # sees its own zone only, as if its answer had come late
        listed = {machine.name: machine for machine in await provider.list()}
        assert listed["a"].offer.zone == HERE and listed["a"].state is MachineState.RUNNING
        second = f"{THERE}/fleet--a--1"
        assert listed[second].state is MachineState.FAILED and "a second a" in listed[second].detail
        assert (await provider.request("a", SPOT.offer)).state is MachineState.RUNNING
        await settled(there, "fleet--a--1", THERE)
        await provider.release(second)
        after = await there.until(provider, lambda it: set(it) == {"a"})
        assert after["a"].state is MachineState.RUNNING


async def test_a_request_that_gets_nothing_in_time_fails_for_lack_of_capacity() -> None:
    async with account(slices=0) as there, there.provider(wait_seconds=1.0) as provider:
        now = 1_000_000.0
        there.cloud.clock = lambda: now
        await provider.request("a", SPOT.offer)
        waiting = await there.until(provider, lambda it: "WAITING_FOR_RESOURCES" in it["a"].detail)
        assert waiting["a"].state is MachineState.WAITING and waiting["a"].failure is None
        now += 2
        there.cloud.advance()
        (failed,) = await provider.list()
        assert failed.state is MachineState.FAILED and failed.failure is OutOfCapacity
        assert "valid_until" in failed.detail
        await provider.release("a")
        await there.until(provider, lambda it: not it)


@pytest.mark.parametrize(
    ("code", "message", "failure"),
    [
        (8, "There is no more capacity in the zone", OutOfCapacity),
        (8, "Quota 'TPUV5sPreemptibleLitepodPerProjectPerZone' exhausted. Limit 16", QuotaExceeded),
        (7, "the caller does not have permission", ProviderRefused),
        (13, "an internal error has occurred", ProviderUnavailable),
        (0, "", ProviderUnavailable),
    ],
)
async def test_a_request_that_fails_in_the_queue_says_as_what(
    there: Account, code: int, message: str, failure: type[Exception]
) -> None:
    there.cloud.failing.append(Status(code=code, message=message))
    async with there.provider() as provider:
        await provider.request("a", SPOT.offer)
        failed = await there.until(provider, lambda it: it["a"].state is MachineState.FAILED)
        assert failed["a"].failure is failure and message in failed["a"].detail


async def test_an_error_of_the_operation_is_raised_as_if_it_had_been_the_calls(there: Account) -> None:
    there.cloud.rejecting.append(Status(code=8, message="There is no more capacity in the zone"))
    there.service.on_operation = there.cloud.advance
    async with there.provider(settle_seconds=60) as provider:
        with pytest.raises(OutOfCapacity, match=r"fleet--a--1.*no more capacity"):
            await provider.request("a", SPOT.offer)
        assert not await provider.list()
        await provider.request("a", SPOT.offer)
        assert there.states() == {"fleet--a--1": "ACCEPTED"}
        there.service.faults.append(Fault("GetOperation", "UNAVAILABLE"))
        await provider.request("b", SPOT.offer)


async def test_a_full_quota_is_said_at_once_and_a_suspended_request_counts(there: Account) -> None:
    there.cloud.quota = 1
    async with there.provider() as provider:
        await there.running(provider, "a")
        there.cloud.preempt(f"{there.parent()}/nodes/fleet--a--1")
        with pytest.raises(QuotaExceeded, match=r"fleet--b--1.*Limit: 1 in zone us-west4-a"):
            await provider.request("b", SPOT.offer)
        await provider.request("b", ELSEWHERE.offer)


async def test_a_zone_out_of_reach_is_not_an_empty_one(there: Account) -> None:
    async with there.provider() as provider:
        await there.running(provider, "a")
        there.service.unreachable.add(HERE)
        for call in (provider.list(), provider.request("a", ELSEWHERE.offer), provider.release("a")):
            with pytest.raises(ProviderUnavailable, match="does not reach"):
                await call
        there.service.unreachable.clear()
        (machine,) = await provider.list()
        assert machine.state is MachineState.RUNNING


@pytest.mark.parametrize("method", ["CreateQueuedResource", "DeleteQueuedResource"])
async def test_a_call_whose_answer_was_lost_is_repeated_without_a_double(there: Account, method: str) -> None:
    async with there.provider() as provider:
        there.service.faults.append(Fault(method, "UNAVAILABLE", "connection reset", after=True))
        if method == "CreateQueuedResource":
            with pytest.raises(ProviderUnavailable):
                await provider.request("a", SPOT.offer)
        await there.running(provider, "a")
        if method == "DeleteQueuedResource":
            with pytest.raises(ProviderUnavailable):
                await provider.release("a")
        await provider.release("a")
        await there.until(provider, lambda it: not it)
        assert there.service.calls.count("CreateQueuedResource") == 1


async def test_one_that_exists_since_a_moment_ago_is_the_one_that_was_wanted(there: Account) -> None:
    async with there.provider() as provider, there.provider() as other:
        await asyncio.gather(provider.request("a", SPOT.offer), other.request("a", SPOT.offer))
        assert set(there.states()) == {"fleet--a--1"}


async def test_one_that_cannot_go_yet_is_asked_again_later(there: Account) -> None:
    async with there.provider() as provider:
        await provider.request("a", SPOT.offer)
        with pytest.raises(ProviderUnavailable, match="CREATING") as refused:
            await provider.release("a")
        assert refused.value.retry_after == 10
        await there.until(provider, lambda it: "WAITING_FOR_RESOURCES" in it["a"].detail)
        await provider.release("a")
        await there.until(provider, lambda it: not it)


async def test_releasing_what_is_not_there_is_no_error(there: Account) -> None:
    async with there.provider() as provider:
        await provider.release("never-was")
        await provider.release(f"{HERE}/fleet--never-was--1")
        there.service.faults.append(Fault("DeleteQueuedResource", "NOT_FOUND", "somebody else did"))
        await there.running(provider, "a")
        await provider.release("a")
        assert there.node_states() == {"fleet--a--1": "DELETING"}, "its node was deleted by itself"


async def test_health_and_maintenance_are_said(there: Account) -> None:
    async with there.provider() as provider:
        await there.running(provider, "a")
        node = there.cloud.nodes[f"{there.parent()}/nodes/fleet--a--1"]
        node.health, node.health_description = Node.Health(5), "host maintenance at 12:00"
        (machine,) = await provider.list()
        assert machine.state is MachineState.RUNNING
        assert machine.detail == "node READY, UNHEALTHY_MAINTENANCE: host maintenance at 12:00"


async def test_a_watcher_hears_every_state_and_the_end(there: Account) -> None:
    async with there.provider() as provider:
        await there.running(provider, "a")
        seen: list[Machine] = []
        async with aclosing(provider.watch()) as changes:  # type: ignore[type-var]
            async for machine in changes:
                seen.append(machine)
                there.cloud.advance()
                if len(seen) == 1:
                    there.cloud.preempt(f"{there.parent()}/nodes/fleet--a--1")
                elif machine.state is MachineState.PREEMPTED and "SUSPENDED" in machine.detail:
                    await provider.release("a")
                elif machine.detail == "gone":
                    break
        assert [seen[0].state, seen[1].state] == [MachineState.RUNNING, MachineState.PREEMPTED]


@pytest.mark.parametrize("name", ["A", "a--b", "a_b", "-a", "", "a" * 60, f"{HERE}/fleet--a--1"])
async def test_a_name_that_no_slice_can_have_is_refused_before_anything_is_asked(there: Account, name: str) -> None:
    async with there.provider() as provider:
        with pytest.raises(ProviderRefused, match=r"called|too long"):
            await provider.request(name, SPOT.offer)
        assert not there.service.calls


async def test_what_is_no_offer_is_refused(there: Account) -> None:
    async with there.provider(offers=(SPOT,)) as provider:
        with pytest.raises(ProviderRefused, match="no offer; there are v5litepod-8 in us-west4-a as spot"):
            await provider.request("a", ON_DEMAND.offer)


async def test_a_machine_whose_offer_is_gone_keeps_its_price(there: Account) -> None:
    async with there.provider() as provider:
        await there.running(provider, "a", ELSEWHERE.offer)
    async with there.provider(offers=(SPOT,), zones=(THERE,)) as later:
        (machine,) = await later.list()
        assert machine.offer == ELSEWHERE.offer


async def test_a_service_that_is_gone_is_said_to_be(there: Account) -> None:
    async with there.provider(call_seconds=0.2) as provider:
        there.service.latency = 30
        with pytest.raises(ProviderUnavailable, match="DEADLINE_EXCEEDED"):
            await provider.list()


class TestTpu(ProviderContract):
    """What every provider promises, of this one."""

    @pytest.fixture
    async def case(self) -> AsyncIterator[Case]:
        async with account() as there:
            config = config_for(there.address)
            there.cloud.strict = False

            async def open(fleet: FleetIdentity) -> Provider:
                return TpuProvider(config, fleet.name, fleet.join, plain, open_client(there.address, None))

            async def pass_time() -> None:
                await asyncio.sleep(0.01)  # a watcher looks now and then
                there.cloud.advance()

            async def preempt(name: str) -> None:
                there.cloud.preempt(f"{there.parent()}/nodes/{FLEET.name}--{name}--1")

            async def exhaust() -> None:
                there.cloud.capacity[HERE, "v5litepod-8"] = len(there.cloud.nodes)

            async def refresh() -> None:
                there.cloud.capacity[HERE, "v5litepod-8"] = 8

            def fault(method: str, code: str, message: str = "injected", after: bool = False) -> Act:
                async def prepare() -> None:
                    there.service.faults.append(Fault(method, code, message, after))

                return prepare

            create = "CreateQueuedResource"
            yield Case(
                open=open,
                pass_time=pass_time,
                preempt=preempt,
                exhaust=exhaust,
                refresh=refresh,
                waits=True,
                fails={
                    "quota": (QuotaExceeded, fault(create, "RESOURCE_EXHAUSTED", "Quota 'X' exhausted")),
                    "stockout": (OutOfCapacity, fault(create, "RESOURCE_EXHAUSTED", "no more capacity")),
                    "permission": (ProviderRefused, fault(create, "PERMISSION_DENIED")),
                    "list": (ProviderUnavailable, fault("List*", "UNAVAILABLE")),
                },
                lose_answer=fault(create, "DEADLINE_EXCEEDED", after=True),
                existing=lambda: len(there.cloud.requests),
            )


TRUST = {"join_token": "secret:projects/p/secrets/s"}
TABLE = {
    "kind": "tpu",
    "project": "project-1",
    "runtime_version": "v2-alpha-tpuv6e",
    "offers": [{"type": "v6e-8", "zone": HERE, "price": 5.0}],
}


async def test_it_is_opened_from_a_table_of_a_file(there: Account, tmp_path: Path) -> None:
    script = tmp_path / "start.sh"
    script.write_text("#!/bin/sh\ntrue\n")
    table = TABLE | {"startup_script": str(script), "endpoint": there.address, "insecure": True}
    config = provider_config(table, "[provider]")
    provider = await open_provider(config, FleetIdentity("fleet", "10.0.0.1:8470", ServeConfig()))
    assert provider.name == "tpu" and [offer.type for offer in await provider.offers()] == ["v6e-8"]
    assert not await provider.list()
    await provider.close()


@pytest.mark.parametrize("name", ["a--b", "f" * 25])
async def test_a_fleet_whose_machines_could_not_be_called_is_refused_at_once(there: Account, name: str) -> None:
    table = TABLE | {"endpoint": there.address, "insecure": True, "bootstrap": TRUST}
    config = provider_config(table, "[provider]")
    with pytest.raises(ConfigError, match=r"the fleet's name: .*(called|too long)"):
        await open_provider(config, FleetIdentity(name, "10.0.0.1:8470", ServeConfig()))
    await (await open_provider(config, FleetIdentity("f" * 24, "10.0.0.1:8470", ServeConfig()))).close()


async def test_a_machine_without_credentials_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GOOGLE_APPLICATION_CREDENTIALS", "APPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    with pytest.raises(ProviderRefused, match="cannot use Cloud TPU: no credentials"):
        config = provider_config(TABLE | {"bootstrap": TRUST}, "[provider]")
        await open_provider(config, FleetIdentity("fleet", "10.0.0.1:1", ServeConfig()))


async def test_each_machine_has_a_script_of_its_own(there: Account) -> None:
    table = TABLE | {"endpoint": there.address, "insecure": True, "bootstrap": TRUST | {"user": "tpu-user"}}
    table |= {"offers": [{"type": "v5litepod-8", "zone": HERE, "price": 4.5}], "settle_seconds": 0.0}
    provider = await open_provider(
        provider_config(table, "[provider]"), FleetIdentity("fleet", "10.0.0.1:8470", ServeConfig())
    )
    for name in ("worker-7", "worker-8"):
        await provider.request(name, (await provider.offers())[0])
    scripts = [queued.tpu.node_spec[0].node.metadata["startup-script"] for queued in there.cloud.requests.values()]
    assert all("10.0.0.1:8470" in script and "tpu-user" in script and HERE in script for script in scripts)
    assert ["worker-7" in script for script in scripts] == [True, False]
    await provider.close()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"startup_script": "/does/not/exist"}, "startup_script: cannot read"),
        (
            {"insecure": True, "endpoint": "tpu.googleapis.com:443"},
            "insecure: endpoint must be HOST",
        ),
        ({"labels": {"spotjax-fleet": "x"}}, "labels: spotjax-fleet is set by Spotjax"),
        ({"metadata": {"startup-script": "x"}}, "metadata: startup-script is set by Spotjax"),
        ({"offers": TABLE["offers"] * 2}, "offers: two are of the same type"),  # type: ignore[operator]
        ({"bootstrap": {"name": "x"}, "startup_script": ""}, "bootstrap: name follows from the machine"),
        ({"bootstrap": {"usre": "x"}, "startup_script": ""}, "bootstrap: .*usre"),
        ({"bootstrap": {"accelerator": "cuda12"}, "startup_script": ""}, "accelerator .* has no meaning on a TPU VM"),
        ({"bootstrap": {"user": "x"}}, "bootstrap has no meaning beside startup_script"),
        ({"offer": []}, "unknown field `offer`"),
        ({"offers": [{"type": "v6e", "zone": HERE, "price": 1.0}]}, "offers"),
        ({"project": ""}, "project"),
    ],
)
async def test_a_table_that_makes_no_sense_is_refused_by_name(
    tmp_path: Path, change: dict[str, object], problem: str
) -> None:
    script = tmp_path / "start.sh"
    script.write_text("true")
    with pytest.raises(ConfigError, match=problem):
        config = provider_config(TABLE | {"startup_script": str(script)} | change, "[provider]")
        await open_provider(config, FleetIdentity("fleet", "10.0.0.1:8470", ServeConfig()))


async def settled(there: Account, key: str, zone: str = HERE) -> None:
    """Moves the cloud on until a request can be deleted."""
    while there.cloud.requests[f"{there.parent(zone)}/queuedResources/{key}"].state.state.name == "CREATING":
        there.cloud.advance()


def plain_node() -> Node:
    return Node(runtime_version="v2-alpha-tpuv5-lite", accelerator_type="v5litepod-8")
