"""Every test of the transport runs on asyncio's loop and on uvloop, and leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import uvloop
from transport_cases import Authority, Net


def pytest_asyncio_loop_factories(config: Any, item: Any) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


def open_sockets() -> set[str]:
    """Internet sockets of this process; loops have others of their own."""
    found = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            target = os.readlink(descriptor)
            if target.startswith("socket:"):
                with socket.socket(fileno=os.dup(int(descriptor.name))) as copy:
                    if copy.family in (socket.AF_INET, socket.AF_INET6):
                        found.add(target)
    return found


@pytest_asyncio.fixture
async def net() -> AsyncIterator[Net]:
    before = open_sockets()
    made = Net()
    yield made
    for proxy in made.proxies:
        await asyncio.to_thread(proxy.close)
    for endpoint in made.endpoints:
        await endpoint.close()
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("spotjax")]
    for _ in range(100):  # loops close the sockets of ended transports some turns later
        if open_sockets() <= before:
            break
        await asyncio.sleep(0)
    assert open_sockets() <= before


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="session")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Another authority of the same name."""
    return Authority(tmp_path_factory.mktemp("stranger"))
