"""A server with the page, as a process of its own, and streams that it generates."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from spotjax.api.errors import Unavailable
from spotjax.client import SpotjaxClient
from spotjax.tools.processes import Process, free_port

START_SECONDS = 300.0
HOST = "127.0.0.1"


@dataclass(frozen=True)
class PageServer:
    """Where it listens.

    Attributes:
      grpc: HOST:PORT.
      http: base URL.
      page: URL of the page.
    """

    grpc: str
    http: str

    @property
    def page(self) -> str:
        return f"{self.http}/ui/"


@contextmanager
def page_server(directory: Path, flags: Sequence[str]) -> Iterator[PageServer]:
    """A server that is ready; its files are in ``directory``."""
    grpc, http = (f"{HOST}:{free_port(HOST)}" for _ in range(2))
    command = (
        sys.executable, "-m", "spotjax.serve", "--listen", grpc, "--http", http, "--commit-log",
        str(directory / "commits"), *flags,
    )  # fmt: skip
    process = Process("server", command, directory)
    server = PageServer(grpc, f"http://{http}")
    try:
        deadline = time.monotonic() + START_SECONDS
        with httpx.Client(trust_env=False) as client:
            while not _ready(client, server):
                if process.exit_code is not None or time.monotonic() > deadline:
                    raise Unavailable(f"the server did not start; its log is in {directory}")
                time.sleep(0.05)
        yield server
    finally:
        process.kill()


def _ready(client: httpx.Client, server: PageServer) -> bool:
    try:
        return client.get(f"{server.http}/ready").status_code == 200
    except httpx.TransportError:
        return False


@contextmanager
def streams(server: PageServer, count: int, tokens: int) -> Iterator[None]:
    """So many requests run at a time, one after the other, until the body ends."""
    ending = threading.Event()

    def generate(number: int) -> None:
        with SpotjaxClient(server.grpc) as client:
            for turn in range(1000):
                for _ in client.generate(
                    f"Story {number}", max_tokens=tokens, temperature=1.0, seed=turn, ignore_eos=True
                ):
                    if ending.is_set():
                        return

    threads = [threading.Thread(target=generate, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ending.set()
        for thread in threads:
            thread.join()
