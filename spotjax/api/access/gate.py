"""How a key becomes a caller: the interface, and the gate that knows no keys. The one that does is in ``key_file``."""

from __future__ import annotations

from typing import Protocol

from spotjax.api.access.callers import ANYBODY, Caller
from spotjax.errors import Unauthenticated


class Gate(Protocol):
    """Knows the callers."""

    def caller_of(self, key: str | None) -> Caller:
        """Who it is that shows this key; None shows none.

        Raises:
          Unauthenticated: a key is needed, or this one is none, or not one any more.
        """
        ...


class OpenGate:
    """No keys are configured: everybody who can reach the server is an admin."""

    def caller_of(self, key: str | None) -> Caller:
        """See ``Gate.caller_of``. A key that is shown is not looked at: clients of the OpenAI API always show one."""
        return ANYBODY


def bearer(authorization: str | None) -> str | None:
    """The key in an ``Authorization`` header or the metadata of that name; None if there is no header.

    Raises:
      Unauthenticated: it is of another scheme.
    """
    if authorization is None:
        return None
    scheme, _, key = authorization.strip().partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise Unauthenticated("the authorization is not understood: send Bearer and an API key")
    return key.strip()
