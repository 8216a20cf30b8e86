"""Compute Engine: the contract of all providers, and what is particular to it, against its service over HTTP."""

import asyncio
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from gce_cases import HERE, THERE, Service, config_for, identity, service
from google.cloud import compute_v1
from provider_contract import Case, ProviderContract, Watching

from spotjax.errors import (
    ConfigError,
    OutOfCapacity,
    ProviderError,
    ProviderRefused,
    ProviderUnavailable,
    QuotaExceeded,
)
from spotjax.fleet.providers.gce import GceConfig, GceOffer
from spotjax.fleet.providers.gce_machines import chosen
from spotjax.fleet.providers.provider import FleetIdentity, MachineState, Offer, Provider
from spotjax.fleet.providers.registry import provider_config

SPOT = Offer("g2-standard-4", HERE, "spot", 0.3)
ELSEWHERE = Offer("g2-standard-4", THERE, "spot", 0.3)
DEMAND = Offer("g2-standard-4", HERE, "on_demand", 0.9)


@pytest.fixture(scope="module")
def running() -> Iterator[Service]:
    with service(page=2) as running:
        yield running


@pytest.fixture
def compute(running: Service) -> Service:
    running.admin("reset")
    return running


class TestContract(ProviderContract):
    """See ``ProviderContract``."""

    @pytest.fixture
    def case(self, compute: Service) -> Case:
        async def opened(fleet: FleetIdentity) -> Provider:
            return compute.open(fleet)

        def act(what: str, **body: Any) -> Any:
            async def acting() -> None:
                await asyncio.to_thread(compute.admin, what, **body)

            return acting

        async def preempt(name: str) -> None:
            await asyncio.to_thread(compute.preempt, f"contract-{name}")

        def insert_fails(status: int, reason: str, **more: Any) -> Any:
            return act("fail", call="insert", status=status, reason=reason, **more)

        fails = {
            "operation: stockout": (OutOfCapacity, act("fail_operation", code="ZONE_RESOURCE_POOL_EXHAUSTED")),
            "operation: stockout with details": (
                OutOfCapacity, act("fail_operation", code="ZONE_RESOURCE_POOL_EXHAUSTED_WITH_DETAILS"),
            ),
            "operation: short": (OutOfCapacity, act("fail_operation", code="STOCKOUT")),
            "operation: quota": (QuotaExceeded, act("fail_operation", code="QUOTA_EXCEEDED")),
            "operation: rate": (ProviderUnavailable, act("fail_operation", code="RATE_LIMIT_EXCEEDED")),
            "operation: in use": (ProviderUnavailable, act("fail_operation", code="RESOURCE_IN_USE")),
            "operation: internal": (ProviderUnavailable, act("fail_operation", code="INTERNAL_ERROR")),
            "operation: not found": (ProviderRefused, act("fail_operation", code="RESOURCE_NOT_FOUND")),
            "operation: permission": (ProviderRefused, act("fail_operation", code="PERMISSIONS_ERROR")),
            "quota": (QuotaExceeded, insert_fails(403, "quotaExceeded")),
            "rate by user": (ProviderUnavailable, insert_fails(403, "userRateLimitExceeded")),
            "rate": (ProviderUnavailable, insert_fails(403, "rateLimitExceeded")),
            "too many": (ProviderUnavailable, insert_fails(429, "")),
            "forbidden": (ProviderRefused, insert_fails(403, "forbidden")),
            "unauthorized": (ProviderRefused, insert_fails(401, "authError")),
            "invalid": (ProviderRefused, insert_fails(400, "invalid")),
            "not ready": (ProviderUnavailable, insert_fails(400, "resourceNotReady")),
            "backend": (ProviderUnavailable, insert_fails(503, "backendError")),
            "gateway": (ProviderUnavailable, insert_fails(502, "", body="<html>bad gateway</html>")),
            "no JSON": (ProviderUnavailable, insert_fails(200, "", body="<html>welcome</html>")),
            "hang-up": (ProviderUnavailable, insert_fails(0, "")),
        }  # fmt: skip
        return Case(
            opened, preempt=preempt, exhaust=act("capacity", zone=HERE, type="g2-standard-4", count=1),
            refresh=act("no_limit"), fails=fails, existing=lambda: len(compute.instances()),
            lose_answer=act("fail", call="insert", status=0, after=True),
        )  # fmt: skip


