"""The page in a real browser, before a scripted fleet: everybody can use it, on any screen; it comes back by itself."""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from spotjax.tools import browser as browsers
from spotjax.tools.browser import until

if browsers.chromium() is None:
    pytest.skip(browsers.MISSING, allow_module_level=True)

from browser_cases import Scripted, scripted, unnamed, watched

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

STRANGER = "stranger.example"
"""A name of somebody else that leads here."""
UNPROTECTED = (f"--host-resolver-rules=MAP {STRANGER} 127.0.0.1", "--disable-features=LocalNetworkAccessChecks")
"""Other browsers let any site send requests to this machine, as Chromium did until lately."""
LOST = ("Failed to load resource",)
"""What Chromium says of a server that is away, or refuses."""


@pytest.fixture(scope="module")
def chromium() -> Iterator["Browser"]:
    with browsers.browser(*UNPROTECTED) as browser:
        yield browser


@pytest.fixture
def server() -> Iterator[Scripted]:
    with scripted() as server:
        yield server


@pytest.fixture
def page(chromium: "Browser", server: Scripted) -> Iterator["Page"]:
    with watched(chromium, server.page, allowed=("metrics",)) as page:
        page.wait_for_selector("#connection[data-state=ready]")
        page.wait_for_selector(".instance button")
        yield page


def press_until(page: "Page", key: str, selector: str) -> None:
    """Presses a key until the focus is there, as somebody without a mouse does; and it is to be seen where it is."""
    for _ in range(60):
        page.keyboard.press(key)
        if page.evaluate("wanted => document.activeElement.matches(wanted)", selector):
            outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            assert outline != "none", f"the focus on {selector} is not to be seen"
            return
    raise AssertionError(f"{selector} is not to be reached by {key}")


def test_a_drill_by_keyboard_alone_is_seen_in_fleet_headline_epochs_and_events(page: "Page") -> None:
    assert page.locator(".device[data-replica]").count() == 4
    assert page.inner_text("#headline .lead") == "2 instances serve scripted."
    press_until(page, "Tab", "[data-name=i-1] button")
    page.keyboard.press("Enter")
    page.wait_for_selector("#drill[open]")
    assert page.inner_text("#drill h2") == "Take i-1 away"
    press_until(page, "Tab", "#drill input[name=how]")
    page.keyboard.press("ArrowDown")
    assert page.is_disabled("#grace"), "there is no grace without notice"
    press_until(page, "Tab", "#drill button[value=ok]")
    page.keyboard.press("Enter")
    page.wait_for_selector("[data-name=i-1][data-state=gone]")
    page.wait_for_selector("#headline[data-tone=good]")
    assert page.inner_text("#headline .lead") == "Survived: i-1 was taken without notice."
    assert "Decoding paused for 0.25 s." in page.inner_text("#headline .more")
    assert page.get_attribute("#headline", "aria-live") == "polite"
    assert page.locator("#epochs button").count() == 1
    assert "paused 0.25 s" in str(page.get_attribute("#epochs button", "aria-label"))
    assert page.locator("#events li b").all_inner_texts() == ["switch", "lost", "ready"]
    assert page.locator(".device[data-replica]").count() == 2
    assert page.evaluate("document.activeElement.closest('dialog')") is None


def test_a_drill_is_only_carried_out_when_it_is_confirmed(page: "Page", server: Scripted) -> None:
    page.click("[data-name=i-0] button")
    page.keyboard.press("Escape")
    page.click("[data-name=i-0] button")
    page.fill("#grace", "99999")
    page.click("#drill button[value=ok]")
    assert page.is_visible("#drill"), "no such grace is taken"
    page.click("#drill .cancel")
    page.wait_for_selector("#drill", state="hidden")
    assert server.service.status().reconfigurations == 0


def test_what_the_fleet_refuses_is_told(chromium: "Browser", server: Scripted) -> None:
    with watched(chromium, server.page, LOST) as page:
        for name in ("i-2", "i-3", "i-4"):
            page.click("#add")
            page.wait_for_selector(f"[data-name={name}]")
        page.click("#add")
        page.wait_for_selector("#toast:not([hidden])")
        assert "1 instances were asked for, devices for 0 are left" in page.inner_text("#toast")


def test_everything_has_a_name_and_a_reason_to_be_there(page: "Page") -> None:
    page.click("[data-name=i-1] button")
    assert unnamed(page) == []
    page.keyboard.press("Escape")
    assert unnamed(page) == []
    names = page.locator(".instance button").evaluate_all("all => all.map(one => one.getAttribute('aria-label'))")
    assert names == ["Take i-0 away", "Take i-1 away"]
    assert page.locator("h1").count() == 1 and page.locator("main").count() == 1
    assert page.get_attribute(".device[data-replica] >> nth=0", "title") == (
        "device 0: replica 0, stage 0 of 2, tensor shard 0 of 1, layers 0\u20131"
    )


