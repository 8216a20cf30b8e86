"""Decoders of msgpack that fail in one way, whatever is wrong with the bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from collections.abc import Buffer  # Python 3.12 has it at run time

UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What msgspec raises of bytes that are no message: malformed, of another type, no UTF-8, or nested without end."""


def decoder_of(kind: Any) -> Callable[[Buffer], Any]:
    """Decodes messages of a type; raises ``msgspec.DecodeError`` for anything else."""
    decode = msgspec.msgpack.Decoder(kind).decode

    def decoded(content: Buffer) -> Any:
        try:
            return decode(content)
        except msgspec.MsgspecError:
            raise
        except UNREADABLE as error:
            raise msgspec.DecodeError(str(error)) from error

    return decoded