async def test_an_instance_is_the_template_with_labels_metadata_and_the_class_that_it_is_rented_as(
    compute: Service,
) -> None:
    async with compute.provider(notice_seconds=None, termination="delete") as provider:
        await provider.request("a", SPOT)
        await provider.request("b", DEMAND)
        there = compute.instances()
    spot, demand = there[f"{HERE}/fleet-a"], there[f"{HERE}/fleet-b"]
    assert spot["labels"] == {"team": "serving", "spotjax-fleet": "fleet", "spotjax-name": "a"}
    metadata = {item["key"]: item["value"] for item in spot["metadata"]["items"]}
    assert metadata == {"startup-script": "#!/bin/sh", "kept": "yes", "spotjax-name": "a"}
    assert spot["disks"] == [{"boot": True, "autoDelete": True}]
    assert spot["scheduling"] == {
        "provisioningModel": "SPOT", "instanceTerminationAction": "DELETE", "onHostMaintenance": "TERMINATE",
        "automaticRestart": False, "preemptionNoticeDuration": {"seconds": "120"},
    }  # fmt: skip
    assert demand["scheduling"] == {
        "provisioningModel": "STANDARD", "onHostMaintenance": "TERMINATE", "automaticRestart": True,
    }  # fmt: skip


async def test_the_start_up_script_is_written_for_the_machine(compute: Service) -> None:
    options = {"wheel": "gs://bucket/spotjax-0.1.0-py3-none-any.whl", "grace_seconds": 110, "accelerator": "cuda12"}
    options |= {"join_token": "secret:projects/p/secrets/s"}
    async with compute.provider(bootstrap=options) as provider:
        await provider.request("a", DEMAND)
        metadata = compute.instances()[f"{HERE}/fleet-a"]["metadata"]["items"]
    (text,) = [item["value"] for item in metadata if item["key"] == "startup-script"]
    assert "notice_seconds" not in text
    spot = config_for(bootstrap=options, notice_seconds=120).start_up_script(identity(), "a", SPOT)
    assert "notice_seconds = 115.0" in spot and "grace_seconds = 110.0" in spot
    assert "jax[cuda12]" in text and f"name=a zone={HERE} price_class=on_demand" in text and "10.0.0.1:8470" in text


async def test_regional_templates_are_read_where_they_are(compute: Service) -> None:
    async with compute.provider(template="projects/project-1/regions/r/instanceTemplates/worker") as provider:
        assert (await provider.request("a", SPOT)).state is MachineState.STARTING


async def test_a_stockout_that_comes_late_is_that_of_the_machine_until_it_is_released(compute: Service) -> None:
    async with compute.provider(settle_seconds=0) as provider:
        compute.admin("fail_operation", code="ZONE_RESOURCE_POOL_EXHAUSTED")
        watching = Watching(provider)
        assert (await provider.request("a", SPOT)).state is MachineState.STARTING
        case = Case(open=lambda _: asyncio.sleep(0))  # type: ignore[arg-type,return-value]
        (failed,) = (await case.until(provider, lambda m: m["a"].state is MachineState.FAILED)).values()
        assert failed.failure is OutOfCapacity and "EXHAUSTED" in failed.detail
        await watching.until(case, lambda: watching.states("a")[-1:] == [MachineState.FAILED])
        assert (await provider.request("a", ELSEWHERE)).state is MachineState.FAILED
        await provider.release("a")
        await watching.until(case, lambda: watching.gone("a") == 1)
        assert await provider.list() == ()
        await provider.request("a", ELSEWHERE)
        await case.until(provider, lambda m: m["a"].state is MachineState.RUNNING)
        await watching.stop()


async def test_one_that_is_deleted_when_it_is_taken_is_told_as_gone(compute: Service) -> None:
    async with compute.provider(termination="delete") as provider:
        case = Case(open=lambda _: asyncio.sleep(0))  # type: ignore[arg-type,return-value]
        await provider.request("a", SPOT)
        await case.until(provider, lambda m: m["a"].state is MachineState.RUNNING)
        watching = Watching(provider)
        await watching.until(case, lambda: watching.states("a") == [MachineState.RUNNING])
        compute.preempt("fleet-a")
        await watching.until(case, lambda: watching.gone("a") == 1)
        assert await provider.list() == () and compute.instances() == {}
        await watching.stop()


