"""What Compute Engine says when it does not do what was asked, as the errors of a provider. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from spotjax.errors import OutOfCapacity, ProviderError, ProviderRefused, ProviderUnavailable, QuotaExceeded

STOCKOUT = re.compile(r"RESOURCE_?POOL_?EXHAUSTED|STOCKOUT|RESOURCE_?AVAILABILITY", re.IGNORECASE)
TOO_FAST = re.compile(r"RATE_?LIMIT_?EXCEEDED|RATE_?EXCEEDED|TOO_?MANY_?REQUESTS", re.IGNORECASE)
QUOTA = re.compile(r"QUOTA_?EXCEEDED|LIMIT_?EXCEEDED|QUOTA_?LIMIT", re.IGNORECASE)
LATER = re.compile(
    r"NOT_?READY|IN_?USE|ALREADY_?EXISTS|INTERNAL|BACKEND|UNAVAILABLE|TIMEOUT|CANCELL?ED|ABORTED|CONCURRENT|OPERATION_?IN",
    re.IGNORECASE,
)
WORDS = (
    (STOCKOUT, OutOfCapacity),
    (TOO_FAST, ProviderUnavailable),
    (QUOTA, QuotaExceeded),
    (LATER, ProviderUnavailable),
)
"""Words in codes, in the order in which they count, of operations (UPPER_CASE) and of HTTP (camelCase)."""
STATUSES: Mapping[int, type[ProviderError]] = {
    408: ProviderUnavailable,
    409: ProviderUnavailable,
    429: ProviderUnavailable,
}
"""HTTP statuses whose reason says nothing; else 5xx is for later, and 4xx is refused."""


def kind_of(codes: Sequence[str], status: int) -> type[ProviderError]:
    """Which error it is.

    Args:
      codes: of an operation, or reasons of an answer; those that are known count before the status.
      status: of HTTP; 0 if there is none.
    """
    text = " ".join(codes)
    for pattern, error in WORDS:
        if pattern.search(text):
            return error
    if status >= 500:
        return ProviderUnavailable
    return STATUSES.get(status, ProviderRefused)


def provider_error(
    doing: str, codes: Sequence[str], status: int, message: str, retry_after: float | None = None
) -> ProviderError:
    """The error to raise.

    Args:
      doing: what could not be done.
      codes: see ``kind_of``.
      status: see ``kind_of``.
      message: in Google's words.
      retry_after: seconds that it said to wait.
    """
    kind = kind_of(codes, status)
    reason = ", ".join(codes) or (f"HTTP {status}" if status else "no code")
    text = f"{doing}: {reason}: {message or 'no message'}"
    return ProviderUnavailable(text, retry_after) if kind is ProviderUnavailable else kind(text)
