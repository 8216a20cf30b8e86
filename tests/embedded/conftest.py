"""Servers whose compiled programs are shared through one directory."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where compiled programs are kept, so that only the first server compiles."""
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    """An event loop that outlives a test: servers are shared by the tests of a module."""
    with asyncio.Runner() as runner:
        yield runner