async def test_what_was_taken_is_told_from_what_shut_itself_down(compute: Service) -> None:
    async with compute.provider() as provider:
        case = Case(open=lambda _: asyncio.sleep(0))  # type: ignore[arg-type,return-value]
        for name in ("a", "b", "c"):
            await provider.request(name, DEMAND if name == "c" else SPOT)
        await case.until(provider, lambda m: all(each.state is MachineState.RUNNING for each in m.values()))
        compute.preempt("fleet-a")
        for name in ("b", "c"):
            compute.admin("shut_down", zone=HERE, name=f"fleet-{name}")
        dead = await case.until(
            provider, lambda m: all(each.state in (MachineState.PREEMPTED, MachineState.FAILED) for each in m.values())
        )
        states = {name: machine.state for name, machine in dead.items()}
        assert states == {"a": MachineState.PREEMPTED, "b": MachineState.FAILED, "c": MachineState.FAILED}
        assert "shut itself down" in dead["b"].detail
        for name in dead:
            await provider.release(name)
        await case.until(provider, lambda m: not m)
    assert compute.instances() == {}, "what has stopped still costs its disk"


async def test_a_zone_that_is_silent_is_not_taken_for_an_empty_one(compute: Service) -> None:
    async with compute.provider() as provider:
        await provider.request("a", SPOT)
        compute.admin("silent", zones=[HERE])
        with pytest.raises(ProviderUnavailable, match=f"{HERE} did not answer"):
            await provider.list()
        with pytest.raises(ProviderUnavailable):
            await provider.request("a", ELSEWHERE)
        compute.admin("silent", zones=[])
        assert len(await provider.list()) == 1


async def test_listing_goes_through_all_pages_and_says_how_long_to_wait(compute: Service) -> None:
    async with compute.provider() as provider:
        await asyncio.gather(*(provider.request(f"m-{number}", SPOT) for number in range(7)))
        assert len(await provider.list()) == 7
        compute.admin("fail", call="list", status=503, reason="backendError", retry_after="7")
        with pytest.raises(ProviderUnavailable) as raised:
            await provider.list()
        assert raised.value.retry_after == 7


async def test_the_younger_of_two_instances_of_one_machine_is_given_back(compute: Service) -> None:
    async with compute.provider() as provider:
        await provider.request("a", SPOT)
        twin = compute.instances()[f"{HERE}/fleet-a"]
        compute.admin("place", zone=THERE, instance={key: twin[key] for key in ("name", "labels", "scheduling")})
        assert len(compute.instances()) == 2
        (machine,) = await provider.list()
        assert machine.offer.zone == HERE
        async with asyncio.timeout(30):
            while set(compute.instances()) != {f"{HERE}/fleet-a"}:
                await asyncio.sleep(0.01)


def test_an_instance_that_is_listed_twice_is_one() -> None:
    def instance(number: int, status: str) -> compute_v1.Instance:
        return compute_v1.Instance(id=number, status=status, labels={"spotjax-name": "a"}, zone="zones/z")

    best, more = chosen([instance(1, "STAGING"), instance(1, "RUNNING")])
    assert (best["a"].status, more) == ("RUNNING", [])
    best, more = chosen([instance(1, "TERMINATED"), instance(2, "RUNNING")])
    assert (best["a"].id, [each.id for each in more]) == (2, [1])


async def test_both_of_two_instances_of_one_machine_are_given_back_with_it(compute: Service) -> None:
    async with compute.provider() as provider:
        await provider.request("a", SPOT)
        twin = compute.instances()[f"{HERE}/fleet-a"]
        compute.admin("place", zone=THERE, instance={key: twin[key] for key in ("name", "labels", "scheduling")})
        await provider.release("a")
        async with asyncio.timeout(30):
            while compute.instances():
                await asyncio.sleep(0.01)


async def test_a_name_that_another_has_is_refused_and_left_alone(compute: Service) -> None:
    compute.admin("place", zone=HERE, instance={"name": "fleet-a"})
    async with compute.provider() as provider:
        with pytest.raises(ProviderRefused, match="not of this fleet"):
            await provider.request("a", SPOT)
        await provider.release("a")
        assert await provider.list() == () and len(compute.instances()) == 1


async def test_names_that_no_instance_can_have_are_refused(compute: Service) -> None:
    async with compute.provider() as provider:
        for name in ("A", "a_b", "a.b", "-a", "a-", "", "x" * 60):
            with pytest.raises(ProviderRefused, match="name of an instance"):
                await provider.request(name, SPOT)


