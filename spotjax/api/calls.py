"""What the blocking and the asyncio client share: channel options, and telling whether a request was accepted."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from typing import Any

from spotjax.api.generation import REQUEST_ID_KEY
from spotjax.api.validation import MAX_MESSAGE_BYTES
from spotjax.errors import ConfigError
from spotjax.settings import API_KEY

DEFAULT_SERVER = "127.0.0.1:8470"
SAVE_SECONDS = 60.0
"""For KV in a save, unless told otherwise."""
CANCEL_TIMEOUT = 1.0
"""Seconds that a client gives a courtesy: ending a request that it does not wait for any more."""

OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 10_000),  # notice within seconds that the server's machine died
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.enable_http_proxy", 0),
)


def authorization(api_key: str | None, environment: Mapping[str, str] = os.environ) -> tuple[tuple[str, str], ...]:
    """Metadata of every call: who calls. Without a key it is that of the variable ``SPOTJAX_API_KEY``, if there is one.

    Raises:
      ConfigError: it is no key.
    """
    key = environment.get(API_KEY, "") if api_key is None else api_key
    if not key:
        return ()
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise ConfigError(
            f"an API key has no spaces and only printable ASCII characters; look at --api-key or {API_KEY}"
        )
    return (("authorization", f"Bearer {key}"),)


def names_request(initial_metadata: Iterable[Any] | None) -> bool:
    """Whether initial metadata says that the request was accepted."""
    return any(key == REQUEST_ID_KEY for key, _ in initial_metadata or ())


def deadline_after(timeout: float | None) -> float | None:
    """The monotonic time ``timeout`` seconds from now; None stays None."""
    return None if timeout is None else time.monotonic() + timeout


def seconds_until(deadline: float | None) -> float | None:
    """Seconds left, at least 0; None where there is no deadline."""
    return None if deadline is None else max(0.0, deadline - time.monotonic())


def until_deadline(wait: float, deadline: float | None) -> float:
    """Seconds of a wait that ends at the deadline."""
    left = seconds_until(deadline)
    return wait if left is None else min(wait, left)
