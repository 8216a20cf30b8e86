"""A stand-in for the instance metadata service of AWS EC2, version 2 only, as a Spot instance sees it.

Tokens end, and are wanted; what is not there is a 404 with a page in it. Beside that it can be told what to say, see
``spotjax.testing.metadata_server``. ``python -m spotjax.testing.metadata_aws --port 0`` prints its address.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import formatdate
from typing import Any

from spotjax.testing.metadata_faults import Reply, Request
from spotjax.testing.metadata_server import run

ABSENT = b'<?xml version="1.0" encoding="iso-8859-1"?>\n<html><head><title>404 - Not Found</title></head></html>\n'
LONGEST_TTL = 21600


class AwsMetadata:
    """What it knows.

    Args:
      wall: the platform's clock, Unix seconds.
      life_cycle: ``spot`` or ``on-demand``.
      longest_ttl: no token lives longer, whatever is asked for.
    """

    def __init__(
        self, wall: Callable[[], float] = time.time, life_cycle: str = "spot", longest_ttl: int = LONGEST_TTL
    ) -> None:
        self._wall, self._longest_ttl = wall, longest_ttl
        self.values: dict[str, str] = {"instance-life-cycle": life_cycle, "events/maintenance/scheduled": "[]"}
        self._tokens: dict[str, float] = {}
        self._events: dict[str, dict[str, str]] = {}
        self.orders: dict[str, Callable[..., Any]] = {
            "interrupt": self.interrupt, "recommend": self.recommend, "schedule": self.schedule,
            "cancel": self.cancel, "forget_tokens": self.forget_tokens, "skew": self.skew,
        }  # fmt: skip

    def interrupt(self, seconds: float = 120.0, action: str = "terminate") -> float:
        """The instance ends in so many seconds. Returns when, Unix seconds."""
        ends = float(int(self._wall() + seconds))
        self.values["spot/instance-action"] = json.dumps({"action": action, "time": _iso(ends)})
        return ends

    def recommend(self) -> None:
        """The instance is likely to be interrupted."""
        self.values["events/recommendations/rebalance"] = json.dumps({"noticeTime": _iso(self._wall())})

    def schedule(self, event: str, seconds: float, code: str = "system-reboot") -> float:
        """Maintenance begins in so many seconds. Returns when, Unix seconds."""
        begins = float(int(self._wall() + seconds))
        self._events[event] = {
            "NotBefore": _rfc(begins), "Code": code, "Description": f"scheduled {code}", "EventId": event,
            "NotAfter": _rfc(begins + 3600), "State": "active",
        }  # fmt: skip
        self._tell_events()
        return begins

    def cancel(self, event: str) -> None:
        """It does not happen."""
        del self._events[event]
        self._tell_events()

    def forget_tokens(self) -> None:
        """Refuses all that it gave out."""
        self._tokens.clear()

    def skew(self, seconds: float) -> None:
        """Its clock goes wrong, or this machine's: they differ by so much."""
        wall = self._wall
        self._wall = lambda: wall() + seconds

    async def answer(self, request: Request) -> Reply:
        """As the service answers."""
        if "x-forwarded-for" in request.headers:
            return self._reply(403)
        if request.path == "/latest/api/token":
            return self._give_token(request)
        if request.method != "GET":
            return self._reply(405)
        token = request.headers.get("x-aws-ec2-metadata-token", "")
        if self._tokens.get(token, 0.0) <= self._wall():
            return self._reply(401)
        value = self.values.get(request.path.removeprefix("/latest/meta-data/"))
        return self._reply(404, ABSENT) if value is None else self._reply(200, value.encode())

    def _give_token(self, request: Request) -> Reply:
        seconds = request.headers.get("x-aws-ec2-metadata-token-ttl-seconds", "")
        if request.method != "PUT":
            return self._reply(405)
        if not seconds.isdecimal() or not 1 <= int(seconds) <= LONGEST_TTL:
            return self._reply(400)
        lives = min(int(seconds), self._longest_ttl)
        token = secrets.token_urlsafe(40) + "=="
        self._tokens[token] = self._wall() + lives
        return self._reply(200, token.encode(), {"X-Aws-Ec2-Metadata-Token-Ttl-Seconds": str(lives)})

    def _reply(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> Reply:
        date = formatdate(int(self._wall()), usegmt=True)
        return Reply(body, status, {"Content-Type": "text/plain", "Server": "EC2ws", "Date": date, **(headers or {})})

    def _tell_events(self) -> None:
        self.values["events/maintenance/scheduled"] = json.dumps(list(self._events.values()))


def _iso(unix: float) -> str:
    return datetime.fromtimestamp(unix, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _rfc(unix: float) -> str:
    return datetime.fromtimestamp(unix, UTC).strftime("%d %b %Y %H:%M:%S GMT")


if __name__ == "__main__":
    run(AwsMetadata(), "a stand-in for the instance metadata service of AWS EC2")
