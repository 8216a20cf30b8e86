"""The page as files: small, self-contained, served with a strict policy, with colours that can be read."""

import re
import tomllib
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import httpx
import pytest

from spotjax.api.backend import Backend
from spotjax.api.http.app import application
from spotjax.api.http.ui import HEADERS, page_files

MOST_BYTES = 64 * 1024
READABLE = 4.5
"""Contrast of text, WCAG 2.2 AA."""
SEEN = 3.0
"""Contrast of what is no text but says something."""
CSS = page_files()["style.css"].content.decode()
HTML = page_files()["index.html"].content.decode()


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(application(Backend()))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8471") as client:
        yield client


async def test_every_file_is_served_with_the_policy_before_there_is_a_model(client: httpx.AsyncClient) -> None:
    for name, file in page_files().items():
        answer = await client.get(f"/ui/{name}")
        assert (answer.status_code, answer.content) == (200, file.content)
        assert (
            HEADERS.items()
            <= {key.title() if key != "etag" else key: value for key, value in answer.headers.items()}.items()
        )
        assert answer.headers["content-type"].partition(";")[0] in (
            "text/html",
            "text/css",
            "text/javascript",
            "image/svg+xml",
        )
        again = await client.get(f"/ui/{name}", headers={"If-None-Match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    assert (await client.get("/ui/")).content == page_files()["index.html"].content


async def test_the_way_to_the_page_is_relative_so_that_a_proxy_may_move_it(client: httpx.AsyncClient) -> None:
    for path in ("/", "/ui"):
        answer = await client.get(path)
        assert (answer.status_code, answer.headers["location"]) == (307, "ui/")


@pytest.mark.parametrize("path", ["/ui/other.js", "/ui/../app.py", "/ui/%2e%2e/app.py", "/ui//etc/passwd", "/ui/page"])
async def test_nothing_but_the_page_is_served(client: httpx.AsyncClient, path: str) -> None:
    assert (await client.get(path)).status_code == 404


def test_it_is_small_and_needs_nothing_from_elsewhere() -> None:
    assert sum(len(file.content) for file in page_files().values()) < MOST_BYTES
    for name, file in page_files().items():
        addresses = set(re.findall(r"https?://[^\s\"'`)]+", file.content.decode()))
        assert addresses <= {"http://www.w3.org/2000/svg"}, name
    assert not re.search(r"<script(?![^>]*src=)|<style|\sstyle=|\son\w+=", HTML), "the policy allows nothing inline"
    for name, file in page_files().items():
        imported = re.findall(r"from \"\./([\w.]+)\"", file.content.decode())
        assert {*imported} <= page_files().keys(), name


def test_wheels_have_the_page() -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["package-data"]["spotjax.api.http"] == ["page/*"]
    assert "spotjax.api.http" in project["tool"]["setuptools"]["packages"]


def tokens(block: str) -> dict[str, str]:
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))


LIGHT = tokens(CSS.partition("@media")[0])
DARK = LIGHT | tokens(CSS.partition("@media (prefers-color-scheme: dark)")[2].partition("\n}")[0])


def luminance(colour: str) -> float:
    """Relative luminance, as WCAG 2 defines it."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [LIGHT, DARK], ids=["light", "dark"])
def test_text_can_be_read_on_what_it_stands_on(scheme: Mapping[str, str]) -> None:
    texts = ("ink", "muted", "accent", "good", "warn", "bad")
    pairs = [(text, ground) for text in texts for ground in ("paper", "surface")]
    pairs += [("on-accent", "accent"), ("on-bad", "bad"), ("surface", "warn")]
    pairs += [("ink", f"r{number}") for number in range(8)]  # shades of stages lie between these and the surface
    poor = {pair: ratio for pair in pairs if (ratio := contrast(scheme[pair[0]], scheme[pair[1]])) < READABLE}
    assert not poor
    assert contrast(scheme["muted"], scheme["paper"]) >= SEEN, "edges of fields"


def test_light_and_dark_have_the_same_tokens() -> None:
    dark = tokens(CSS.partition("@media (prefers-color-scheme: dark)")[2].partition("\n}")[0])
    assert dark.keys() == LIGHT.keys() and not dark.items() & LIGHT.items()
