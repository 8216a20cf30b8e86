"""An event loop for servers that tests share."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    """An event loop that outlives a test: servers are shared by the tests of a module."""
    with asyncio.Runner() as runner:
        yield runner
