"""Stand-ins for metadata services over HTTP: they say what they are told to, want what the real ones want, and fail."""

from __future__ import annotations

import time

import httpx
import pytest

from spotjax.errors import MetadataUnavailable
from spotjax.fleet.notices.asking import Asking
from spotjax.fleet.notices.patience import metadata_client
from spotjax.testing.metadata_aws import AwsMetadata
from spotjax.testing.metadata_azure import AzureMetadata
from spotjax.testing.metadata_faults import Kind
from spotjax.testing.metadata_server import MetadataServer

EVENTS = "/metadata/scheduledevents?api-version=2020-07-01"
HEADERS = {"Metadata": "true"}
READABLE = {Kind.SLOW, Kind.CONTENT_TYPE, Kind.BARE, Kind.STALE}
"""After which the answer can be read."""


@pytest.mark.parametrize("kind", Kind)
async def test_every_fault_meets_one_answer_over_http(kind: Kind) -> None:
    async with MetadataServer(AzureMetadata()).serving() as url, metadata_client() as client:
        asking = Asking("test", client, time.monotonic)
        fault = {"kind": kind, "seconds": 0.1, "status": 429, "retry_after": 7}
        (await client.post(f"{url}/admin/faults", json=[fault])).raise_for_status()
        if kind in READABLE:
            assert (await asking.ask("GET", url + EVENTS, HEADERS)).json()["Events"] == []
        else:
            with pytest.raises(MetadataUnavailable) as caught:
                (await asking.ask("GET", url + EVENTS, HEADERS)).json()
            assert caught.value.retry_after == (7 if kind is Kind.STATUS else None)
        assert (await asking.ask("GET", url + EVENTS, HEADERS)).json()["Events"] == []


async def test_orders_change_what_is_said_and_what_was_said_is_listed() -> None:
    async with MetadataServer(AzureMetadata()).serving() as url, metadata_client() as client:
        event = (await client.post(f"{url}/admin/orders/schedule", json={"type": "Preempt", "seconds": 30})).json()
        said = (await client.get(url + EVENTS, headers=HEADERS)).json()
        assert [each["EventId"] for each in said["Events"]] == [event]
        (answered,) = (await client.get(f"{url}/admin/answered")).json()[-1:]
        assert event in answered["body"] and answered["status"] == 200
        assert (await client.post(f"{url}/admin/orders/melt", json={})).status_code == 404


async def test_what_the_real_services_refuse_is_refused() -> None:
    forwarded = {"X-Forwarded-For": "10.0.0.1"}
    async with MetadataServer(AzureMetadata()).serving() as url, httpx.AsyncClient(base_url=url) as client:
        assert (await client.get(EVENTS)).status_code == 400
        assert (await client.get(EVENTS, headers=HEADERS | forwarded)).status_code == 400
        assert (await client.get("/metadata/scheduledevents", headers=HEADERS)).status_code == 400
        starts = {"StartRequests": [{"EventId": "unknown"}]}
        assert (await client.post(EVENTS, headers=HEADERS, json=starts)).status_code == 400
    clock = [1e9]
    async with (
        MetadataServer(AwsMetadata(lambda: clock[0])).serving() as url,
        httpx.AsyncClient(base_url=url) as client,
    ):
        wanted = "X-aws-ec2-metadata-token-ttl-seconds"
        assert (await client.put("/latest/api/token")).status_code == 400
        assert (await client.put("/latest/api/token", headers={wanted: "21601"})).status_code == 400
        assert (await client.put("/latest/api/token", headers={wanted: "60"} | forwarded)).status_code == 403
        assert (await client.get("/latest/meta-data/instance-life-cycle")).status_code == 401
        token = {"X-aws-ec2-metadata-token": (await client.put("/latest/api/token", headers={wanted: "60"})).text}
        assert (await client.get("/latest/meta-data/instance-life-cycle", headers=token)).text == "spot"
        assert (await client.get("/latest/meta-data/spot/instance-action", headers=token)).status_code == 404
        clock[0] += 60
        assert (await client.get("/latest/meta-data/instance-life-cycle", headers=token)).status_code == 401
