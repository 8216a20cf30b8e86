"""How errors cross the wire: one gRPC status for each class of ``spotjax.errors``, and the way back for clients.

The class name and what its attributes say travel in trailing metadata, so that a client raises what the server raised:

    spotjax-error           the class name
    spotjax-field           ``InvalidRequest.field``
    retry-after-seconds     ``Overloaded.retry_after``
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, cast

import grpc
from google.protobuf.message import Message

from spotjax.api.unknown_fields import refuse_unknown_fields
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
    UnknownRequest,
)

log = logging.getLogger(__name__)

ERROR_KEY = "spotjax-error"
FIELD_KEY = "spotjax-field"
RETRY_KEY = "retry-after-seconds"


class Unavailable(SpotjaxError):
    """No server answers at the address, or the one that does cannot serve yet."""


class Unreachable(Unavailable):
    """No server answers at the address, or it went away in the middle of a call. Only clients raise it."""


STATUS: dict[type[SpotjaxError], grpc.StatusCode] = {
    InvalidRequest: grpc.StatusCode.INVALID_ARGUMENT,
    RequestExists: grpc.StatusCode.ALREADY_EXISTS,
    Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    RateLimited: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    Draining: grpc.StatusCode.UNAVAILABLE,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
    LogUnavailable: grpc.StatusCode.UNAVAILABLE,
    UnknownRequest: grpc.StatusCode.NOT_FOUND,
    UnknownInstance: grpc.StatusCode.NOT_FOUND,
    NoSpareDevices: grpc.StatusCode.FAILED_PRECONDITION,
    NoFeasibleShape: grpc.StatusCode.FAILED_PRECONDITION,
    CheckpointError: grpc.StatusCode.FAILED_PRECONDITION,
    InstanceLost: grpc.StatusCode.UNAVAILABLE,
}
"""Every other class is INTERNAL."""

Servicer = TypeVar("Servicer")
Request = TypeVar("Request", bound=Message)
Response = TypeVar("Response")
Context = grpc.aio.ServicerContext[Any, Any]
Method = Callable[[Servicer, Request, Context], Awaitable[Response]]


def status_of(error: SpotjaxError) -> grpc.StatusCode:
    """The gRPC status of an error: that of its class, or of the nearest class above it."""
    return next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), grpc.StatusCode.INTERNAL)


def trailing_metadata(error: SpotjaxError) -> tuple[tuple[str, str], ...]:
    """What a client needs, besides status and message, to raise the same error."""
    metadata = [(ERROR_KEY, type(error).__name__)]
    if isinstance(error, InvalidRequest):
        metadata.append((FIELD_KEY, error.field))
    if isinstance(error, Overloaded):
        metadata.append((RETRY_KEY, f"{error.retry_after:g}"))
    return tuple(metadata)


def rpc(method: Method[Servicer, Request, Response]) -> Method[Servicer, Request, Response]:
    """Wraps a method of a servicer: refuses unknown fields, and answers errors with their status.

    An error that is not a ``SpotjaxError`` is a bug: it is logged, and the client learns no more than INTERNAL.
    """

    @functools.wraps(method)
    async def answer(servicer: Servicer, request: Request, context: Context) -> Response:
        try:
            refuse_unknown_fields(request)
            return await method(servicer, request, context)
        except SpotjaxError as error:
            await context.abort(status_of(error), str(error), trailing_metadata(error))
        except (grpc.RpcError, grpc.aio.AbortError):
            raise
        except Exception:
            log.exception("%s failed", method.__name__)
            await context.abort(grpc.StatusCode.INTERNAL, "internal error; the server's log has the details")
        raise AssertionError("abort() returned")

    return answer


def error_from(failure: grpc.RpcError, server: str) -> Exception:
    """What a client raises for a call that failed: the server's own error where it sent one.

    A deadline that passed is the built-in ``TimeoutError``.
    """
    call = cast(grpc.Call, failure)  # what both APIs raise has the methods of a Call
    code, details = call.code(), call.details() or ""
    trailing = {key: value for key, value in call.trailing_metadata() or () if isinstance(value, str)}
    name = trailing.get(ERROR_KEY)
    if name == RequestExists.__name__:
        return RequestExists(details.partition("'")[2].partition("'")[0])  # its message quotes the id
    if name == InvalidRequest.__name__:
        field = trailing.get(FIELD_KEY, "")
        return InvalidRequest(field, details.removeprefix(f"{field}: "))
    for refusal in (Overloaded, RateLimited):
        if name == refusal.__name__:
            return refusal(details, float(trailing.get(RETRY_KEY, "1")))
    for kind in STATUS:
        if kind.__name__ == name:
            return kind(details)
    if code is grpc.StatusCode.UNAVAILABLE:
        return Unreachable(
            f"no Spotjax server answers at {server}; start one with: spotjax serve --instances 4 --listen {server}"
        )
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return TimeoutError(f"{server} did not finish before the deadline")
    return SpotjaxError(f"{server} answered {code.name}: {details}")
