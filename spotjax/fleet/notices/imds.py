"""The instance metadata service of AWS EC2, version 2: every ask carries a token of a session.

Owns the token: when it is asked for, how long it is used. What is asked is ``aws``'s business.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable

import httpx

from spotjax.errors import MetadataUnavailable
from spotjax.fleet.notices.asking import TIMEOUT, Answer, Asking

TOKEN_SECONDS = 21600
"""The longest session that the service gives."""
RENEWED_AT = 0.9
"""Part of its life after which a token is renewed."""
RENEW_AGAIN_SECONDS = 10.0
"""Between attempts to renew a token that is still good."""
_TOKEN = re.compile(r"[A-Za-z0-9_+/=-]{1,1024}")
HOP_LIMIT = (
    "in a container, it may be kept away by the instance's hop limit: "
    "aws ec2 modify-instance-metadata-options --http-put-response-hop-limit 2"
)


class Imds:
    """Sessions with the service.

    Args:
      client: carries the asks.
      clock: monotonic seconds.
      base_url: of the service.
    """

    def __init__(self, client: httpx.AsyncClient, clock: Callable[[], float], base_url: str) -> None:
        self._clock, self._base_url = clock, base_url
        self._asking = Asking("aws", client, clock)
        self._token: str | None = None
        self._renew_at = self._ends_at = 0.0
        self._renewal: asyncio.Task[str] | None = None

    async def get(self, asking: Asking, path: str) -> Answer | None:
        """What the service has at a path below ``meta-data``; None if there is no such thing now.

        Raises:
          MetadataUnavailable: it cannot be known.
        """
        url = f"{self._base_url}/latest/meta-data/{path}"
        for _ in range(2):
            token = await self._session()
            answer = await asking.ask("GET", url, {"X-aws-ec2-metadata-token": token}, answers=(200, 404, 401))
            if answer.status != 401:
                return answer if answer.status == 200 else None
            if token == self._token:
                self._token = None
        raise MetadataUnavailable("status 401", f"GET {url}")

    async def close(self) -> None:
        """Gives up what is asked for."""
        if self._renewal is not None:
            self._renewal.cancel()
            await asyncio.gather(self._renewal, return_exceptions=True)

    async def _session(self) -> str:
        """A token that is good; however many ask, one is fetched."""
        if self._token is not None and self._clock() < self._renew_at:
            return self._token
        if self._renewal is None:
            self._renewal = asyncio.create_task(self._renew(), name="session of the metadata service")
            self._renewal.add_done_callback(self._renewed)
        return await asyncio.shield(self._renewal)

    async def _renew(self) -> str:
        asked = self._clock()
        try:
            token, seconds = await self._fetch()
        except MetadataUnavailable:
            if self._token is None or asked >= self._ends_at:
                self._token = None
                raise
            self._renew_at = self._clock() + RENEW_AGAIN_SECONDS
            return self._token
        self._token = token
        self._renew_at, self._ends_at = asked + RENEWED_AT * seconds, asked + seconds
        return token

    async def _fetch(self) -> tuple[str, float]:
        """A token and the seconds that it lives."""
        header = "X-aws-ec2-metadata-token-ttl-seconds"
        try:
            answer = await self._asking.ask("PUT", f"{self._base_url}/latest/api/token", {header: str(TOKEN_SECONDS)})
        except MetadataUnavailable as error:
            hint = f"; {HOP_LIMIT}" if error.trouble == TIMEOUT else ""
            raise MetadataUnavailable(f"no session, {error.trouble}", f"{error}{hint}", error.retry_after) from None
        token, lives = answer.text(), answer.headers.get(header, "")
        if not _TOKEN.fullmatch(token):
            raise MetadataUnavailable("a session token that is none", f"{len(token)} characters")
        return token, float(lives) if lives.isascii() and lives.isdecimal() else float(TOKEN_SECONDS)

    def _renewed(self, renewal: asyncio.Task[str]) -> None:
        self._renewal = None
        if not renewal.cancelled():
            renewal.exception()  # whoever waited has it; nobody may have
