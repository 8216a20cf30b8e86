"""How errors look over HTTP: OpenAI's schema, one status for each class of ``spotjax.errors``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from spotjax.api.errors import Unavailable
from spotjax.engine.structure import StructureFailed
from spotjax.errors import (
    CheckpointError,
    Draining,
    InstanceLost,
    InvalidRequest,
    LogUnavailable,
    NoFeasibleShape,
    NoSpareDevices,
    Overloaded,
    PermissionDenied,
    RateLimited,
    RequestExists,
    SpotjaxError,
    Unauthenticated,
    UnknownInstance,
    UnknownModel,
    UnknownRequest,
)

JSON = "application/json"
RETRY_SECONDS = 1
"""After which trying again makes sense where the error does not say: the server starts, or another takes its place."""


class KeyReused(InvalidRequest):
    """What was sent before under this name asks for something else."""


class RequestCancelled(SpotjaxError):
    """Somebody ended the request before it was finished."""


class Kind(NamedTuple):
    """Status, and ``type`` and ``code`` of OpenAI's schema."""

    status: int
    type: str
    code: str | None = None


INTERNAL = Kind(500, "server_error", "internal_error")
KINDS: dict[type[SpotjaxError], Kind] = {
    InvalidRequest: Kind(400, "invalid_request_error"),
    UnknownModel: Kind(404, "not_found_error", "model_not_found"),
    KeyReused: Kind(422, "invalid_request_error", "key_reused"),
    RequestCancelled: Kind(400, "invalid_request_error", "request_cancelled"),
    StructureFailed: Kind(422, "invalid_request_error", "structure_failed"),
    RequestExists: Kind(409, "invalid_request_error", "request_exists"),
    Unauthenticated: Kind(401, "authentication_error", "invalid_api_key"),
    PermissionDenied: Kind(403, "permission_error", "permission_denied"),
    RateLimited: Kind(429, "rate_limit_error", "rate_limit_exceeded"),
    Overloaded: Kind(429, "rate_limit_error", "overloaded"),
    Draining: Kind(503, "service_unavailable_error", "draining"),
    Unavailable: Kind(503, "service_unavailable_error", "unavailable"),
    LogUnavailable: Kind(503, "service_unavailable_error", "log_unavailable"),
    InstanceLost: Kind(503, "service_unavailable_error", "instance_lost"),
    UnknownRequest: Kind(404, "not_found_error", "unknown_request"),
    UnknownInstance: Kind(404, "not_found_error", "unknown_instance"),
    NoSpareDevices: Kind(409, "conflict_error", "no_spare_devices"),
    NoFeasibleShape: Kind(409, "conflict_error", "no_feasible_shape"),
    CheckpointError: Kind(409, "conflict_error", "checkpoint_error"),
}
"""Every other class is ``INTERNAL``."""

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
"""Of errors that have no class of their own, by status; others are ``invalid_request_error``."""


def kind_of(error: SpotjaxError) -> Kind:
    """How an error is told: as its class, or the nearest class above it."""
    return next((KINDS[kind] for kind in type(error).__mro__ if kind in KINDS), INTERNAL)


def body_of(message: str, kind: Kind, param: str | None = None) -> bytes:
    """The error as JSON."""
    return msgspec.json.encode(
        {"error": {"message": message, "type": kind.type, "param": param, "code": kind.code}}
    )  # fmt: skip


def error_body(error: SpotjaxError) -> bytes:
    """An error of ours as JSON."""
    return body_of(str(error), kind_of(error), error.field if isinstance(error, InvalidRequest) else None)


def error_response(error: SpotjaxError) -> Response:
    """The whole answer for an error of ours."""
    kind, headers = kind_of(error), {}
    if isinstance(error, Overloaded):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
    elif isinstance(error, Unauthenticated):
        headers["www-authenticate"] = 'Bearer realm="spotjax"'
    elif kind.status == 503:
        headers["retry-after"] = str(RETRY_SECONDS)
    return Response(error_body(error), kind.status, headers, JSON)


def refusal(status: int, message: str, headers: Mapping[str, str] | None = None, code: str | None = None) -> Response:
    """The answer for what has no class: a path that does not exist, a body that is too large."""
    return Response(
        body_of(message, Kind(status, TYPES.get(status, "invalid_request_error"), code)), status, headers, JSON
    )


async def on_error(request: Request, error: Exception) -> Response:
    """For starlette: an endpoint raised an error of ours."""
    assert isinstance(error, SpotjaxError)
    return error_response(error)


async def on_refusal(request: Request, error: Exception) -> Response:
    """For starlette: no route, or not with this method."""
    assert isinstance(error, HTTPException)
    return refusal(error.status_code, f"{request.method} {request.url.path}: {error.detail}", error.headers)


BUG = body_of("internal error; the server's log has the details", INTERNAL)


async def on_bug(request: Request, error: Exception) -> Response:
    """For starlette: what is left. ``app.Guarded`` logs it; the client learns no more than this."""
    return Response(BUG, INTERNAL.status, None, JSON)
