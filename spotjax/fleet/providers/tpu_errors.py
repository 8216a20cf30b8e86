"""What goes wrong in the client of Cloud TPU, as the errors of a provider. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import grpc
from google.api_core.exceptions import GoogleAPICallError
from google.auth.exceptions import GoogleAuthError
from google.rpc.error_details_pb2 import ErrorInfo, QuotaFailure, RetryInfo
from google.rpc.status_pb2 import Status

from spotjax.errors import OutOfCapacity, ProviderError, ProviderRefused, ProviderUnavailable, QuotaExceeded

CODES: Mapping[grpc.StatusCode, type[ProviderError]] = {
    grpc.StatusCode.CANCELLED: ProviderUnavailable,
    grpc.StatusCode.UNKNOWN: ProviderUnavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: ProviderUnavailable,
    grpc.StatusCode.ABORTED: ProviderUnavailable,
    grpc.StatusCode.INTERNAL: ProviderUnavailable,
    grpc.StatusCode.UNAVAILABLE: ProviderUnavailable,
    grpc.StatusCode.DATA_LOSS: ProviderUnavailable,
    grpc.StatusCode.OK: ProviderUnavailable,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OutOfCapacity,
    grpc.StatusCode.INVALID_ARGUMENT: ProviderRefused,
    grpc.StatusCode.NOT_FOUND: ProviderRefused,
    grpc.StatusCode.ALREADY_EXISTS: ProviderRefused,
    grpc.StatusCode.PERMISSION_DENIED: ProviderRefused,
    grpc.StatusCode.UNAUTHENTICATED: ProviderRefused,
    grpc.StatusCode.FAILED_PRECONDITION: ProviderRefused,
    grpc.StatusCode.OUT_OF_RANGE: ProviderRefused,
    grpc.StatusCode.UNIMPLEMENTED: ProviderRefused,
}
"""Where the message says no more. OK with an error is an answer that makes no sense: try again."""

NUMBERS: Mapping[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}
TOO_FAST = re.compile(r"rate.?limit|per (minute|second|day)|too many requests", re.IGNORECASE)
QUOTA = re.compile(r"\bquotas?\b|_quota\b|quota_exceeded", re.IGNORECASE)
STOCKOUT = re.compile(
    r"capacity|stockout|resource_availability|resource_pool_exhausted|not have enough resources", re.IGNORECASE
)


def provider_error(problem: GoogleAPICallError | GoogleAuthError) -> ProviderError:
    """What a call that raised this comes to. The message has the code, and Google's words."""
    if isinstance(problem, GoogleAuthError):
        if problem.retryable:
            return ProviderUnavailable(f"no credentials for now: {problem}")
        return ProviderRefused(f"no credentials: {problem}; give this machine a service account, or log in with gcloud")
    code = problem.grpc_status_code or grpc.StatusCode.UNKNOWN
    return _error(code, problem.message or "", problem.details)


def from_status(status: Status) -> ProviderError:
    """What a ``google.rpc.Status`` comes to: that of an operation, or of a request that failed in the queue."""
    details = []
    for detail in status.details:
        for kind in (ErrorInfo, QuotaFailure, RetryInfo):
            if detail.Is(kind.DESCRIPTOR):
                detail.Unpack(unpacked := kind())
                details.append(unpacked)
    return _error(NUMBERS.get(status.code, grpc.StatusCode.UNKNOWN), status.message, details)


def said(doing: str, error: ProviderError) -> ProviderError:
    """The same error, which also says what could not be done."""
    text = f"{doing}: {error}"
    return ProviderUnavailable(text, error.retry_after) if isinstance(error, ProviderUnavailable) else type(error)(text)


def _error(code: grpc.StatusCode, message: str, details: Iterable[Any]) -> ProviderError:
    details = list(details)
    reasons = " ".join(detail.reason for detail in details if isinstance(detail, ErrorInfo))
    has_quota = any(isinstance(detail, QuotaFailure) for detail in details)
    kind = _kind(code, f"{message} {reasons}", has_quota)
    text = f"{code.name}: {message or 'no message'}"
    return ProviderUnavailable(text, _retry_after(details)) if kind is ProviderUnavailable else kind(text)


def _kind(code: grpc.StatusCode, text: str, has_quota: bool) -> type[ProviderError]:
    """Three things share RESOURCE_EXHAUSTED: calls that come too fast, an account's quota, and an empty zone.

    Zones without capacity are also told as UNAVAILABLE, INTERNAL and even FAILED_PRECONDITION, in plain words.
    """
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        if TOO_FAST.search(text):
            return ProviderUnavailable
        return QuotaExceeded if has_quota or QUOTA.search(text) else OutOfCapacity
    if CODES[code] is ProviderUnavailable or code is grpc.StatusCode.FAILED_PRECONDITION:
        if STOCKOUT.search(text):
            return OutOfCapacity
        if has_quota:
            return QuotaExceeded
    return CODES[code]


def _retry_after(details: Iterable[Any]) -> float | None:
    """Seconds that the service asks to wait, if it does."""
    delays = (detail.retry_delay for detail in details if isinstance(detail, RetryInfo))
    return max((delay.ToTimedelta().total_seconds() for delay in delays), default=None)
