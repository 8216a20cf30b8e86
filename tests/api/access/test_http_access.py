"""Callers over HTTP: the middleware before an application that says who was let in."""

import httpx
import pytest
from access_cases import NamesAsKeys
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from spotjax.api.access.current import current_caller
from spotjax.api.http.access import AccessMiddleware
from spotjax.api.http.errors import error_response
from spotjax.errors import RateLimited


async def who(request: Request) -> PlainTextResponse:
    if request.url.path == "/health":
        return PlainTextResponse("well")
    return PlainTextResponse(current_caller().name)


def client() -> httpx.AsyncClient:
    app = Starlette(routes=[Route("/{path:path}", who, methods=["GET", "POST", "DELETE"])])
    transport = httpx.ASGITransport(AccessMiddleware(app, NamesAsKeys()))
    return httpx.AsyncClient(transport=transport, base_url="http://spotjax")


async def test_probes_and_the_page_are_open() -> None:
    async with client() as http:
        assert (await http.get("/health")).text == "well"
        for path in ("/healthy", "/uix", "/v1/models", "/metrics", "/fleet/status", "/anything"):
            assert (await http.get(path)).status_code == 401


async def test_a_request_without_a_valid_key_is_told_how_to_authenticate() -> None:
    async with client() as http:
        for headers in ({}, {"Authorization": "Bearer nobody"}, {"Authorization": "Basic YW5u"}):
            answer = await http.post("/v1/completions", headers=headers)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"].startswith("Bearer")
            assert answer.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize(
    ("caller", "verb", "path", "status"),
    [
        ("ann", "POST", "/v1/completions", 200),
        ("ann", "GET", "/metrics", 403),
        ("ann", "POST", "/fleet/preempt", 403),
        ("eve", "GET", "/metrics", 200),
        ("eve", "GET", "/fleet/status", 200),
        ("eve", "POST", "/fleet/preempt", 403),
        ("eve", "POST", "/v1/completions", 403),
        ("root", "POST", "/fleet/preempt", 200),
        ("root", "DELETE", "/something/new", 200),
        ("ann", "GET", "/something/new", 403),
    ],
)
async def test_a_role_has_its_rights_and_no_others(caller: str, verb: str, path: str, status: int) -> None:
    async with client() as http:
        answer = await http.request(verb, path, headers={"Authorization": f"Bearer {caller}"})
        assert answer.status_code == status
        assert status != 200 or answer.text == caller


def test_a_used_up_limit_says_when_to_come_again() -> None:
    answer = error_response(RateLimited("used up", 1.2))
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "2")
