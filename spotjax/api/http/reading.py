"""Reads a request's body: its size, its type, and what in it is not as it must be, by name."""

from __future__ import annotations

import asyncio
import re
from typing import TypeVar

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from spotjax.api.http.errors import JSON
from spotjax.api.validation import MAX_MESSAGE_BYTES
from spotjax.errors import InvalidRequest

Body = TypeVar("Body")

AT = re.compile(r"(?P<problem>.*?)(?: - at (?:`?key`? in )?`\$\.?(?P<path>.*)`)?", re.DOTALL)
FIELD = re.compile(r"Object (?P<how>contains unknown|missing required) field `(?P<name>.*?)`", re.DOTALL)
BODY_SECONDS = 60.0
"""For which a body may be on its way."""
LINGER = 8
"""Times the limit: so much of a body that is too large is read, and thrown away, before the connection is closed."""
UNSUPPORTED = "is not supported by this server; leave it out"


async def read(request: Request, kind: type[Body]) -> Body:
    """The body, checked.

    Raises:
      InvalidRequest: it is not JSON, or not of this type; names the field.
      HTTPException: it is too large or too slow, or not said to be JSON.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != JSON:
        raise HTTPException(415, f"send {JSON} and say so in content-type")  # what other sites' forms cannot
    return decoded(await read_bytes(request), kind)


async def read_bytes(request: Request, limit: int = MAX_MESSAGE_BYTES) -> bytes:
    """The body as it came. One that is too large is not kept, and not read to its end unless that is near."""
    body, size = bytearray(), 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for piece in request.stream():
                size += len(piece)
                if size <= limit:
                    body += piece
                elif size > LINGER * limit:
                    break
                else:  # a client that is still sending would not see the answer
                    body.clear()
    except TimeoutError:
        raise HTTPException(408, f"the body did not come within {BODY_SECONDS:g} s", {"connection": "close"}) from None
    except ClientDisconnect:
        raise HTTPException(400, "the body ended before its end") from None
    if size > limit:
        raise HTTPException(413, f"the body must be at most {limit} bytes", {"connection": "close"})
    return bytes(body)


def decoded(body: bytes, kind: type[Body]) -> Body:
    """A body of this type.

    Raises:
      InvalidRequest: it is none; names the field.
    """
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise refused(str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest("body", f"must be JSON: {error}") from error


def refused(complaint: str) -> InvalidRequest:
    """What msgspec says of a body, with the path of the field as clients write it: ``messages[0].role``."""
    found = AT.fullmatch(complaint)
    assert found is not None, "the pattern matches any text"
    problem, path = found["problem"], found["path"] or ""
    if field := FIELD.match(problem):
        path = f"{path}.{field['name']}" if path else field["name"]
        return InvalidRequest(path or "body", UNSUPPORTED if field["how"] == "contains unknown" else "must be given")
    if problem.startswith("Expected `null`"):
        return InvalidRequest(path or "body", UNSUPPORTED)
    return InvalidRequest(path or "body", problem[:1].lower() + problem[1:])
