"""Pictures of the page for README and docs: ``python -m spotjax.tools.screenshots``.

Serves the shipped model on six virtual instances, two of them spare, generates text on it, takes an instance away with
notice, and keeps what a browser shows before, while and after: in ``docs/images``, or where ``--output`` says.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from spotjax.tools.browser import browser, until
from spotjax.tools.page_server import PageServer, page_server, streams

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

FLAGS = ("--instances", "6", "--mesh", "2x2x2", "--leave", "late", "--max-batch", "8")
GRACE_SECONDS = 8
WARM_SECONDS = 20
"""Of load before the first picture, so that there is a curve to see."""
COLOURS = 192
MOST_BYTES = 200_000
MILLISECONDS = 60_000.0


def main(argv: Sequence[str] | None = None) -> int:
    """Takes all pictures; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/images"), metavar="DIRECTORY")
    directory: Path = parser.parse_args(argv).output
    directory.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="spotjax-page-") as files,
        page_server(Path(files), FLAGS) as server,
        browser() as chromium,
        streams(server, 5, 300),
    ):
        for path in take(chromium, server, directory, WARM_SECONDS, GRACE_SECONDS):
            print(f"{path}: {path.stat().st_size // 1000} kB")
    return 0


def take(chromium: Browser, server: PageServer, directory: Path, warm: float, grace: float) -> list[Path]:
    """A preemption of an instance that the mesh stands on, as pictures. Returns their paths."""
    wide, dark = (
        chromium.new_page(viewport={"width": 1200, "height": 860}, device_scale_factor=1.5, color_scheme=scheme)
        for scheme in ("light", "dark")
    )
    phone = chromium.new_page(viewport={"width": 360, "height": 780}, device_scale_factor=2, color_scheme="light")
    for page in (wide, dark, phone):
        page.set_default_timeout(MILLISECONDS)
        page.goto(server.page)
        page.wait_for_selector(".device[data-replica]")
    wide.wait_for_timeout(1000 * warm)
    wide.fill("#tokens", "400")
    wide.click("#go")
    until(wide, "document.querySelector('#text').textContent.length > 60")
    taken = [kept(wide, directory / "page-before.png")]
    instance = holder(wide)
    drill(wide, instance, grace)
    wide.wait_for_selector(f"[data-name={instance}][data-state=noticed]")
    wide.wait_for_selector("#flows.live .flow", state="attached")
    taken += [
        kept(wide, directory / "page-during.png"),
        kept(phone, directory / "page-phone.png"),
        kept(dark, directory / "page-dark.png"),
    ]
    wide.wait_for_selector("#headline[data-tone=good]")
    wide.evaluate("document.querySelector('#text mark')?.scrollIntoView({block: 'center'}); scrollTo(0, 0)")
    taken.append(kept(wide, directory / "page-after.png"))
    for page in (wide, dark, phone):
        page.close()
    return taken


def holder(page: Page) -> str:
    """The second of the instances that have a part of the mesh."""
    return str(page.locator(".instance:has(.device[data-replica])").nth(1).get_attribute("data-name"))


def drill(page: Page, instance: str, grace_seconds: float) -> None:
    """Takes an instance away by the page's own dialog; with no grace unannounced."""
    page.click(f"[data-name={instance}] button")
    if grace_seconds:
        page.check("#drill input[value=notice]")
        page.fill("#grace", f"{grace_seconds:g}")
    else:
        page.check("#drill input[value=now]")
    page.click("#drill button[value=ok]")


def kept(page: Page, path: Path) -> Path:
    """Writes a small PNG of what is in view, with as few colours as such a page has."""
    from PIL import Image

    with Image.open(io.BytesIO(page.screenshot())) as picture:
        picture.convert("RGB").quantize(COLOURS).save(path, optimize=True)
    return path


if __name__ == "__main__":
    raise SystemExit(main())
