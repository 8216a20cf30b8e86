"""What the tests of the page share: a scripted server in a thread of its own, and pages that are watched."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import Browser, ConsoleMessage, Page, Request

from spotjax.api.access.callers import Caller, Role
from spotjax.api.backend import Backend
from spotjax.api.http.app import application
from spotjax.api.http.server import HttpServer
from spotjax.api.validation import ServedModel
from spotjax.errors import Unauthenticated
from spotjax.meshes.shape import MeshShape
from spotjax.testing.scripted_service import ByteTokenizer, ScriptedService

MODEL = ServedModel("scripted", ByteTokenizer(), max_model_len=4096)
TOKEN_SECONDS = 0.005


class OneKey:
    """A gate that knows an admin and a viewer."""

    def caller_of(self, key: str | None) -> Caller:
        roles = {"the-admin-key": Role.ADMIN, "the-viewer-key": Role.VIEWER}
        if key in roles:
            return Caller("somebody", roles[key])
        raise Unauthenticated("send an API key as Authorization: Bearer")


class Scripted:
    """A server on a free port; its loop runs in a thread, because Playwright's blocks this one."""

    def __init__(self, keyed: bool) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()
        self.port = 0
        self.service, self.server = self.do(self._start(keyed))

    @property
    def page(self) -> str:
        return f"http://127.0.0.1:{self.port}/ui/"

    async def _start(self, keyed: bool) -> tuple[ScriptedService, HttpServer]:
        async def delay() -> None:
            await asyncio.sleep(TOKEN_SECONDS)

        backend = Backend(gate=OneKey()) if keyed else Backend()
        service = ScriptedService(delay=delay, shape=MeshShape(2, 2, 1), spare_instances=3)
        backend.attach(service, MODEL)
        self._backend = backend
        return service, await self._listen()

    async def _listen(self) -> HttpServer:
        server = HttpServer(application(self._backend))
        self.port = await server.start(f"127.0.0.1:{self.port}")
        return server

    def leave(self) -> None:
        """Nobody answers any more."""
        self.do(self.server.stop())

    def come_back(self) -> None:
        """Another server answers in its place, for the same service."""
        self.server = self.do(self._listen())

    def do(self, work: Any) -> Any:
        """What a coroutine comes to in the server's loop."""
        done: Future[Any] = asyncio.run_coroutine_threadsafe(work, self.loop)
        return done.result(30)

    def close(self) -> None:
        self.do(self.service.stop())
        self.do(self.server.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


@contextmanager
def scripted(keyed: bool = False) -> Iterator[Scripted]:
    server = Scripted(keyed)
    try:
        yield server
    finally:
        server.close()


@contextmanager
def watched(browser: Browser, url: str, allowed: tuple[str, ...] = (), **options: Any) -> Iterator[Page]:
    """A page that asks no other host, and whose console stays free of errors but for those that say ``allowed``."""
    context = browser.new_context(**options)
    page = context.new_page()
    page.set_default_timeout(60_000)
    problems: list[str] = []

    def said(message: ConsoleMessage) -> None:
        text = f"{message.type}: {message.text} ({message.location['url']})"
        if message.type in ("error", "warning") and not any(part in text for part in allowed):
            problems.append(text)

    def asked(request: Request) -> None:
        if urlsplit(request.url).netloc != urlsplit(url).netloc:
            problems.append(f"asked elsewhere: {request.url}")

    page.on("console", said)
    page.on("pageerror", lambda error: problems.append(f"failed: {error}"))
    page.on("request", asked)
    try:
        page.goto(url)
        yield page
    finally:
        context.close()
    assert not problems, "\n".join(problems)


def unnamed(page: Page) -> list[str]:
    """Roles of what can be acted on, or is a landmark, and has no accessible name."""
    session = page.context.new_cdp_session(page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    needing = {"button", "textbox", "spinbutton", "radio", "link", "dialog", "heading", "image", "region", "checkbox"}
    return [
        node["role"]["value"]
        for node in nodes
        if not node.get("ignored") and node["role"]["value"] in needing and not node.get("name", {}).get("value")
    ]
