"""What can go wrong between a metadata server and who asks it, for servers and for tests in one process alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked.

    Attributes:
      method: of HTTP.
      path: without the query.
      query: the last value of each name.
      headers: names in lower case.
      body: as it came.
    """

    method: str
    path: str
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Reply:
    """What is answered.

    Attributes:
      body: of it.
      status: of HTTP.
      headers: without the body's length.
    """

    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


class Kind(StrEnum):
    """What goes wrong. The first four with the connection, the others with what is answered."""

    REFUSE = "refuse"
    """The connection ends before there is an answer."""
    HANG = "hang"
    """Nothing is answered for ``Fault.seconds``, and nothing then."""
    SLOW = "slow"
    """The answer is written ``Fault.seconds`` late."""
    CUT = "cut"
    """The connection ends in the middle of the answer."""
    STATUS = "status"
    """``Fault.status`` instead."""
    TRUNCATED = "truncated"
    """Half of the body, as if it were all."""
    MALFORMED = "malformed"
    """Text that means nothing, before what it should have been."""
    EMPTY = "empty"
    """No body."""
    BARE = "bare"
    """The right answer without the headers by which the platform is known."""
    CONTENT_TYPE = "content-type"
    """The right answer, as ``image/png``."""
    PORTAL = "portal"
    """A page for people that asks them to log in."""
    REDIRECT = "redirect"
    """To that page."""
    STALE = "stale"
    """What was answered to the same request before, once more."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong.

    Attributes:
      kind: which.
      seconds: how long, where that has a meaning.
      status: for ``Kind.STATUS``.
      retry_after: seconds in ``Retry-After``; for ``Kind.STATUS``.
    """

    kind: Kind
    seconds: float = 1.0
    status: int = 503
    retry_after: int | None = None


PORTAL = b"<html><head><title>Welcome</title></head><body>Log in to use this network.</body></html>"


def spoilt(reply: Reply, fault: Fault, before: Reply | None) -> Reply:
    """The answer with what goes wrong with it; ``before`` was the one to the same request at an earlier time."""
    match fault.kind:
        case Kind.STATUS:
            after = {} if fault.retry_after is None else {"Retry-After": str(fault.retry_after)}
            return Reply(b"", fault.status, after)
        case Kind.TRUNCATED:
            return replace(reply, body=reply.body[: len(reply.body) // 2])
        case Kind.MALFORMED:
            return replace(reply, body=b"\xff{" + reply.body)
        case Kind.EMPTY:
            return replace(reply, body=b"")
        case Kind.BARE:
            return replace(reply, headers={name: value for name, value in reply.headers.items() if name == "Date"})
        case Kind.CONTENT_TYPE:
            return replace(reply, headers={**reply.headers, "Content-Type": "image/png"})
        case Kind.PORTAL:
            return Reply(PORTAL, headers={"Content-Type": "text/html"})
        case Kind.REDIRECT:
            return Reply(status=302, headers={"Location": "http://portal.example/"})
        case Kind.STALE:
            date = {name: value for name, value in reply.headers.items() if name == "Date"}
            return reply if before is None else replace(before, headers={**before.headers, **date})
        case _:
            return reply
