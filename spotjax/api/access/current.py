"""The caller of the call that is being answered; set by the gRPC interceptor and the HTTP middleware, per task."""

from __future__ import annotations

from contextvars import ContextVar

from spotjax.api.access.callers import Caller

_caller: ContextVar[Caller] = ContextVar("spotjax_caller")


def current_caller() -> Caller:
    """Who calls. Raises LookupError outside of a call, or where nobody has asked who it is: nothing is let through."""
    return _caller.get()


def set_caller(caller: Caller) -> None:
    """From now on, in this task, it is this caller who calls."""
    _caller.set(caller)
