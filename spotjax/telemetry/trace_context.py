"""The W3C trace context that a caller sends along, as text. What becomes of it is in ``tracing``."""

from __future__ import annotations

import re
from contextvars import ContextVar

HEADER = "traceparent"
"""Of HTTP requests, and key of gRPC metadata."""
VALID = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


_current: ContextVar[str] = ContextVar("traceparent", default="")


def checked_traceparent(value: str) -> str:
    """The value of the header, or nothing if it is not one: by the standard, such a one is as if it were not there."""
    return value if VALID.fullmatch(value) else ""


def set_traceparent(value: str) -> None:
    """The call that is being answered in this context came with that header."""
    _current.set(checked_traceparent(value))


def current_traceparent() -> str:
    """Of the call that is being answered; empty if it came without one."""
    return _current.get()
