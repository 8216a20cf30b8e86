"""A machine knows its cloud by what only that cloud's metadata server says, and mistakes nobody else for one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from metadata_cases import now
from virtual_time import run

from spotjax.fleet.notices.detect import PAUSES, Machine, Platform, detect, detect_patiently, sources_of
from spotjax.testing.metadata_aws import AwsMetadata
from spotjax.testing.metadata_azure import AzureMetadata
from spotjax.testing.metadata_faults import PORTAL
from spotjax.testing.metadata_gce import GceMetadata
from spotjax.testing.metadata_server import Metadata, MetadataTransport

PLATFORMS: dict[Platform, Callable[[], Metadata]] = {
    Platform.GCE: GceMetadata,
    Platform.TPU: lambda: GceMetadata(tpu=True),
    Platform.AWS: AwsMetadata,
    Platform.AZURE: AzureMetadata,
}


def found(transport: httpx.AsyncBaseTransport, **arguments: Any) -> tuple[Platform | None, float]:
    """The platform, and seconds that it took to find it."""

    async def main() -> tuple[Platform | None, float]:
        async with httpx.AsyncClient(transport=transport) as client:
            began = now()
            return await detect_patiently(client, "http://metadata", **arguments), now() - began

    return run(main())


@pytest.mark.parametrize("platform", Platform)
def test_every_cloud_is_found_at_once(platform: Platform) -> None:
    assert found(MetadataTransport(PLATFORMS[platform]())) == (platform, 0.0)


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(200, content=PORTAL),
        httpx.Response(200, content=b""),
        httpx.Response(302, headers={"Location": "http://portal.example/"}),
        httpx.Response(404),
        httpx.Response(200, json={"compute": "no"}),
        httpx.Response(200, json=["compute"]),
    ],
)
def test_nobody_else_is_taken_for_a_cloud(answer: httpx.Response) -> None:
    platform, took = found(httpx.MockTransport(lambda request: answer))
    assert platform is None and took == pytest.approx(sum(PAUSES))


def test_a_machine_without_network_asks_until_it_has_one() -> None:
    metadata = MetadataTransport(GceMetadata())

    async def late(request: httpx.Request) -> httpx.Response:
        if now() < 1010:
            raise httpx.ConnectError("network is unreachable")
        if now() < 1020:
            await asyncio.sleep(1000)
        return await metadata.handle_async_request(request)

    platform, took = found(httpx.MockTransport(late))
    assert platform is Platform.GCE and 20 < took < 45


def test_what_every_cloud_can_say_is_listened_to() -> None:
    async def main() -> dict[Platform, list[str]]:
        async with httpx.AsyncClient() as client:
            sources = {p: sources_of(p, Machine("vm"), client, now) for p in Platform}
            return {platform: [source.name for source in each] for platform, each in sources.items()}

    assert run(main()) == {
        Platform.GCE: ["gce", "gce-maintenance", "gce-upcoming"],
        Platform.TPU: ["tpu", "tpu-maintenance", "tpu-upcoming"],
        Platform.AWS: ["aws"],
        Platform.AZURE: ["azure"],
    }


def test_one_look_asks_all_clouds_at_once() -> None:
    asked: list[tuple[float, str]] = []

    async def slow(request: httpx.Request) -> httpx.Response:
        asked.append((now(), request.url.path))
        await asyncio.sleep(1000)
        return httpx.Response(200)

    async def main() -> tuple[Platform | None, float]:
        async with httpx.AsyncClient(transport=httpx.MockTransport(slow)) as client:
            return await detect(client, "http://metadata"), now()

    assert run(main()) == (None, 1002.0)
    assert [moment for moment, _ in asked] == [1000.0] * 3