async def test_a_controller_that_ends_at_any_moment_leaves_nothing_behind() -> None:
    """Every run ends a provider in the middle of a random call, with faults; the next one finds what there is."""
    draw = random.Random(7)
    with service(start_seconds=0.0, stop_seconds=0.0, operation_seconds=0.0) as compute:
        for _ in range(100):
            provider = compute.open(settle_seconds=draw.choice([0, 0.01]))
            if draw.random() < 0.5:
                late = draw.choice([0, 0, 0.02, 0.1])
                compute.admin(
                    "fail", call=draw.choice(["insert", "insert", "delete", "list", "operation"]),
                    status=draw.choice([0, 429, 503]), after=not late and draw.random() < 0.5, late=late,
                )  # fmt: skip
            acts = []
            for _ in range(draw.randint(1, 3)):
                name, offer = f"m-{draw.randrange(3)}", draw.choice([SPOT, ELSEWHERE, DEMAND])
                act = provider.request(name, offer) if draw.random() < 0.7 else provider.release(name)
                acts.append(asyncio.create_task(act))  # type: ignore[arg-type]
            await asyncio.sleep(draw.random() * 0.03)
            for act in acts:
                act.cancel()
            ended = await asyncio.gather(*acts, return_exceptions=True)
            assert all(not isinstance(end, Exception) or isinstance(end, ProviderError) for end in ended), ended
            await provider.close()
            assert len({each["name"] for each in compute.instances().values()}) <= 3
        await asyncio.sleep(0.2)  # what was late has arrived
        provider = compute.open()
        async with asyncio.timeout(30):
            while compute.instances():
                try:
                    for machine in await provider.list():
                        await provider.release(machine.name)
                except ProviderUnavailable:
                    continue
        await provider.close()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"offers": []}, "length >= 1"),
        ({"offers": [{"type": "g2", "zones": ["us-east1-b"]}]}, "none has a price"),
        ({"offers": [{"type": "g2", "zones": ["us-east1-b"], "spot_price": -1}]}, "negative"),
        ({"offers": [{"type": "g2", "zones": ["us-east1-b", "us-east1-b"], "spot_price": 1}]}, "same type"),
        ({"template": "worker"}, "template"),
        ({"notice_seconds": 60}, "notice_seconds"),
        ({"termination": "hibernate"}, "hibernate"),
        ({"endpoint": "http://127.0.0.1:1"}, "endpoint"),
        ({"bootstrap": {"joyn": "x"}}, "joyn"),
        ({"bootstrap": {"name": "x"}}, "name follows from what is rented"),
        ({"bootstrap": {"user": "A B"}}, "user"),
        ({"zone": "x"}, "zone"),
    ],
)
def test_what_is_wrong_in_a_table_is_named(change: dict[str, Any], says: str) -> None:
    table = {
        "kind": "gce", "project": "project-1", "template": "global/instanceTemplates/worker",
        "offers": [{"type": "g2-standard-4", "zones": ["us-east1-b"], "spot_price": 0.3}],
    }  # fmt: skip
    with pytest.raises(ConfigError, match=says):
        config = provider_config(table | change, "[provider]")
        assert isinstance(config, GceConfig)
        config.check(identity())


async def test_without_credentials_it_is_refused_when_it_is_opened(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    with pytest.raises(ProviderRefused, match=r"none\.json.*service account"):
        await config_for().open(identity())


async def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spotjax.fleet.providers.gce_compute", None)
    with pytest.raises(ConfigError, match=r"pip install 'spotjax\[gce\]'"):
        await config_for().open(identity())


def test_a_fleet_whose_name_no_label_can_have_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be called"):
        config_for().check(identity("My.Fleet"))


def test_spot_comes_before_on_demand_and_templates_may_be_of_a_type() -> None:
    own = GceOffer(type="a2-highgpu-1g", zones=(HERE,), spot_price=1.0, template="regions/r/instanceTemplates/a2")
    config = msgspec.structs.replace(config_for(), offers=(*config_for().offers, own))
    assert [offer.price_class for offer in config.all_offers] == ["spot"] * 4 + ["on_demand"] * 2
    assert config.template_of(Offer("a2-highgpu-1g", HERE, "spot", 1.0)).endswith(
        "project-1/regions/r/instanceTemplates/a2"
    )
    assert config.template_of(SPOT) == "projects/project-1/global/instanceTemplates/worker"
