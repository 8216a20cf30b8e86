"""A headless Chromium of the system's, for tests of the page and pictures of it."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from spotjax.errors import ConfigError

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
SECONDS = 60.0
MISSING = "there is no Chromium on the path: install it (Debian: apt-get install chromium)"


def chromium() -> str | None:
    """Where it is; None where it is not installed."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@contextmanager
def browser(*flags: str) -> Iterator[Browser]:
    """It, running.

    Args:
      flags: of Chromium.

    Raises:
      ConfigError: Playwright or Chromium is not installed.
    """
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise ConfigError("this needs Playwright: pip install 'spotjax[test]'") from error
    if (path := chromium()) is None:
        raise ConfigError(MISSING)
    sandbox = [] if os.geteuid() else ["--no-sandbox"]  # Chromium has none for root
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=path, args=[*sandbox, *flags])
        try:
            yield launched
        finally:
            launched.close()


def until(page: Page, condition: str) -> None:
    """Waits for a condition in JavaScript; Playwright's own way is against the page's content security policy."""
    deadline = time.monotonic() + SECONDS
    while not page.evaluate(condition):
        if time.monotonic() > deadline:
            raise TimeoutError(condition)
        page.wait_for_timeout(20)
