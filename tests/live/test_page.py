"""A preemption of a real server, as whoever looks at the page sees it; and the pictures of it that the docs show."""

from pathlib import Path

import httpx
import pytest

from spotjax.tools import browser as browsers
from spotjax.tools import screenshots
from spotjax.tools.browser import until
from spotjax.tools.page_server import PageServer, page_server, streams

if browsers.chromium() is None:
    pytest.skip(browsers.MISSING, allow_module_level=True)

FLAGS = (
    "--instances", "3", "--devices-per-instance", "1", "--mesh", "1x2x1", "--leave", "late",
    "--max-batch", "4", "--prefill-tokens", "64", "--max-model-len", "1024", "--no-fuse",
)  # fmt: skip
"""One of three is spare; few shapes, so that little is compiled."""
TOKENS = 1000
"""Many, so that the text does not end before somebody has clicked through a dialog."""
PROMPT = "Once upon a time"
TEXT = """[...document.querySelector("#text").childNodes].slice(1)
    .filter(one => one.tagName !== "MARK").map(one => one.textContent).join("")"""


def undisturbed(server: PageServer) -> str:
    """What the page's request is answered with while nothing happens."""
    body = {"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0.8, "seed": 1}
    answer = httpx.post(f"{server.http}/v1/completions", json=body, timeout=60, trust_env=False)
    return str(answer.raise_for_status().json()["choices"][0]["text"])


@pytest.mark.timeout(400)
def test_a_preemption_is_seen_on_the_page_and_the_text_on_it_is_the_one_without(programs: Path, tmp_path: Path) -> None:
    with (
        page_server(tmp_path, (*FLAGS, "--compilation-cache", str(programs))) as server,
        browsers.browser() as chromium,
    ):
        expected = undisturbed(server)
        page = chromium.new_page()
        page.set_default_timeout(60_000)
        page.goto(server.page)
        page.wait_for_selector(".instance button")
        before = page.locator("#epochs button").count()
        page.fill("#prompt", PROMPT)
        page.fill("#tokens", str(TOKENS))
        page.click("#go")
        until(page, "document.querySelector('#text').textContent.length > 40")
        taken = screenshots.holder(page)
        screenshots.drill(page, taken, 0)
        page.wait_for_selector("#text mark")
        assert page.locator("#epochs button").count() == before + 1
        assert page.inner_text("#headline .lead") == f"Survived: {taken} was taken without notice."
        page.wait_for_selector(f"[data-name={taken}][data-state=gone]")
        until(page, "/^(Complete|The model ended it)/.test(document.querySelector('#text-state').textContent)")
        assert page.evaluate(TEXT) == expected
        assert "across 1 change of the mesh" in page.inner_text("#text-state")
        page.click("#add")
        page.wait_for_selector(f"[data-name={taken}][data-state=ready]")
        page.close()

        with streams(server, 1, TOKENS):
            pictures = screenshots.take(chromium, server, tmp_path, warm=0.2, grace=3.0)
        assert len(pictures) == 5
        for picture in pictures:
            assert picture.read_bytes().startswith(b"\x89PNG")
            assert 10_000 < picture.stat().st_size < screenshots.MOST_BYTES
