"""Asks a metadata server, politely and without end.

Owns what is an answer at all, how long it is waited for, and what its times mean on this machine's clock. The pauses
after trouble are ``patience``'s; what to ask, and what an answer says, is the sources' business.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx

from spotjax.errors import MetadataUnavailable
from spotjax.fleet.notices.patience import Patience

T = TypeVar("T")

LARGEST_ANSWER = 1 << 20
"""Bytes; answers of metadata servers are small, what a captive portal sends need not be."""
TIMEOUT = "no answer in time"
"""The trouble of an answer that did not come."""
FIRST_PATIENCE, LONGEST_PATIENCE = 2.0, 8.0
"""Seconds for an answer: of a server that answers at once, and of the slowest."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server answered.

    Attributes:
      status: of HTTP.
      headers: of HTTP.
      body: all of it.
      moment: when it was there, monotonic seconds.
      now: the same moment in Unix seconds, see ``true_time``.
    """

    status: int
    headers: httpx.Headers
    body: bytes
    moment: float
    now: float

    def text(self) -> str:
        """The body without space around it.

        Raises:
          MetadataUnavailable: it is not text.
        """
        try:
            return self.body.decode().strip()
        except UnicodeDecodeError as error:
            raise MetadataUnavailable("an answer that is not text", error) from None

    def json(self) -> Any:
        """The body's value.

        Raises:
          MetadataUnavailable: it is not JSON.
        """
        try:
            return json.loads(self.text())
        except ValueError:
            raise MetadataUnavailable("an answer that is not JSON", repr(self.text()[:80])) from None

    def monotonic(self, unix: float) -> float:
        """Monotonic seconds of a moment that the platform names in Unix seconds."""
        return self.moment + (unix - self.now)


def true_time(date: str | None, wall: float, took: float) -> float:
    """Unix seconds at the arrival of an answer.

    This machine's clock may be wrong, and deadlines with it. The server's (``Date``) is the platform's own, but tells
    whole seconds, and of when the answer was written. So ours is taken where it can be right by the server's, and
    otherwise the latest moment that the server's allows: rather too little time left than too much.

    Args:
      date: the answer's ``Date``, if it has one.
      wall: this machine's clock at arrival.
      took: seconds from the ask to the arrival.
    """
    try:
        earliest: float = parsedate_to_datetime(date or "").timestamp()
    except ValueError:
        return wall
    latest = earliest + 1.0 + took
    return wall if earliest <= wall <= latest else latest


class Asking:
    """Asks one server for one thing, again and again.

    Args:
      source: as in ``Notice.source``; for logs.
      client: carries the asks; its own timeouts do not count.
      clock: monotonic seconds.
      interval: seconds between two asks as long as there are answers, give or take a fifth: machines that began
        together do not ask together.
      wall: Unix seconds.
    """

    def __init__(
        self,
        source: str,
        client: httpx.AsyncClient,
        clock: Callable[[], float],
        interval: float = 1.0,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._client, self._clock, self._interval, self._wall = client, clock, interval, wall
        self._patience = Patience(source)
        self._answer_seconds = FIRST_PATIENCE
        self._due = -math.inf

    async def ask(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str] | None = None,
        answers: Collection[int] = (200,),
        content: object = None,
        held: float = 0.0,
    ) -> Answer:
        """Asks once. An answer has twice the seconds of the last one, and twice as many if that did not come in time.

        Args:
          answers: which statuses are answers.
          content: sent as JSON.
          held: seconds that the server was asked to wait for something to tell; they come on top.

        Raises:
          MetadataUnavailable: no answer came, not in time, or not one of ``answers``.
        """
        begun = self._clock()
        patience = held + self._answer_seconds
        try:
            async with asyncio.timeout(patience):
                answer = await self._exchange(method, url, headers, answers, content, begun)
        except TimeoutError:
            self._answer_seconds = min(2 * self._answer_seconds, LONGEST_PATIENCE)
            raise MetadataUnavailable(TIMEOUT, f"{method} {url} took over {patience:g} s") from None
        except httpx.HTTPError as error:
            raise MetadataUnavailable(type(error).__name__, f"{method} {url}: {error}") from None
        took = answer.moment - begun - held
        self._answer_seconds = min(max(2 * took, FIRST_PATIENCE), LONGEST_PATIENCE)
        return answer

    async def _exchange(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str] | None,
        answers: Collection[int],
        content: object,
        begun: float,
    ) -> Answer:
        async with self._client.stream(
            method, url, headers=headers, json=content, timeout=None, follow_redirects=False
        ) as response:
            if response.status_code not in answers:
                after = response.headers.get("Retry-After", "")
                seconds = float(after) if after.isascii() and after.isdecimal() else None
                raise MetadataUnavailable(f"status {response.status_code}", f"{method} {url}", seconds)
            body = bytearray()
            async for chunk in response.aiter_bytes():
                body += chunk
                if len(body) > LARGEST_ANSWER:
                    raise MetadataUnavailable("an answer without end", f"{method} {url}")
        arrived = self._clock()
        now = true_time(response.headers.get("Date"), self._wall(), arrived - begun)
        return Answer(response.status_code, response.headers, bytes(body), arrived, now)

    async def until_answered(self, look: Callable[[], Awaitable[T]]) -> T:
        """What ``look`` gives, which is called until no trouble (``MetadataUnavailable``) stops it."""
        while True:
            try:
                result = await look()
            except MetadataUnavailable as error:
                await self._patience.after(error.trouble, error.retry_after or 0.0, str(error))
            else:
                self._patience.over()
                self._due = self._clock() + self._interval * random.uniform(0.8, 1.2)
                return result

    async def rest(self) -> None:
        """Until it is time to ask again; at once if there was no answer yet."""
        await asyncio.sleep(max(self._due - self._clock(), 0.0))