def test_a_phone_shows_all_of_it_without_scrolling_sideways(chromium: "Browser", server: Scripted) -> None:
    options = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
    with watched(chromium, server.page, ("metrics",), **options) as page:
        page.wait_for_selector(".instance button")
        page.tap("[data-name=i-1] button")
        page.wait_for_selector("#drill[open]")
        page.tap("#drill button[value=ok]")
        page.wait_for_selector("#epochs button")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        heights = page.locator("button:visible").evaluate_all("all => all.map(one => one.offsetHeight)")
        assert min(heights) >= 24, "fingers are not that small"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_follow_the_reader(chromium: "Browser", server: Scripted, scheme: str) -> None:
    with watched(chromium, server.page, ("metrics",), color_scheme=scheme, reduced_motion="reduce") as page:
        page.wait_for_selector(".device[data-replica]")
        channels = re.findall(r"\d+", page.evaluate("getComputedStyle(document.documentElement).backgroundColor"))
        assert (sum(map(int, channels)) < 150) is (scheme == "dark")
        shown = page.locator(".device[data-replica]").evaluate_all(
            "all => all.map(one => getComputedStyle(one).background)"
        )
        assert len(set(shown)) == 4, "each of two replicas of two stages has its colour"


def test_it_says_that_the_server_is_away_and_comes_back_with_what_it_missed(
    chromium: "Browser", server: Scripted
) -> None:
    with watched(chromium, server.page, ("metrics", *LOST)) as page:
        page.wait_for_selector(".instance button")
        page.context.set_offline(True)
        page.wait_for_selector("#connection[data-state=lost]")
        assert page.inner_text("#connection") == "disconnected, trying again"
        server.do(server.service.preempt("i-0", 1.0))
        assert page.get_attribute("[data-name=i-0]", "data-state") == "ready", "nobody has told the page"
        page.context.set_offline(False)
        page.wait_for_selector("#connection[data-state=ready]")
        page.wait_for_selector("[data-name=i-0][data-state=gone]")
        until(page, "document.querySelectorAll('#events li').length === 3")
        assert page.locator("#events li b").all_inner_texts() == ["switch", "lost", "ready"], "each of them once"


def test_text_goes_on_where_it_was_when_another_server_is_there(chromium: "Browser", server: Scripted) -> None:
    with watched(chromium, server.page, LOST) as page:
        page.wait_for_selector(".instance button")
        page.fill("#tokens", "150")
        page.click("#go")
        until(page, "document.querySelector('#text').textContent.length > 30")
        server.leave()
        until(page, "document.querySelector('#text-state').textContent.startsWith('The server is away')")
        page.wait_for_selector("#connection[data-state=lost]")
        server.come_back()
        until(page, "document.querySelector('#text-state').textContent.startsWith('Complete')")
        (request,) = server.service.requests.values()
        text = "".join(
            page.locator("#text").evaluate("box => [...box.childNodes].slice(1).map(one => one.textContent)")
        )
        assert text == request.script[0][1]
        assert " across 1 broken connection; " in page.inner_text("#text-state")


def test_where_there_are_keys_it_asks_for_one_and_shows_what_its_role_may(chromium: "Browser") -> None:
    with scripted(keyed=True) as server, watched(chromium, server.page, ("metrics", *LOST)) as page:
        page.wait_for_selector("#key[open]")
        page.fill("#key-value", "a wrong one")
        page.keyboard.press("Enter")
        until(page, "document.querySelector('#key').open && !document.querySelector('#key-value').value")
        page.fill("#key-value", "the-viewer-key")
        page.keyboard.press("Enter")
        page.wait_for_selector("#connection[data-state=ready]")
        page.wait_for_selector(".instance")
        page.wait_for_selector("#try", state="hidden")
        assert page.locator(".instance button:visible").count() == 0 and not page.is_visible("#add")
        page.click("#key-open")
        page.fill("#key-value", "the-admin-key")
        page.click("#key button[value=ok]")
        page.wait_for_selector(".instance button")
        assert page.is_visible("#try") and page.is_visible("#add")
        stored = page.evaluate("[{...sessionStorage}, {...localStorage}, document.cookie, location.href]")
        assert stored == [{"spotjax-api-key": "the-admin-key"}, {}, "", server.page], "in this tab and nowhere else"


ATTACK = """async target => {
    const body = JSON.stringify({instance: "i-0"});
    const json = {"Content-Type": "application/json"};
    const tries = [{mode: "no-cors"}, {headers: json}, {mode: "no-cors", credentials: "include"}];
    return Promise.all(tries.map(one => fetch(target, {method: "POST", body, ...one}).then(
        answer => answer.type === "opaque" ? "opaque" : answer.status, () => "refused")));
}"""


def test_other_sites_that_an_operator_visits_can_do_nothing(chromium: "Browser", server: Scripted) -> None:
    page = chromium.new_page()
    page.route("http://other.example/", lambda route: route.fulfill(body="<p>hello", content_type="text/html"))
    page.goto("http://other.example/")
    assert page.evaluate(ATTACK, f"http://127.0.0.1:{server.port}/fleet/preempt") == ["opaque", "refused", "opaque"]
    rebound = page.goto(f"http://{STRANGER}:{server.port}/ui/")
    assert rebound is not None and rebound.status == 403
    assert page.evaluate(ATTACK, "/fleet/preempt") == [403, 403, 403]
    page.close()
    assert server.service.status().reconfigurations == 0
