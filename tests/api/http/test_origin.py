"""Pages of other sites cannot make a browser act here; whoever is no browser does not notice."""

from collections.abc import AsyncIterator

import httpx
import pytest
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from spotjax.api.http.origin import OwnPagesOnly, cross_site, foreign_name

HERE = "127.0.0.1:8471"


@pytest.mark.parametrize(
    ("headers", "passes"),
    [
        ({}, True),
        ({"sec-fetch-site": "same-origin", "origin": f"http://{HERE}"}, True),
        ({"sec-fetch-site": "none"}, True),
        ({"sec-fetch-site": "cross-site"}, False),
        ({"sec-fetch-site": "same-site"}, False),
        ({"sec-fetch-site": "cross-site", "origin": f"http://{HERE}"}, False),
        ({"origin": f"http://{HERE}"}, True),
        ({"origin": f"HTTPS://{HERE}"}, True),
        ({"origin": "http://127.0.0.1:9999"}, False),
        ({"origin": "https://evil.example"}, False),
        ({"origin": "null"}, False),
        ({"origin": ""}, False),
        ({"origin": "http://["}, False),
    ],
)
def test_what_changes_something_comes_from_an_own_page_or_none(headers: dict[str, str], passes: bool) -> None:
    assert (cross_site("POST", Headers({"host": HERE, **headers})) is None) is passes
    assert (cross_site("DELETE", Headers({"host": HERE, **headers})) is None) is passes
    assert cross_site("GET", Headers({"host": HERE, **headers})) is None


@pytest.mark.parametrize(
    "host",
    [
        "", "localhost", "LOCALHOST:8471", "127.0.0.1", "10.1.2.3:80", "[::1]:8471", "[fe80::1%eth0]", "box",
        "box:8471", "spotjax.default.svc", "spotjax.default.svc.cluster.local:80", "x.localhost", "a.internal",
        "own.example.com:1",
        "OWN.example.com.",
    ],
)  # fmt: skip
def test_names_that_no_stranger_can_have_are_ours(host: str) -> None:
    assert foreign_name(host, {"own.example.com"}) is None


@pytest.mark.parametrize(
    "host",
    [
        "evil.example", "evil.example:8471", "127.0.0.1.evil.example", "127.0.0.1.nip.io:8471",
        "localhost.evil.example", "evilinternal.com", "example.com", "sub.own.example.com", "a.b", "1.2.3",
        "[::1].evil.example:x]y",
    ],
)  # fmt: skip
def test_names_that_a_stranger_can_have_are_refused(host: str) -> None:
    assert foreign_name(host, {"own.example.com"}) is not None


async def reached(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"reached"})


def client_of(names: list[str] | None) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(OwnPagesOnly(reached, names)), base_url=f"http://{HERE}")


@pytest.fixture
async def open_client() -> AsyncIterator[httpx.AsyncClient]:
    """Of a server without keys."""
    async with client_of(["Own.Example.com"]) as client:
        yield client


async def test_a_name_that_was_pointed_here_reaches_nothing_where_there_are_no_keys(
    open_client: httpx.AsyncClient,
) -> None:
    for verb in ("GET", "POST"):
        answer = await open_client.request(verb, "/fleet/status", headers={"Host": "evil.example:8471"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "foreign_name")
        assert "http_names" in answer.json()["error"]["message"]
        assert (await open_client.request(verb, "/", headers={"Host": "own.example.com"})).text == "reached"


async def test_with_keys_any_name_will_do_and_another_sites_page_still_changes_nothing() -> None:
    async with client_of(None) as client:
        assert (await client.post("/", headers={"Host": "evil.example"})).text == "reached"
        answer = await client.post("/", headers={"Origin": "https://evil.example"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "cross_site")
